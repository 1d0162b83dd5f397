"""From records to samples: one number a document, whose mean is the score.

Repeats and seeds of a document are averaged here, tasks are joined to groups here, and nothing is inferred here.
Knows nothing of intervals, files or tables.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rvdist.core.record import Record, TaskInfo
from rvdist.report.statistics.intervals import Floats, split
from rvdist.report.summary import GroupInfo, Outline

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

    `documents` are named by content and, where the same is there again, by which of them it is. `values` are their own
    scores, `weights` (1 in the mean) what each counts in the score: of a pooled metric as much as it is long. `strata`
    counts the documents of one stratum after the other: a task is one, a group has one for each member. `shares` is
    whether every record scores 0 or 1; `exact` is that with one record a document and one stratum: the case with exact
    methods.
    """

    documents: tuple[str, ...]
    values: Floats
    weights: Floats
    strata: tuple[int, ...]
    exact: bool
    shares: bool
    point: str
    seeds: frozenset[int]

    @property
    def score(self) -> float:
        """The mean over documents; of a group the weighted mean of its members'."""
        return float((self.values * self.weights).mean())

    @property
    def steady(self) -> tuple[Floats, Floats]:
        """Values and weights of the same score, as sure as this, where all documents of a stratum weigh the same: what
        a pooled metric's ratio of sums is in the first order (Cochran 1977, chapter 6)."""
        values, weights = [], []
        for own, weight in zip(split(self.values, self.strata), split(self.weights, self.strata), strict=True):
            mean = float(weight.mean())
            ratio = float((own * weight).mean()) / mean
            values.append(own if (weight == weight[0]).all() else ratio + weight / mean * (own - ratio))
            weights.append(np.full(len(own), mean))
        return np.concatenate(values), np.concatenate(weights)


def round_off(differences: Floats, *of: Floats) -> Floats:
    """Differences of numbers like those of `of`, to twelve digits of the largest: 0.3 less 0.1 + 0.2 is zero."""
    scale = max(float(np.abs(values).max()) for values in of)
    return np.round(differences, 12 - math.ceil(math.log10(scale))) + 0.0 if scale else differences


def sort_records(records: Iterable[Record]) -> Answers:
    """Records by (arm, task, filter), in their order."""
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
                by_size = group.by_size != (pair in group.otherwise)
                yield Score(group.name, *pair, pair == group.metrics[0], better, members, by_size)
        for pair in task.metrics:
            yield Score(task.name, *pair, pair == task.primary, task.higher_is_better.get(pair[0], True))


def benchmark_scores(tasks: Sequence[TaskInfo], groups: Sequence[GroupInfo] = ()) -> list[Score]:
    """The primary scores of tasks and groups that stand for themselves."""
    outline = Outline([task.name for task in tasks], groups)
    return [score for score in scores(tasks, groups) if score.primary and outline.is_benchmark(score.task)]


def sample(answers: Answers, arm: str, score: Score) -> Sample:
    """Raises ValueError where there is no record, a score that is no finite number, or more than one weight point."""
    if score.members:
        parts = [_task_sample(answers, arm, member, score.metric, score.filter) for member in score.members]
        return _join(parts, score)
    return _task_sample(answers, arm, score.task, score.metric, score.filter)


def _task_sample(answers: Answers, arm: str, task: str, metric: str, filter_: str) -> Sample:
    records = answers.get((arm, task, filter_))
    if not records:
        raise ValueError(f"arm {arm!r} has no record of task {task!r} under the filter {filter_!r}")
    scores: defaultdict[str, list[float]] = defaultdict(list)
    weights: dict[str, float] = {}
    for record, place in zip(records, document_names(records), strict=True):
        value = float(record.metrics.get(metric, math.nan))
        if not math.isfinite(value):
            raise ValueError(f"arm {arm!r} has no finite {metric!r} for document {record.doc_id} of task {task!r}")
        scores[place].append(value)
        weights[place] = record.weights.get(metric, 1.0)
    points = {record.point for record in records}
    if len(points) > 1:
        raise ValueError(f"the records of arm {arm!r} come from {len(points)} weight points, not one")
    documents = tuple(sorted(scores))
    binary = all(value in (0.0, 1.0) for own in scores.values() for value in own)
    counts = np.array([weights[doc] for doc in documents])
    return Sample(
        documents=documents,
        values=np.array([math.fsum(scores[doc]) / len(scores[doc]) for doc in documents]),
        weights=_normal(counts) if counts.any() else np.ones(len(documents)),
        strata=(len(documents),),
        exact=binary and all(len(own) == 1 for own in scores.values()),
        shares=binary,
        point=points.pop(),
        seeds=frozenset(record.seed for record in records),
    )


def document_names(records: Sequence[Record]) -> list[str]:
    """What each record's document is called, alike in every arm and in every edit of a task: by its contents, and by
    which of those with the same it is."""
    places: defaultdict[str, set[int]] = defaultdict(set)
    for record in records:
        places[record.doc].add(record.doc_id)
    again = {
        (doc, doc_id): f"{doc} ({number})"
        for doc, ids in places.items()
        if len(ids) > 1
        for number, doc_id in enumerate(sorted(ids))
        if number
    }
    return [again.get((record.doc, record.doc_id), record.doc) for record in records]


def _normal(weights: Floats) -> Floats:
    """With a mean of 1, and none so small that what is divided by it is no number."""
    normal: Floats = np.maximum(weights / weights.mean(), 1e-9)
    return normal


def _join(parts: Sequence[Sample], score: Score) -> Sample:
    total = sum(len(part.documents) for part in parts)
    pieces: list[tuple[int, str, Sample, float]] = []
    for name, part in zip(score.members, parts, strict=True):
        weight = 1.0 if score.by_size else total / (len(parts) * len(part.documents))
        pieces.append((len(part.documents), name, part, weight))
    pieces.sort(key=lambda piece: piece[:2])
    return Sample(
        documents=tuple(f"{name}/{doc}" for _, name, part, _ in pieces for doc in part.documents),
        values=np.concatenate([part.values for _, _, part, _ in pieces]),
        weights=np.concatenate([part.weights * weight for _, _, part, weight in pieces]),
        strata=tuple(size for size, *_ in pieces),
        exact=False,
        shares=all(part.shares for part in parts),
        point=parts[0].point,
        seeds=frozenset(seed for part in parts for seed in part.seeds),
    )


def common(parts: Sequence[Sample]) -> list[Sample]:
    """The samples of a task and its like, each reduced to the documents that all of them have."""
    shared = set(parts[0].documents).intersection(*(part.documents for part in parts))
    return [part if len(part.documents) == len(shared) else _reduce(part, shared) for part in parts]


def _reduce(part: Sample, documents: Collection[str]) -> Sample:
    kept = np.array([doc in documents for doc in part.documents])
    return replace(
        part,
        documents=tuple(doc for doc in part.documents if doc in documents),
        values=part.values[kept],
        weights=_normal(part.weights[kept]),
        strata=(int(kept.sum()),),
    )


def average(parts: Sequence[Sample]) -> Sample:
    """The mean of several samples of the same documents: what a document scores over all of them."""
    return replace(
        parts[0],
        values=np.mean([part.values for part in parts], axis=0),
        exact=False,
        seeds=frozenset(seed for part in parts for seed in part.seeds),
    )
