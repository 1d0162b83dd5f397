"""What answers cost: how long they are, how many were cut at the limit, and how many are as the task asks for them.

Knows samples and records; nothing of tables or plots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rvdist.core.record import Record
from rvdist.report.statistics.intervals import Floats, known, mean_interval, share_interval, wilson
from rvdist.report.statistics.sample import Answers, Score, document_names


@dataclass(frozen=True)
class Cost:
    """Of one arm's answers under one score: the mean of their tokens, the shares that were cut and that are in the
    asked format, each with its 95 % interval, and the mean score of the latter. None where the records do not say."""

    tokens: float | None = None
    tokens_ci_low: float | None = None
    tokens_ci_high: float | None = None
    cut: float | None = None
    cut_ci_low: float | None = None
    cut_ci_high: float | None = None
    in_format: float | None = None
    in_format_ci_low: float | None = None
    in_format_ci_high: float | None = None
    value_in_format: float | None = None


def cost(answers: Answers, arm: str, score: Score) -> Cost:
    """A document's completions, repeats and seeds count together as much as another's."""
    documents = dict(_by_document(answers, arm, score))
    tokens = [[count for record in own for count in record.tokens] for own in documents.values()]
    cuts = [[end == "length" for record in own for end in record.finish] for own in documents.values()]
    within = [record.metrics[score.metric] for own in documents.values() for record in own if record.in_format]
    return Cost(
        *_with_ends(_means(tokens), mean_interval),
        *_share(_means(cuts)),
        *_share(list(_in_format(documents.items()).values())),
        _mean(within),
    )


def _mean(numbers: Sequence[float]) -> float | None:
    return float(np.mean(numbers)) if numbers else None


def _means(of_documents: Iterable[Sequence[float]]) -> list[float]:
    return [float(np.mean(own)) for own in of_documents if own]


def _share(shares: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The mean of documents' shares and its interval: Wilson's where each document's is 0 or 1."""
    if shares and set(shares) <= {0.0, 1.0}:
        return float(np.mean(shares)), *wilson(float(np.mean(shares)), len(shares))
    return _with_ends(shares, share_interval)


def _with_ends(
    numbers: Sequence[float], interval: Callable[[Floats, Floats, Sequence[int]], tuple[float, float]]
) -> tuple[float | None, float | None, float | None]:
    """The mean and its interval, without ends that nothing is known of."""
    if not numbers:
        return None, None, None
    low, high = interval(np.array(numbers), np.ones(len(numbers)), (len(numbers),))
    return float(np.mean(numbers)), known(low), known(high)


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
