"""Texts as the tokens that an engine is asked, cut and scored as lm-eval's own vLLM backend does.

Knows a tokenizer; nothing of vLLM or weights.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from rvdist.core.text import reason
from rvdist.evaluate.request import Choice, Request

_REMEMBERED = 2**24  # tokens of prompts, so that no prompt is cut into tokens again for every point
_PATIENCE, _SLOWEST = 10.0, 20_000  # seconds for a text, and one more for so many characters


class _Cutter:
    """Cuts texts into tokens in a thread beside, which a stranger's regular expressions can keep for ever: Python's
    lock is free meanwhile, and who asks waits no longer than is due."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        self._asked: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[array[int] | BaseException] = queue.SimpleQueue()
        threading.Thread(target=_cut, args=(self._tokenizer, self._asked, self._answers), daemon=True).start()

    def cut(self, text: str, keywords: dict[str, Any]) -> array[int]:
        """Raises ValueError where it takes too long, or the tokenizer gives up."""
        self._asked.put((text, keywords))
        seconds = _PATIENCE + len(text) / _SLOWEST
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self._begin()  # another, for that one is lost
            raise ValueError(
                f"the tokenizer takes more than {seconds:.0f} s for a prompt of {len(text):,} characters: its file has "
                "regular expressions that do not end; take the model's own tokenizer"
            ) from None
        if isinstance(answer, array):
            return answer
        if isinstance(answer, Exception):
            raise answer
        raise ValueError(
            f"the tokenizer fails at a prompt of {len(text):,} characters ({reason(answer)})"
        )  # Rust's panic


def _cut(tokenizer: Any, asked: queue.SimpleQueue[Any], answers: queue.SimpleQueue[Any]) -> None:
    while True:
        text, keywords = asked.get()
        try:
            answers.put(array("i", tokenizer(text, verbose=False, **keywords).input_ids))
        except BaseException as error:
            answers.put(error)


class Prompts:
    """Tokens of what is asked of a model with this tokenizer and a context of `max_len` tokens. `truncate`: what does
    not fit is cut from the left, and counted in `truncated`, not refused."""

    def __init__(self, tokenizer: Any, max_len: int, truncate: bool) -> None:
        self._cutter, self._max_len, self._truncate = _Cutter(tokenizer), max_len, truncate
        self.truncated = 0
        self.eos: str = tokenizer.decode(tokenizer.eos_token_id) or tokenizer.eos_token
        bos = tokenizer.bos_token_id
        self._prefix: int = tokenizer.eos_token_id if bos is None else bos
        self._prefix_text: str = tokenizer.decode(self._prefix)
        self._tokens: dict[tuple[str, bool | None], array[int]] = {}
        self._memory = _REMEMBERED
        self._lock = threading.Lock()

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
        with self._lock:
            known = self._tokens.get((text, special))
            if known is None:
                known = self._cutter.cut(text, keywords)
                if self._memory >= len(known):  # the next point is asked the same
                    self._memory -= len(known)
                    self._tokens[text, special] = known
        return known.tolist()

    def remember(self, requests: Iterable[Request]) -> None:
        """Cuts what is asked into tokens, so that it is ready when it is asked; in a thread beside. What cannot be cut
        is found out then."""
        with contextlib.suppress(Exception):
            for request in requests:
                if isinstance(request, Choice):
                    self.encode_pair(request)
                else:
                    self.encode(request.text)

    def encode_pair(self, request: Choice) -> tuple[list[int], list[int]]:
        """lm-eval's `loglikelihood` and `_encode_pair`: white space at the end of the context is scored with the
        continuation, and an empty context is the tokenizer's beginning of text."""
        context = request.context.rstrip()
        if not context:
            tokens = self.encode(request.text, special=False)
            return (tokens[:1], tokens[1:]) if tokens[:1] == [self._prefix] else ([self._prefix], tokens)
        before = self.encode(context)
        return before, self.encode(request.text)[len(before) :]

    def windows(self, tokens: list[int]) -> Iterator[tuple[list[int], int]]:
        """lm-eval's rolling windows, made disjoint: prompts as long as its vLLM backend makes them, and from where on
        each is scored. After the first, a window begins with one token that is scored already; the last with more."""
        width = self._max_len - 2
        for begin in range(0, len(tokens), width):
            end = min(begin + width, len(tokens))
            prompt = tokens[end - width - 1 : end] if begin else [self._prefix, *tokens[:end]]
            yield prompt, len(prompt) - (end - begin)
