"""What answers cost: how long they are, how many were cut at the limit, how many are as the task asks for them; and
whether what an arm gained is only format.

Knows samples and records; nothing of tables or plots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rvdist.core.record import Record
from rvdist.report.statistics.intervals import mean_interval, share_interval, wilson
from rvdist.report.statistics.sample import Answers, Floats, Score, document_names


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
    lengths: list[float] = []
    cuts: list[float] = []
    formats: list[float] = []
    scores: list[float] = []
    for task in score.members or (score.task,):
        by_document: defaultdict[str, list[Record]] = defaultdict(list)
        records = answers.get((arm, task, score.filter), ())
        for record, name in zip(records, document_names(records), strict=True):
            by_document[name].append(record)
        for own in by_document.values():
            tokens = [count for record in own for count in record.tokens]
            ends = [end == "length" for record in own for end in record.finish]
            known = [record for record in own if record.in_format is not None]
            lengths += [float(np.mean(tokens))] if tokens else []
            cuts += [float(np.mean(ends))] if ends else []
            formats += [float(np.mean([bool(record.in_format) for record in known]))] if known else []
            scores += [record.metrics[score.metric] for record in known if record.in_format]
    return Cost(*_with_ends(lengths, mean_interval), *_share(cuts), *_share(formats), _mean(scores))


def _mean(numbers: Sequence[float]) -> float | None:
    return float(np.mean(numbers)) if numbers else None


def _share(shares: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The mean of documents' shares and its interval: Wilson's where each document's is 0 or 1."""
    if set(shares) <= {0.0, 1.0} and shares:
        return float(np.mean(shares)), *wilson(float(np.mean(shares)), len(shares))
    return _with_ends(shares, share_interval)


def _with_ends(
    numbers: Sequence[float], interval: Callable[[Floats, Floats, Sequence[int]], tuple[float, float]]
) -> tuple[float | None, float | None, float | None]:
    """The mean and its interval, without ends that nothing is known of."""
    if not numbers:
        return None, None, None
    low, high = interval(np.array(numbers), np.ones(len(numbers)), (len(numbers),))
    known = bool(np.isfinite([low, high]).all())
    return _mean(numbers), low if known else None, high if known else None


def shares_in_format(answers: Answers, arm: str, score: Score) -> dict[str, float]:
    """By document as a sample names it, how many of its answers are in the asked format; without those of which the
    records do not say."""
    found: dict[str, float] = {}
    for task in score.members or (score.task,):
        records = [one for one in answers.get((arm, task, score.filter), ()) if one.in_format is not None]
        own: defaultdict[str, list[bool]] = defaultdict(list)
        for record, name in zip(records, document_names(records), strict=True):
            own[name].append(bool(record.in_format))
        prefix = f"{task}/" if score.members else ""
        found |= {f"{prefix}{name}": float(np.mean(all_)) for name, all_ in own.items()}
    return found


def rest_of(differences: Floats, ours: Floats, theirs: Floats) -> Floats:
    """The differences of documents whose answers of both arms are alike in format; 0 where they are not."""
    rest: Floats = np.where(ours == theirs, differences, 0.0)
    return rest
