"""What an engine is asked and what it answers. Plain data: no tokens, no vLLM, no lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, ClassVar, TypeAlias

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's, the first counts
_DEFAULT_LENGTH = 256  # tokens, lm-eval's too


@dataclass(frozen=True)
class Generate:
    """Continue `prompt` by at most `max_tokens` tokens, until one of the strings in `stop` (which is cut off) or
    the tokenizer's end of text. Temperature 0 is greedy. A sampled completion can be had again: without a `seed` of its
    own it takes one from the engine's. `repeat` counts the samples of one prompt, each of which has another seed; it is
    no part of what is asked: requests that differ in it alone are equal."""

    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    repeat: int = field(default=0, compare=False)

    @property
    def text(self) -> str:
        """All that is read of it."""
        return self.prompt

    @classmethod
    def from_lm_eval(cls, prompt: str, kwargs: Mapping[str, Any]) -> Generate:
        """The request for lm-eval's `generate_until` arguments. Greedy unless `do_sample` is true or a positive
        temperature is given without `do_sample`. An empty string in `until` stops nothing. Raises ValueError for an
        argument nobody here knows."""
        left = dict(kwargs)
        until = left.pop("until", None) or ()
        lengths = [left.pop(key, None) for key in _LENGTHS]
        max_tokens = next((int(length) for length in lengths if length is not None), _DEFAULT_LENGTH)
        do_sample, temperature = left.pop("do_sample", None), left.pop("temperature", None)
        if do_sample is False or (do_sample is None and temperature is None):
            temperature = 0.0
        known = {key: left.pop(key) for key in ("top_p", "top_k", "min_p", "repetition_penalty", "seed") if key in left}
        if left:
            raise ValueError(f"generation_kwargs {sorted(left)} are not supported; leave them out")
        return cls(
            prompt=prompt,
            max_tokens=max_tokens,
            stop=tuple(stop for stop in ((until,) if isinstance(until, str) else until) if stop),
            temperature=1.0 if temperature is None else float(temperature),
            **known,
        )


@dataclass(frozen=True)
class Completion:
    """`text` without its stop string; `finish` is "stop" or "length", empty where nobody wrote down why it ended and
    how long it is; both counts are in tokens."""

    text: str
    finish: str
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class Choice:
    """How likely is `continuation` after `context`?"""

    context: str
    continuation: str
    max_tokens: ClassVar[int] = 1  # as of a completion: none comes of it, and vLLM makes one

    @property
    def text(self) -> str:
        return self.context + self.continuation


@dataclass(frozen=True)
class Rolling:
    """How likely is `continuation` from the beginning of text on, however long it is? In windows of the context's
    length: each token is scored once, after as many of those before it as its window holds."""

    continuation: str
    max_tokens: ClassVar[int] = 1

    @property
    def text(self) -> str:
        return self.continuation


@dataclass(frozen=True)
class Loglikelihood:
    """`logprob` in nats, summed over the continuation's `tokens`; `greedy` when each of them was the likeliest."""

    logprob: float
    greedy: bool
    tokens: int


Request: TypeAlias = Generate | Choice | Rolling
Answer: TypeAlias = Completion | Loglikelihood


@dataclass(frozen=True)
class Answered:
    """A slice's answers, in order. `truncated` of its prompts did not fit and were cut; it took so many `seconds`.
    `spoiled`: tensors in which there are infinities or NaNs, where that is allowed; not kept in the cache."""

    answers: tuple[Answer, ...]
    truncated: int
    seconds: float
    spoiled: tuple[str, ...] = ()


class Unscorable(Exception):
    """What was asked has no score at this point, since its weights or its answers are not finite: why, in a sentence
    without the point's name."""


class Unusable(RuntimeError):
    """An engine cannot serve, and another like it could not either: why, in a sentence."""


@dataclass(frozen=True)
class Refused:
    """A slice that got no answers, since its point is `Unscorable`: the `reason`."""

    reason: str


@dataclass(frozen=True)
class Progress:
    """How far a slice is: so many of its requests are answered, of its `prompt_tokens` so many are `read`, and so many
    `tokens` made, in so many `steps` of all that are answered at once."""

    requests: int = 0
    prompt_tokens: int = 0
    read: int = 0
    tokens: int = 0
    steps: int = 0

    def __add__(self, other: Progress) -> Progress:
        return Progress(*(own + more for own, more in zip(astuple(self), astuple(other), strict=True)))
