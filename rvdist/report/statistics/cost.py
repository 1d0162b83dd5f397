"""What answers cost: how long they are, how many were cut at the limit, and how many are as the task asks for them.

Knows samples and records; nothing of tables or plots.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rvdist.core.record import Record
from rvdist.report.statistics.intervals import known, mean_interval
from rvdist.report.statistics.sample import Answers, Score, document_names


@dataclass(frozen=True)
class Cost:
    """Of one arm's answers under one score: the mean of their tokens with its 95 % interval, the shares that were cut
    and that are in the asked format, and the mean score of the latter. None where the records do not say."""

    tokens: float | None = None
    tokens_ci_low: float | None = None
    tokens_ci_high: float | None = None
    cut: float | None = None
    in_format: float | None = None
    value_in_format: float | None = None


def cost(answers: Answers, arm: str, score: Score) -> Cost:
    """A document's completions, repeats and seeds count together as much as another's."""
    documents = dict(_by_document(answers, arm, score))
    tokens = [[count for record in own for count in record.tokens] for own in documents.values()]
    cuts = [[end == "length" for record in own for end in record.finish] for own in documents.values()]
    lengths = [float(np.mean(own)) for own in tokens if own]
    low, high = math.nan, math.nan
    if lengths:
        low, high = mean_interval(np.array(lengths), np.ones(len(lengths)), (len(lengths),))
    within = [record for own in documents.values() for record in own if record.in_format]
    return Cost(
        tokens=_mean(lengths),
        tokens_ci_low=known(low),
        tokens_ci_high=known(high),
        cut=_mean([float(np.mean(own)) for own in cuts if own]),
        in_format=_mean(list(_in_format(documents.items()).values())),
        value_in_format=_mean([record.metrics[score.metric] for record in within]),
    )


def shares_in_format(answers: Answers, arm: str, score: Score) -> dict[str, float]:
    """By document as a sample names it, how many of its answers are in the asked format; without those of which the
    records do not say."""
    return _in_format(_by_document(answers, arm, score))


def _by_document(answers: Answers, arm: str, score: Score) -> Iterator[tuple[str, list[Record]]]:
    """An arm's records of each document, as a sample names it."""
    for task in score.members or (score.task,):
        records = answers.get((arm, task, score.filter), ())
        own: defaultdict[str, list[Record]] = defaultdict(list)
        for record, name in zip(records, document_names(records), strict=True):
            own[f"{task}/{name}" if score.members else name].append(record)
        yield from own.items()


def _in_format(documents: Iterable[tuple[str, list[Record]]]) -> dict[str, float]:
    said = {name: [one.in_format for one in own if one.in_format is not None] for name, own in documents}
    return {name: float(np.mean(own)) for name, own in said.items() if own}


def _mean(numbers: Sequence[float]) -> float | None:
    return float(np.mean(numbers)) if numbers else None
