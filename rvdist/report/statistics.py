"""From samples to rows: intervals, differences to the baseline, and whether they are real.

Every comparison takes its interval, its p value and its verdict from one method (docs/statistics.md), so that
they cannot disagree. Knows nothing of files, tables or plots.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binomtest, norm, t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from rvdist.point import Arm
from rvdist.record import Record, TaskInfo
from rvdist.report.sample import Floats, Sample, Score, is_constant, sample, scores, sort_records, split
from rvdist.report.summary import LEVEL, GroupInfo, Outline, Row, baseline_of, write_summary

__all__ = [
    "Comparison",
    "GroupInfo",
    "Row",
    "baseline_of",
    "compare",
    "compare_differences",
    "compare_discordant",
    "detectable_effects",
    "holm",
    "minimal_detectable_effect",
    "summarise",
    "write_summary",
]

RESAMPLES = 9999
_FEW = 16  # documents a distinct score, from where on counting is faster than drawing: as measured
# The order statistic at which the bootstrap interval ends: with the add-one p value 2(1+k)/(RESAMPLES+1),
# p < LEVEL exactly when fewer than TAIL resamples lie on the far side of zero.
TAIL = int(LEVEL / 2 * (RESAMPLES + 1)) - 1


@dataclass(frozen=True)
class Comparison:
    """A paired difference. The interval excludes zero exactly when `p_value` < 0.05; NaN: unknown."""

    delta: float
    low: float
    high: float
    p_value: float

    def verdict(self, higher_is_better: bool) -> str:
        if self.p_value >= LEVEL:
            return "no detectable difference"
        return "better" if (self.delta > 0) == higher_is_better else "worse"


def summarise(
    arms: Sequence[Arm],
    records: Iterable[Record],
    tasks: Sequence[TaskInfo],
    baseline: str | None,
    groups: Sequence[GroupInfo] = (),
    seed: int = 0,
) -> list[Row]:
    """One row for each (task or group, metric, filter, arm), in that order, a group before its members; records of
    other arms or tasks are left out.

    `seed` is the bootstrap's. Raises ValueError when an arm was not scored on the documents of the
    baseline, or a score is not a finite number.
    """
    if baseline is not None and baseline not in {arm.name for arm in arms}:
        raise ValueError(f"the baseline {baseline!r} is none of the arms {[arm.name for arm in arms]}")
    answers = sort_records(records)
    rows = []
    for score in scores(tasks, groups):
        samples = {arm.name: sample(answers, arm.name, score) for arm in arms}
        for arm in arms:
            row = _row(arm, score, samples[arm.name], seed)
            if baseline is not None and arm.name != baseline:
                _check_same_documents(score.task, arm.name, samples[arm.name], baseline, samples[baseline])
                found = compare(samples[arm.name], samples[baseline], seed)
                row = replace(
                    row,
                    delta=found.delta,
                    delta_ci_low=known(found.low),
                    delta_ci_high=known(found.high),
                    p_value=found.p_value,
                    verdict=found.verdict(score.higher_is_better),
                )
            rows.append(row)
    return _adjusted(rows, Outline([task.name for task in tasks], groups))


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


def detectable_effects(
    records: Iterable[Record], tasks: Sequence[TaskInfo], baseline: str, groups: Sequence[GroupInfo] = ()
) -> dict[str, float]:
    """For each task with a 0/1 primary score, and each group of such that is weighted by size: the minimal detectable
    effect at the mean discordance between the baseline and the other arms (documents are compared by their first
    record)."""
    primary = {task.name: task.primary for task in tasks}
    first: defaultdict[str, defaultdict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        metric, filter_ = primary.get(record.task, ("", ""))
        if record.filter == filter_ and metric in record.metrics:
            first[record.task][record.arm].setdefault(record.doc, float(record.metrics[metric]))
    sizes, changed = {}, {}
    for task, by_arm in first.items():
        reference = by_arm.pop(baseline, {})
        pairs = [(reference[doc], score) for docs in by_arm.values() for doc, score in docs.items() if doc in reference]
        if pairs and all(score in (0.0, 1.0) for pair in pairs for score in pair):
            sizes[task] = len(reference)
            changed[task] = [a != b for a, b in pairs]
    for group in groups:
        members = [name for name in group.tasks if name in primary]
        if group.by_size and members and all(name in sizes for name in members):
            sizes[group.name] = sum(sizes[name] for name in members)
            changed[group.name] = [pair for name in members for pair in changed[name]]
    return {name: minimal_detectable_effect(n, float(np.mean(changed[name]))) for name, n in sizes.items()}


def _check_same_documents(task: str, arm: str, sample: Sample, baseline: str, reference: Sample) -> None:
    ours, theirs = set(sample.documents), set(reference.documents)
    if ours != theirs:
        raise ValueError(
            f"arm {arm!r} and the baseline {baseline!r} were not scored on the same documents of task {task!r}: "
            f"{len(theirs - ours)} are missing in the arm and {len(ours - theirs)} in the baseline"
        )


def _row(arm: Arm, score: Score, sample: Sample, seed: int) -> Row:
    x = sample.values
    low, high = _score_interval(sample, seed)
    return Row(
        arm=arm.name,
        point=sample.point,
        alpha=arm.alpha,
        prompt=arm.prompt,
        task=score.task,
        metric=score.metric,
        filter=score.filter,
        primary=score.primary,
        higher_is_better=score.higher_is_better,
        seed=next(iter(sample.seeds)) if len(sample.seeds) == 1 else None,
        value=sample.score,
        stderr=_stderr(sample),
        ci_low=known(low),
        ci_high=known(high),
        n=len(x),
    )


def _stderr(sample: Sample) -> float | None:
    n = len(sample.values)
    if n == 1:
        return None
    return math.sqrt(sum(part.var(ddof=1) * len(part) for part in split(sample.values, sample.strata))) / n


def _score_interval(sample: Sample, seed: int) -> tuple[float, float]:
    n, alike = len(sample.values), sample.alike
    if sample.exact or (sample.bound is not None and alike):
        # Documents that all score alike do not vary in a bootstrap either: each counts as one observation.
        low, high = proportion_confint(sample.score * n, n, LEVEL, method="wilson")
        return min(float(low), sample.score), max(float(high), sample.score)  # of 12 in 12 it ends a rounding below 1
    if alike:
        return math.nan, math.nan
    resampled = _bootstrap_means(sample.values, sample.strata, n, seed)
    low, high = float(resampled[TAIL - 1]), float(resampled[-TAIL])
    return (max(low, 0.0), min(high, 1.0)) if sample.bound is not None else (low, high)


def compare(sample: Sample, reference: Sample, seed: int = 0) -> Comparison:
    """Two samples of the same documents."""
    differences = sample.values - reference.values
    if sample.exact and reference.exact:
        return compare_discordant(int((differences > 0).sum()), int((differences < 0).sum()), len(differences))
    bound = None if sample.bound is None or reference.bound is None else max(sample.bound, reference.bound)
    return compare_differences(differences, sample.strata, bound, 1.0, seed)


def compare_differences(
    differences: Floats, strata: Sequence[int], bound: float | None, most: float = math.inf, seed: int = 0
) -> Comparison:
    """Whether differences of documents, in `strata`, are zero in the mean: by bootstrap. `bound` is what one document
    can change at most, `most` what the mean can; both count only where `bound` is known."""
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if better + worse < 2 or is_constant(differences, strata):
        # Nothing for a bootstrap to resample: only the signs are evidence, each change as large as it could be.
        size = bound or float(np.abs(differences).max()) or math.nan
        signs = compare_discordant(better, worse, len(differences))
        low, high, p_value = signs.low * size, signs.high * size, signs.p_value
    else:
        # Documents that did not change say nothing about the direction, so they earn no degrees of freedom.
        resampled = _bootstrap_means(differences, strata, better + worse, seed)
        beyond = min((resampled <= 0).sum(), (resampled >= 0).sum())
        low, high = float(resampled[TAIL - 1]), float(resampled[-TAIL])
        p_value = min(1.0, 2 * (1 + int(beyond)) / (RESAMPLES + 1))
    if bound is not None:
        low, high = max(low, -most), min(high, most)
    return Comparison(float(differences.mean()), low, high, p_value)


def _bootstrap_means(values: Floats, strata: Sequence[int], informative: int, seed: int) -> Floats:
    """The sorted bootstrap distribution of the mean, each stratum drawn by itself, stretched about the mean as
    Student's t is wider than the normal (Hesterberg 2015, the expanded percentile interval), or few documents would
    look too sure. A stratum of n documents is stretched by √(n/(n − 1)) more, relative to all (Rao and Wu 1988)."""
    n = len(values)
    rng = np.random.default_rng(seed)
    deviations = np.zeros(RESAMPLES)
    variances, freedoms = [], []
    for part in split(values, strata):
        size = len(part)
        small = math.sqrt((n - 1) / n * size / (size - 1)) if size > 1 else 1.0
        deviations += small * size / n * (_resampled_means(part, rng) - part.mean())
        variances.append(part.var() * size)
        freedoms.append(max(1, size - 1))
    freedom = sum(variances) ** 2 / sum(v * v / f for v, f in zip(variances, freedoms, strict=True))  # Satterthwaite
    stretch = t.ppf(1 - LEVEL / 2, min(informative - 1, freedom)) / norm.ppf(1 - LEVEL / 2)
    stretch *= math.sqrt(informative / (informative - 1))
    return np.sort(values.mean() + stretch * deviations)


def _resampled_means(values: Floats, rng: np.random.Generator) -> Floats:
    """The means of RESAMPLES draws with replacement, not sorted."""
    distinct, counts = np.unique(values, return_counts=True)
    n = len(values)
    # Scores that take few values are drawn by how often each comes up, which is the same and much faster.
    few = n > _FEW * len(distinct)
    batch = max(1, 2_000_000 // (len(distinct) if few else n))
    sizes = [min(batch, RESAMPLES - start) for start in range(0, RESAMPLES, batch)]
    if few:
        return np.concatenate([rng.multinomial(n, counts / n, size=size) @ distinct / n for size in sizes])
    return np.concatenate([values[rng.integers(n, size=(size, n))].mean(axis=1) for size in sizes])


def _clopper_pearson(count: int, n: int) -> tuple[float, float]:
    if n == 0:
        return 0.0, 1.0
    low, high = proportion_confint(count, n, LEVEL, method="beta")
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for their number."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def _adjusted(rows: list[Row], outline: Outline) -> list[Row]:
    """Each table is a family of its own, so that looking at more does not weaken the claims of the main one: the
    primary scores of benchmarks, those of edited questions, those of a group's members, and all other scores."""
    families: defaultdict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row.p_value is not None:
            edited, benchmark = outline.original(row.task), outline.is_benchmark(row.task)
            table = "edited" if edited else "benchmarks" if benchmark else "members"
            families[table if row.primary else "others"].append(i)
    for family in families.values():
        for i, p in zip(family, holm([rows[i].p_value or 0.0 for i in family]), strict=True):
            rows[i] = replace(rows[i], p_adjusted=p)
    return rows


def known(number: float) -> float | None:
    """The number, None where nothing is known of it."""
    return number if math.isfinite(number) else None
