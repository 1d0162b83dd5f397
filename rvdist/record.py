"""The record: one scored sample of one arm. Statistics are computed from records only.

Written by the fleet, read by the report; as JSON Lines under `samples/` of a run directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


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
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def read_records(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield Record(**json.loads(line))
