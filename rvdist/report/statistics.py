"""From records to rows: scores, differences to the baseline, and whether they are real.

The document is the unit: repeats of a document are summed before anything else is computed. Every
comparison takes its interval, its p value and its verdict from one method (docs/statistics.md), so that
they cannot disagree. Knows nothing of files, tables or plots.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from rvdist.point import Arm
from rvdist.record import Record, TaskInfo
from rvdist.report.summary import LEVEL, Row, baseline_of, write_summary

__all__ = [
    "Comparison",
    "Row",
    "baseline_of",
    "compare_discordant",
    "detectable_effects",
    "minimal_detectable_effect",
    "summarise",
    "write_summary",
]

RESAMPLES = 9999
# The order statistic at which the bootstrap interval ends: with the add-one p value 2(1+k)/(RESAMPLES+1),
# p < LEVEL exactly when fewer than TAIL resamples lie on the far side of zero.
TAIL = int(LEVEL / 2 * (RESAMPLES + 1)) - 1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A paired difference. The interval excludes zero exactly when `p_value` < 0.05; NaN: unknown."""

    delta: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Sample:
    """One arm's answers to one task under one metric, summed by document."""

    documents: tuple[str, ...]
    sums: Floats
    counts: Floats
    binary: bool
    point: str
    seeds: frozenset[int]

    @property
    def contributions(self) -> Floats:
        """One number a document, whose mean is the mean over all records."""
        return self.sums / float(self.counts.mean())

    @property
    def single(self) -> bool:
        """0/1, one record a document: the case with exact methods."""
        return self.binary and bool((self.counts == 1).all())


def summarise(
    arms: Sequence[Arm], records: Iterable[Record], tasks: Sequence[TaskInfo], baseline: str | None, seed: int = 0
) -> list[Row]:
    """One row for each (task, metric, filter, arm), in that order; records of other arms or tasks are left out.

    `seed` is the bootstrap's. Raises ValueError when an arm was not scored on the documents of the
    baseline, or a score is not a finite number.
    """
    if baseline is not None and baseline not in {arm.name for arm in arms}:
        raise ValueError(f"the baseline {baseline!r} is none of the arms {[arm.name for arm in arms]}")
    answers: defaultdict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        answers[record.arm, record.task, record.filter].append(record)
    rows = []
    for task in tasks:
        for metric, filter_ in task.metrics:
            samples = {
                arm.name: _sample(answers[arm.name, task.name, filter_], arm.name, task.name, metric, filter_)
                for arm in arms
            }
            for arm in arms:
                sample = samples[arm.name]
                row = _score(arm, task, metric, filter_, sample, seed)
                if baseline is not None and arm.name != baseline:
                    _check_same_documents(task.name, arm.name, sample, baseline, samples[baseline])
                    row = _with_comparison(row, _compare(sample, samples[baseline], seed))
                rows.append(row)
    return _holm(rows)


def compare_discordant(better: int, worse: int, n: int) -> Comparison:
    """The exact McNemar test of n pairs, of which `better` and `worse` changed their 0/1 score, and its interval.

    δ = π(2φ − 1), where π is the share of discordant pairs and φ the share of those that got better. The
    test asks whether φ = ½; Clopper-Pearson's interval for φ excludes ½ exactly when it rejects. Each
    end takes the end of π's Clopper-Pearson interval that lies farther out, which cannot change its sign.
    """
    discordant = better + worse
    share = _clopper_pearson(discordant, n)
    tilts = [2 * phi - 1 for phi in _clopper_pearson(better, discordant)]
    return Comparison(
        delta=(better - worse) / n,
        low=tilts[0] * share[0 if tilts[0] > 0 else 1],
        high=tilts[1] * share[1 if tilts[1] > 0 else 0],
        p_value=float(binomtest(better, discordant, 0.5).pvalue) if discordant else 1.0,
    )


def minimal_detectable_effect(n: int, discordance: float, power: float = 0.8) -> float:
    """The smallest true difference that n pairs show at the 5 % level with this power (Connor 1987),
    when the share `discordance` of the pairs is discordant, or more of them if the difference needs it."""
    z, z_power = norm.ppf(1 - LEVEL / 2), norm.ppf(power)
    if n <= z**2:
        return 1.0
    root = (z * math.sqrt(n) + z_power * math.sqrt(n + z_power**2 - z**2)) / (n + z_power**2)
    return float(min(1.0, max(math.sqrt(discordance) * root, root**2)))


def detectable_effects(records: Iterable[Record], tasks: Sequence[TaskInfo], baseline: str) -> dict[str, float]:
    """For each task with a 0/1 primary score: the minimal detectable effect at the mean discordance
    between the baseline and the other arms (documents are compared by their first record)."""
    primary = {task.name: task.primary for task in tasks}
    scores: defaultdict[str, defaultdict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        metric, filter_ = primary.get(record.task, ("", ""))
        if record.filter == filter_ and metric in record.metrics:
            scores[record.task][record.arm].setdefault(record.doc, float(record.metrics[metric]))
    effects = {}
    for task, by_arm in scores.items():
        reference = by_arm.pop(baseline, {})
        pairs = [(reference[doc], score) for docs in by_arm.values() for doc, score in docs.items() if doc in reference]
        if pairs and all(score in (0.0, 1.0) for pair in pairs for score in pair):
            effects[task] = minimal_detectable_effect(len(reference), float(np.mean([a != b for a, b in pairs])))
    return effects


def _sample(records: Sequence[Record], arm: str, task: str, metric: str, filter_: str) -> Sample:
    if not records:
        raise ValueError(f"arm {arm!r} has no record of task {task!r} under the filter {filter_!r}")
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        score = float(record.metrics.get(metric, math.nan))
        if not math.isfinite(score):
            raise ValueError(f"arm {arm!r} has no finite {metric!r} for document {record.doc_id} of task {task!r}")
        scores[record.doc].append(score)
    points = {record.point for record in records}
    if len(points) > 1:
        raise ValueError(f"the records of arm {arm!r} come from {len(points)} weight points, not one")
    documents = tuple(sorted(scores))
    return Sample(
        documents=documents,
        sums=np.array([math.fsum(scores[doc]) for doc in documents]),
        counts=np.array([float(len(scores[doc])) for doc in documents]),
        binary=all(score in (0.0, 1.0) for doc in documents for score in scores[doc]),
        point=points.pop(),
        seeds=frozenset(record.seed for record in records),
    )


def _check_same_documents(task: str, arm: str, sample: Sample, baseline: str, reference: Sample) -> None:
    ours, theirs = set(sample.documents), set(reference.documents)
    if ours != theirs:
        raise ValueError(
            f"arm {arm!r} and the baseline {baseline!r} were not scored on the same documents of task {task!r}: "
            f"{len(theirs - ours)} are missing in the arm and {len(ours - theirs)} in the baseline"
        )


def _score(arm: Arm, task: TaskInfo, metric: str, filter_: str, sample: Sample, seed: int) -> Row:
    x = sample.contributions
    low, high = _score_interval(sample, seed)
    return Row(
        arm=arm.name,
        point=sample.point,
        alpha=arm.alpha,
        prompt=arm.prompt,
        task=task.name,
        metric=metric,
        filter=filter_,
        primary=(metric, filter_) == task.primary,
        higher_is_better=task.higher_is_better.get(metric, True),
        seed=next(iter(sample.seeds)) if len(sample.seeds) == 1 else None,
        value=float(x.mean()),
        stderr=float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None,
        ci_low=_known(low),
        ci_high=_known(high),
        n=len(x),
    )


def _score_interval(sample: Sample, seed: int) -> tuple[float, float]:
    n = len(sample.documents)
    means = sample.sums / sample.counts
    varies = bool((means != means[0]).any())
    if sample.single or (sample.binary and not varies):
        # Documents that all score alike do not vary in a bootstrap either: each counts as one observation.
        low, high = proportion_confint(means.sum(), n, LEVEL, method="wilson")
        mean = float(means.mean())
        return min(float(low), mean), max(float(high), mean)  # of 12 in 12 it ends a rounding below 1
    if not varies:
        return math.nan, math.nan
    resampled = _bootstrap_means(sample.contributions, n, seed)
    low, high = float(resampled[TAIL - 1]), float(resampled[-TAIL])
    return (max(low, 0.0), min(high, 1.0)) if sample.binary else (low, high)


def _compare(sample: Sample, reference: Sample, seed: int) -> Comparison:
    n = len(sample.documents)
    differences = sample.contributions - reference.contributions
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    binary = sample.binary and reference.binary
    if sample.single and reference.single:
        return compare_discordant(better, worse, n)
    if better + worse < 2 or (differences == differences[0]).all():
        # Nothing for a bootstrap to resample: only the signs are evidence, each change as large as it could be.
        size = 1.0 if binary else float(np.abs(differences).max()) or math.nan
        signs = compare_discordant(better, worse, n)
        return Comparison(float(differences.mean()), signs.low * size, signs.high * size, signs.p_value)
    # Documents that did not change say nothing about the direction, so they earn no degrees of freedom.
    resampled = _bootstrap_means(differences, better + worse, seed)
    beyond = min((resampled <= 0).sum(), (resampled >= 0).sum())
    low, high = float(resampled[TAIL - 1]), float(resampled[-TAIL])
    return Comparison(
        delta=float(differences.mean()),
        low=max(low, -1.0) if binary else low,
        high=min(high, 1.0) if binary else high,
        p_value=min(1.0, 2 * (1 + int(beyond)) / (RESAMPLES + 1)),
    )


def _bootstrap_means(values: Floats, informative: int, seed: int) -> Floats:
    """The sorted bootstrap distribution of the mean, stretched about the mean as Student's t is wider than
    the normal (Hesterberg 2015, the expanded percentile interval), or few documents would look too sure."""
    # Scores take few distinct values: drawing how often each one comes up is the same and much faster.
    distinct, counts = np.unique(values, return_counts=True)
    n = len(values)
    rng = np.random.default_rng(seed)
    batch = max(1, 2_000_000 // len(distinct))
    means = np.concatenate(
        [
            rng.multinomial(n, counts / n, size=min(batch, RESAMPLES - start)) @ distinct / n
            for start in range(0, RESAMPLES, batch)
        ]
    )
    stretch = t.ppf(1 - LEVEL / 2, informative - 1) / norm.ppf(1 - LEVEL / 2)
    stretch *= math.sqrt(informative / (informative - 1))
    centre = values.mean()
    return np.sort(centre + stretch * (means - centre))


def _clopper_pearson(count: int, n: int) -> tuple[float, float]:
    if n == 0:
        return 0.0, 1.0
    low, high = proportion_confint(count, n, LEVEL, method="beta")
    return float(low), float(high)


def _with_comparison(row: Row, comparison: Comparison) -> Row:
    verdict = "no detectable difference"
    if comparison.p_value < LEVEL:
        verdict = "better" if (comparison.delta > 0) == row.higher_is_better else "worse"
    return replace(
        row,
        delta=comparison.delta,
        delta_ci_low=_known(comparison.low),
        delta_ci_high=_known(comparison.high),
        p_value=comparison.p_value,
        verdict=verdict,
    )


def _holm(rows: list[Row]) -> list[Row]:
    """Correct the primary scores as one family and all others as a second, so that looking at more metrics
    does not weaken the claims the table is about."""
    for primary in (True, False):
        family = [i for i, row in enumerate(rows) if row.primary == primary and row.p_value is not None]
        if family:
            adjusted = multipletests([rows[i].p_value for i in family], method="holm")[1]
            for i, p in zip(family, adjusted, strict=True):
                rows[i] = replace(rows[i], p_adjusted=float(p))
    return rows


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None
