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
_TEXTS = ("arm", "point", "prompt", "task", "filter", "doc", "prompt_text", "target", "response", "filtered")


@dataclass(frozen=True)
class Record:
    """One document of one task, answered by one arm and scored after one lm-eval filter.

    `doc` is lm-eval's hash of the document: equal in every arm, and the cluster key where a document
    is asked more than once. `metrics` maps metric names to this sample's value. `prompt_text` is what
    the model was sent; `response` the raw completion (for multiple choice: one log-likelihood a
    choice); `filtered` what the metric saw. All text comes from a model: hostile input.
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
    if wrong := wanted ^ found.keys():
        name = min(wrong)
        raise ValueError(f"it {'lacks' if name in wanted else 'has'} {name[:50]!r}")
    record = Record(**found)
    if not isinstance(record.metrics, dict):
        raise ValueError("metrics are not an object")
    for name in _TEXTS:
        _require(name, found[name], str)
        found[name].encode()  # raises for half a surrogate, which could not be written again
    for name in _NAMES:
        _require_name(name, found[name])
    for name in ("seed", "doc_id"):
        _require(name, found[name], int)
    if record.alpha is not None:
        _require("alpha", record.alpha, int, float)
    for metric, value in record.metrics.items():
        _require_name("a metric", metric)
        _require(metric, value, int, float)
    return record


def _require_name(what: str, name: str) -> None:
    if len(name) > LONGEST_NAME:
        raise ValueError(f"{what} has {len(name):,} characters, and names have at most {LONGEST_NAME:,}")


def _require(name: str, value: Any, *kinds: type) -> None:
    if type(value) not in kinds:
        raise ValueError(f"{name[:50]} is {repr(value)[:50]}")
