"""Texts as the tokens that an engine is asked, cut and scored as lm-eval's own vLLM backend does.

Knows a tokenizer; nothing of vLLM or weights.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

from rvdist.evaluate.request import Choice

_REMEMBERED = 2**24  # tokens of prompts, so that no prompt is cut into tokens again for every point


class Prompts:
    """Tokens of what is asked of a model with this tokenizer and a context of `max_len` tokens. `truncate`: what does
    not fit is cut from the left, and counted in `truncated`, not refused."""

    def __init__(self, tokenizer: Any, max_len: int, truncate: bool) -> None:
        self._tokenizer, self._max_len, self._truncate = tokenizer, max_len, truncate
        self.truncated = 0
        self.eos: str = tokenizer.decode(tokenizer.eos_token_id) or tokenizer.eos_token
        bos = tokenizer.bos_token_id
        self._prefix: int = tokenizer.eos_token_id if bos is None else bos
        self._prefix_text: str = tokenizer.decode(self._prefix)
        self._tokens: dict[tuple[str, bool | None], array[int]] = {}
        self._memory = _REMEMBERED

    def fit(self, tokens: list[int], room: int, to_generate: int) -> list[int]:
        """`tokens`, at most `room` of them."""
        if not tokens:
            raise ValueError("a prompt has no tokens; ask for at least one")
        if len(tokens) <= room:
            return tokens
        if room < 1 or not self._truncate:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and {to_generate} to generate exceed the context of "
                f"{self._max_len} tokens; raise engine.max_model_len or ask for less"
                + (", or set benchmarks.allow_truncation=true" if room >= 1 and not self._truncate else "")
            )
        self.truncated += 1
        return tokens[-room:]

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """lm-eval's `tok_encode`: the tokenizer's own special tokens, unless the text begins with them."""
        if not text:
            return []
        if text.startswith(self._prefix_text):
            special = False
        keywords = {} if special is None else {"add_special_tokens": special}
        known = self._tokens.get((text, special))
        if known is None:
            known = array("i", self._tokenizer(text, verbose=False, **keywords).input_ids)
            if self._memory >= len(known):  # the next point is asked the same
                self._memory -= len(known)
                self._tokens[text, special] = known
        return known.tolist()

    def encode_pair(self, request: Choice) -> tuple[list[int], list[int]]:
        """lm-eval's `loglikelihood` and `_encode_pair`: white space at the end of the context is scored with the
        continuation, and an empty context is the tokenizer's beginning of text."""
        context = request.context.rstrip()
        text = request.context + request.continuation
        if not context:
            tokens = self.encode(text, special=False)
            return (tokens[:1], tokens[1:]) if tokens[:1] == [self._prefix] else ([self._prefix], tokens)
        before = self.encode(context)
        return before, self.encode(text)[len(before) :]

    def windows(self, tokens: list[int]) -> Iterator[tuple[list[int], int]]:
        """lm-eval's rolling windows, made disjoint: prompts as long as its vLLM backend makes them, and from where on
        each is scored. After the first, a window begins with one token that is scored already; the last with more."""
        width = self._max_len - 2
        for begin in range(0, len(tokens), width):
            end = min(begin + width, len(tokens))
            prompt = tokens[end - width - 1 : end] if begin else [self._prefix, *tokens[:end]]
            yield prompt, len(prompt) - (end - begin)
