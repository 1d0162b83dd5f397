"""The record: one scored sample of one arm. Statistics are computed from records only.

Written by the fleet, read by the report; as JSON Lines under `samples/` of a run directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.core.foreign import parse_line
from rvdist.core.regular import read_lines
from rvdist.core.text import reason

_LONGEST = 32 << 20  # bytes of a record
LONGEST_NAME = 4200  # characters of what tables and pages name: a task may be called by the path of a text
_NAMES = ("arm", "point", "prompt", "task", "filter", "doc")
_NEWER = {"weights", "tokens", "finish", "in_format"}  # that records did not have at first
_TEXTS = ("arm", "point", "prompt", "task", "filter", "doc", "prompt_text", "target", "response", "filtered")


@dataclass(frozen=True)
class Record:
    """One document of one task, answered by one arm and scored after one lm-eval filter.

    `doc` is lm-eval's hash of the document, equal in every arm, and `doc_id` its place in the task: a document that
    is there twice is two. `metrics` maps metric names to this sample's value. `prompt_text` is what
    the model was sent; `response` the raw completion (for multiple choice: one log-likelihood a
    choice); `filtered` what the metric saw. All text comes from a model: hostile input.

    `weights` says of a metric that is pooled over documents how much this one counts, such as its bytes. `tokens` are
    those of each completion of the document and `finish` why it ended, "stop" or "length" (cut at the limit): both
    empty where nothing was generated, or nobody wrote it down. `in_format` is whether the answer was as the task asks
    for it, so that its first filter that may find nothing found something; None where it has no such filter.
    """

    arm: str
    point: str
    alpha: float | None
    prompt: str
    task: str
    filter: str
    seed: int
    doc_id: int
    doc: str
    metrics: dict[str, float]
    prompt_text: str
    target: str
    response: str
    filtered: str
    weights: dict[str, float] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    finish: tuple[str, ...] = ()
    in_format: bool | None = None


@dataclass(frozen=True)
class TaskInfo:
    """What the statistics must know of a task: its version, its (metric, filter) pairs in lm-eval's
    order, which of them is the primary score, and for each metric whether more is better."""

    name: str
    version: str
    metrics: tuple[tuple[str, str], ...]
    primary: tuple[str, str]
    higher_is_better: dict[str, bool] = field(default_factory=dict)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes one line of JSON a record."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(vars(record), ensure_ascii=False) + "\n")


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, which anybody may have written. Raises BadInput, for a damaged line with its number."""
    try:
        for number, line in read_lines(path, _LONGEST):
            try:
                yield _record(parse_line(line))
            except ValueError as error:
                raise BadInput(f"{path}: line {number} is no record ({reason(error)}); evaluate again") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give a file of records") from None


def _record(found: Any) -> Record:
    """Raises ValueError for what is none."""
    wanted = {one.name for one in fields(Record)}
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    if wrong := wanted - _NEWER ^ found.keys() - _NEWER:
        name = min(wrong)
        raise ValueError(f"it {'lacks' if name in wanted else 'has'} {name[:50]!r}")
    record = Record(**found | {name: tuple(require_list(name, found.get(name, []))) for name in ("tokens", "finish")})
    for name in ("metrics", "weights"):
        if not isinstance(getattr(record, name), dict):
            raise ValueError(f"{name} are not an object")
    require_ends(record.tokens, record.finish)
    if record.in_format is not None:
        _require("in_format", record.in_format, bool)
    for name in _TEXTS:
        _require(name, found[name], str)
        found[name].encode()  # raises for half a surrogate, which could not be written again
    for name in _NAMES:
        _require_name(name, found[name])
    for name in ("seed", "doc_id"):
        _require(name, found[name], int)
    if record.alpha is not None:
        _require("alpha", record.alpha, int, float)
    for metric, value in (record.metrics | record.weights).items():
        _require_name("a metric", metric)
        _require(metric, value, int, float)
    return record


def require_list(name: str, value: Any) -> list[Any]:
    """The value. Raises ValueError where it is no list."""
    _require(name, value, list)
    return list(value)


def require_ends(tokens: Iterable[Any], finish: Iterable[Any]) -> None:
    """Raises ValueError where these are no numbers of tokens and reasons to stop."""
    if not all(type(count) is int and count >= 0 for count in tokens):
        raise ValueError("tokens are no counts")
    if not all(reason in ("stop", "length") for reason in finish):
        raise ValueError("finish is neither stop nor length")


def _require_name(what: str, name: str) -> None:
    if len(name) > LONGEST_NAME:
        raise ValueError(f"{what} has {len(name):,} characters, and names have at most {LONGEST_NAME:,}")


def _require(name: str, value: Any, *kinds: type) -> None:
    if type(value) not in kinds:
        raise ValueError(f"{name[:50]} is {repr(value)[:50]}")
