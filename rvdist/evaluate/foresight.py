"""What asking would cost, foreseen without an engine: requests, tokens, and seconds at the rates of earlier runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rvdist.core.foreign import parse_json
from rvdist.core.regular import read_regular, write_regular
from rvdist.evaluate.fleet.schedule import Slice
from rvdist.evaluate.request import Answered, Completion, Generate, Request

_SAMPLE = 64  # requests of a task whose tokens are counted
_WORTH_REMEMBERING = 10.0  # seconds of engines that say something of their rate
_MOST = 1 << 20  # bytes of what is remembered


@dataclass(frozen=True)
class Load:
    """What a task asks of one arm: `requests`, about so many tokens to read (`prompt`) and to make (`made`). Unless
    `known` from earlier answers, these are the most that may be made."""

    requests: int
    prompt: int
    made: int
    known: bool


def load_of(requests: Sequence[Request], tokenizer: Any, length: float | None) -> Load:
    """That of a task's requests, whose answers had so many tokens on average (None: not known). Of prompts some are
    counted, and the rest is taken to be like these."""
    texts = [one.text for one in requests]
    some = texts[:: math.ceil(len(texts) / _SAMPLE)] if texts else []
    counted = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in some)
    prompt = counted * sum(map(len, texts)) / max(1, sum(map(len, some)))
    if not any(isinstance(one, Generate) for one in requests):
        length = 1.0
    made = sum(one.max_tokens if length is None else min(length, one.max_tokens) for one in requests)
    return Load(len(requests), round(prompt), round(made), length is not None)


def mean_lengths(answered: Mapping[Slice, Answered]) -> dict[str, float]:
    """The mean tokens of an answer that was generated, by task."""
    lengths: dict[str, list[int]] = {}
    for piece, found in answered.items():
        tasks = (part.task for part in piece.parts for _ in part.places)
        for task, one in zip(tasks, found.answers, strict=True):
            if isinstance(one, Completion):
                lengths.setdefault(task, []).append(one.tokens)
    return {task: sum(own) / len(own) for task, own in lengths.items()}


@dataclass
class Memory:
    """What earlier runs were like: of each kind of device the tokens that an engine read and made a second, with a
    model of so many bytes; of each task the mean tokens of an answer. Kept in `cache.dir`."""

    rates: dict[str, tuple[float, float]] = field(default_factory=dict)
    lengths: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, cache: Path) -> Memory:
        """As far as it can be read: it is no part of any result."""
        memory = cls()
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = parse_json(read_regular(_file(cache), _MOST))
            memory.rates = {str(kind): _numbers(*pair) for kind, pair in found["rates"].items()}
            memory.lengths = {str(task): _numbers(length)[0] for task, length in found["lengths"].items()}
        return memory

    def remember(
        self, cache: Path, kind: str, nbytes: int, tokens: int, seconds: float, lengths: Mapping[str, float]
    ) -> None:
        """Keeps the rate of engines that read and made so many tokens in so many seconds together, if these say
        something, and how long answers were."""
        if seconds < _WORTH_REMEMBERING or not tokens:
            return
        self.rates[kind] = (tokens / seconds, float(nbytes))
        self.lengths |= {task: length for task, length in lengths.items() if length > 0}
        with suppress(OSError):
            write_regular(_file(cache), json.dumps({"rates": self.rates, "lengths": self.lengths}))

    def seconds(self, kind: str, nbytes: int, tokens: int, engines: int) -> float | None:
        """How long so many engines take; with larger models in proportion. None where no rate is known."""
        if kind not in self.rates:
            return None
        rate, of = self.rates[kind]
        return tokens / rate / engines * nbytes / of


def _file(cache: Path) -> Path:
    return cache / "speeds.json"


def _numbers(*values: Any) -> tuple[Any, ...]:
    """Raises ValueError for what is no number above 0."""
    if not all(type(value) in (int, float) and 0 < value < math.inf for value in values):
        raise ValueError("no rate")
    return values
