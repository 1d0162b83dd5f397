"""From records to samples: one number a document, whose mean is the score.

Repeats and seeds of a document are summed here, tasks are joined to groups here, and nothing is inferred here.
Knows nothing of intervals, files or tables.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rvdist.record import Record, TaskInfo
from rvdist.report.summary import GroupInfo

Floats = NDArray[np.float64]
Answers = Mapping[tuple[str, str, str], Sequence[Record]]  # by arm, task and filter


@dataclass(frozen=True)
class Score:
    """What is asked of every arm: one metric of a task, or of a group through its `members`."""

    task: str
    metric: str
    filter: str
    primary: bool
    higher_is_better: bool
    members: tuple[str, ...] = ()
    by_size: bool = True


@dataclass(frozen=True)
class Sample:
    """One arm's answers under one score.

    `values` has a number a document; their mean is the score. `means` are the documents' own scores. `strata` counts
    the documents of one stratum after the other: a task is one, a group has one for each member. `exact` is 0/1, one
    record a document, one stratum: the case with exact methods. `bound` is what one document can change at most where
    every record scores 0 or 1, else None.
    """

    documents: tuple[str, ...]
    values: Floats
    means: Floats
    strata: tuple[int, ...]
    exact: bool
    bound: float | None
    point: str
    seeds: frozenset[int]

    @property
    def score(self) -> float:
        """The mean over all records; of a group the weighted mean of its members'."""
        return float(self.values.mean())

    @property
    def alike(self) -> bool:
        """Whether the documents of each stratum all score the same, so that they say nothing of how scores vary."""
        return is_constant(self.means, self.strata) or is_constant(self.values, self.strata)


def is_constant(values: Floats, strata: Sequence[int]) -> bool:
    """Whether no value differs from another of its stratum."""
    return all((part == part[0]).all() for part in split(values, strata))


def split(values: Floats, strata: Sequence[int]) -> list[Floats]:
    """The values of each stratum."""
    return np.split(values, np.cumsum(strata)[:-1])


def sort_records(records: Iterable[Record]) -> Answers:
    answers: defaultdict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        answers[record.arm, record.task, record.filter].append(record)
    return answers


def scores(tasks: Sequence[TaskInfo], groups: Sequence[GroupInfo] = ()) -> Iterator[Score]:
    """Every score there is, a group's before those of its members."""
    known = {task.name: task for task in tasks}
    waiting = list(groups)
    for task in tasks:
        for group in [group for group in waiting if task.name in group.tasks]:
            waiting.remove(group)
            members = tuple(name for name in group.tasks if name in known)
            for pair in group.metrics:
                better = task.higher_is_better.get(pair[0], True)
                yield Score(group.name, *pair, pair == group.metrics[0], better, members, group.by_size)
        for pair in task.metrics:
            yield Score(task.name, *pair, pair == task.primary, task.higher_is_better.get(pair[0], True))


def sample(answers: Answers, arm: str, score: Score) -> Sample:
    """Raises ValueError where there is no record, a score that is no finite number, or more than one weight point."""
    if score.members:
        parts = [_task_sample(answers, arm, member, score.metric, score.filter) for member in score.members]
        return _joined(parts, score)
    return _task_sample(answers, arm, score.task, score.metric, score.filter)


def _task_sample(answers: Answers, arm: str, task: str, metric: str, filter_: str) -> Sample:
    records = answers.get((arm, task, filter_))
    if not records:
        raise ValueError(f"arm {arm!r} has no record of task {task!r} under the filter {filter_!r}")
    found: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        value = float(record.metrics.get(metric, math.nan))
        if not math.isfinite(value):
            raise ValueError(f"arm {arm!r} has no finite {metric!r} for document {record.doc_id} of task {task!r}")
        found[record.doc].append(value)
    points = {record.point for record in records}
    if len(points) > 1:
        raise ValueError(f"the records of arm {arm!r} come from {len(points)} weight points, not one")
    documents = tuple(sorted(found))
    sums = np.array([math.fsum(found[doc]) for doc in documents])
    counts = np.array([float(len(found[doc])) for doc in documents])
    binary = all(value in (0.0, 1.0) for doc in documents for value in found[doc])
    return Sample(
        documents=documents,
        values=sums / float(counts.mean()),
        means=sums / counts,
        strata=(len(documents),),
        exact=binary and bool((counts == 1).all()),
        bound=1.0 if binary else None,
        point=points.pop(),
        seeds=frozenset(record.seed for record in records),
    )


def _joined(parts: Sequence[Sample], score: Score) -> Sample:
    """A group's sample. Members of a single document say nothing of how documents of theirs vary: together they are
    one stratum, and a sole one goes with the smallest other."""
    total = sum(len(part.documents) for part in parts)
    pieces: list[tuple[int, str, Sample, float]] = []
    for name, part in zip(score.members, parts, strict=True):
        weight = 1.0 if score.by_size else total / (len(parts) * len(part.documents))
        pieces.append((len(part.documents), name, part, weight))
    pieces.sort(key=lambda piece: piece[:2])
    sizes = [size for size, *_ in pieces]
    single = sizes.count(1)
    strata = [single, *sizes[single:]] if single else sizes
    if strata[0] == 1 and len(strata) > 1:
        strata = [1 + strata[1], *strata[2:]]
    bounded = all(part.bound is not None for part in parts)
    return Sample(
        documents=tuple(f"{name}/{doc}" for _, name, part, _ in pieces for doc in part.documents),
        values=np.concatenate([part.values * weight for _, _, part, weight in pieces]),
        means=np.concatenate([part.means for _, _, part, _ in pieces]),
        strata=tuple(strata),
        exact=False,
        bound=max(weight for *_, weight in pieces) if bounded else None,
        point=parts[0].point,
        seeds=frozenset(seed for part in parts for seed in part.seeds),
    )


def common(parts: Sequence[Sample]) -> list[Sample]:
    """The samples of a task and its like, each reduced to the documents that all of them have."""
    shared = set(parts[0].documents).intersection(*(part.documents for part in parts))
    return [part if len(part.documents) == len(shared) else _reduced(part, shared) for part in parts]


def _reduced(part: Sample, documents: Collection[str]) -> Sample:
    kept = np.array([doc in documents for doc in part.documents])
    return replace(
        part,
        documents=tuple(doc for doc in part.documents if doc in documents),
        values=part.values[kept],
        means=part.means[kept],
        strata=(int(kept.sum()),),
    )


def averaged(parts: Sequence[Sample]) -> Sample:
    """The mean of several samples of the same documents: what a document scores over all of them."""
    first = parts[0]
    return replace(
        first,
        values=np.mean([part.values for part in parts], axis=0),
        means=np.mean([part.means for part in parts], axis=0),
        exact=first.exact and len(parts) == 1,
        seeds=frozenset(seed for part in parts for seed in part.seeds),
    )
