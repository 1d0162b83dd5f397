"""From samples to rows: intervals, differences to the baseline, and whether they are real.

Every comparison takes its interval, its p value and its verdict from one method (docs/statistics.md), so that
they cannot disagree. Knows nothing of files, tables or plots.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy.stats import binomtest, norm, t
from statsmodels.stats.proportion import proportion_confint

from rvdist.core.point import Arm
from rvdist.core.record import Record, TaskInfo
from rvdist.report.statistics.cost import Cost, cost, shares_in_format
from rvdist.report.statistics.flips import FEW, lattice, least_shift, subset_ends, tails
from rvdist.report.statistics.intervals import PRIOR, Floats, known, mean_interval, share_interval, split, wilson
from rvdist.report.statistics.sample import Sample, Score, round_off, sample, scores, sort_records
from rvdist.report.summary import LEVEL, MARGIN, UNITS, GroupInfo, Outline, Row

UNDETECTED = "no detectable difference"
EQUIVALENT = "equivalent"  # whatever it is, it is within the margin
UNSEEN = "cannot be seen"  # the baseline leaves no room for what is looked for
SEEN = 6  # documents that must change before any test can see it: flipping five signs alike leaves p = 1/16


@dataclass(frozen=True)
class Comparison:
    """A paired difference. The interval excludes zero exactly when `p_value` < 0.05; NaN: unknown."""

    delta: float
    low: float
    high: float
    p_value: float

    def verdict(self, higher_is_better: bool) -> str:
        """better, worse, or no detectable difference."""
        if self.p_value >= LEVEL:
            return UNDETECTED
        return "better" if (self.delta > 0) == higher_is_better else "worse"


def summarise(
    arms: Sequence[Arm],
    records: Iterable[Record],
    tasks: Sequence[TaskInfo],
    baseline: str | None,
    groups: Sequence[GroupInfo] = (),
    margin: float = MARGIN,
) -> list[Row]:
    """One row for each (task or group, metric, filter, arm), in that order, a group before its members; records of
    other arms or tasks are left out. A change of a share is equivalent to none within the `margin`.

    Raises ValueError when an arm was not scored on the documents of the baseline, or a score is not a finite number.
    """
    if baseline is not None and baseline not in {arm.name for arm in arms}:
        raise ValueError(f"the baseline {baseline!r} is none of the arms {[arm.name for arm in arms]}")
    answers = sort_records(records)
    rows = []
    for score in scores(tasks, groups):
        samples = {arm.name: sample(answers, arm.name, score) for arm in arms}
        for arm in arms:
            row = _row(arm, score, samples[arm.name], cost(answers, arm.name, score))
            if baseline is not None and arm.name != baseline:
                _check_same_documents(score.task, arm.name, samples[arm.name], baseline, samples[baseline])
                comparison = compare(samples[arm.name], samples[baseline])
                reference = samples[baseline]
                row = replace(
                    row,
                    delta=comparison.delta,
                    delta_ci_low=known(comparison.low),
                    delta_ci_high=known(comparison.high),
                    p_value=comparison.p_value,
                    verdict_alone=comparison.verdict(score.higher_is_better),
                    margin=margin if _is_share(score, samples[arm.name], reference) else None,
                    unseen=_unseen(samples[arm.name], reference, (arm.alpha or 0.0) >= 0, score.higher_is_better),
                )
            rows.append(row)
    return _adjust(rows, Outline([task.name for task in tasks], groups))


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


def minimal_detectable_effect(
    n: int, square: float, size: float = 1.0, power: float = 0.8, level: float = LEVEL
) -> float:
    """The smallest true difference that n pairs show at the `level` with this power, after Connor (1987): `square` is
    the mean squared difference of a pair (of 0/1 scores the share that is discordant), `size` what a changed pair
    differs by; more pairs change if the difference needs it."""
    z, z_power = norm.ppf(1 - level / 2), norm.ppf(power)
    if n <= z**2:
        return size
    root = (z * math.sqrt(n) + z_power * math.sqrt(n + z_power**2 - z**2)) / (n + z_power**2)
    return float(min(size, max(math.sqrt(square) * root, size * root**2)))


def detectable_effects(
    arms: Sequence[Arm],
    records: Iterable[Record],
    tasks: Sequence[TaskInfo],
    baseline: str,
    groups: Sequence[GroupInfo] = (),
    level: float = LEVEL,
) -> dict[tuple[str, str], float]:
    """The minimal detectable effect of each comparison of primary scores with the baseline at the `level`, by task or
    group and arm; without those whose documents of an unbounded score did not change."""
    answers = sort_records(records)
    effects = {}
    for score in [score for score in scores(tasks, groups) if score.primary]:
        reference = sample(answers, baseline, score)
        for arm in [arm for arm in arms if arm.name != baseline]:
            differences = _differences(ours := sample(answers, arm.name, score), reference)
            squares, sizes = differences**2, np.abs(differences)
            if sizes.any() or (ours.shares and reference.shares):
                size = float(squares.sum() / sizes.sum()) if sizes.any() else 1.0
                effect = minimal_detectable_effect(len(sizes), float(squares.mean()), size, level=level)
                more, _ = _hidden_variance(differences, ours.weights, ours.strata)
                effects[score.task, arm.name] = effect * math.sqrt(more)
    return effects


@dataclass(frozen=True)
class FormatGain:
    """A difference to the baseline beside another share of answers in the asked format. `rest` is what is left of it
    without the documents whose answers are in the format with one arm and not with the other; `only`: what is left is
    none that matters."""

    task: str
    arm: str
    before: float
    after: float
    rest: Comparison
    only: bool


def format_gains(
    rows: Sequence[Row],
    records: Iterable[Record],
    tasks: Sequence[TaskInfo],
    baseline: str,
    groups: Sequence[GroupInfo] = (),
) -> list[FormatGain]:
    """Of the primary scores that differ from the baseline's after correction while the format does too, in the same
    direction, those of which it cannot be told that more than format changed."""
    answers = sort_records(records)
    own = {score.task: score for score in scores(tasks, groups) if score.primary}
    found = []
    for row in rows:
        if row.verdict not in ("better", "worse") or row.margin is None or row.task not in own:
            continue
        score = own[row.task]
        ours, theirs = sample(answers, row.arm, score), sample(answers, baseline, score)
        formats = [shares_in_format(answers, arm, score) for arm in (row.arm, baseline)]
        if any(set(ours.documents) - shares.keys() for shares in formats):
            continue
        after, before = (np.array([shares[doc] for doc in ours.documents]) for shares in formats)
        changed = compare_differences(round_off(after - before, after, before), np.ones(len(after)), (len(after),), 1.0)
        if changed.p_value < LEVEL and (changed.delta > 0) == ((row.delta or 0.0) > 0):
            rest = _test(np.where(after == before, _differences(ours, theirs), 0.0), ours, theirs, 1.0)
            if rest.p_value >= LEVEL or (rest.delta > 0) != ((row.delta or 0.0) > 0):
                only = within(rest.low, rest.high, row.margin)
                found.append(FormatGain(row.task, row.arm, float(before.mean()), float(after.mean()), rest, only))
    return found


def _check_same_documents(task: str, arm: str, sample: Sample, baseline: str, reference: Sample) -> None:
    ours, theirs = set(sample.documents), set(reference.documents)
    if ours != theirs:
        raise ValueError(
            f"arm {arm!r} and the baseline {baseline!r} were not scored on the same documents of task {task!r}: "
            f"{len(theirs - ours)} are missing in the arm and {len(ours - theirs)} in the baseline"
        )


def _is_share(score: Score, *samples: Sample) -> bool:
    return score.metric not in UNITS and all(bool(((one.values >= 0) & (one.values <= 1)).all()) for one in samples)


def rooms(sample: Sample) -> dict[str, int]:
    """Of 0/1 scores, how many documents could show a "rise" of the mean, and how many a "fall"."""
    return {"rise": int((sample.values < 1).sum()), "fall": int((sample.values > 0).sum())} if sample.shares else {}


def _unseen(own: Sample, reference: Sample, gain: bool, higher_is_better: bool) -> str | None:
    """What of a baseline could not be seen of the change that is looked for: a gain, or with α below 0 a loss."""
    change = "rise" if gain == higher_is_better else "fall"
    return change if own.shares and rooms(reference).get(change, SEEN) < SEEN else None


def within(low: float | None, high: float | None, margin: float | None) -> bool:
    """Whether a change is none that matters: both of two tests, that it is not as low as −margin and not as high as the
    margin (Schuirmann 1987), reject at 2.5 %."""
    return low is not None and high is not None and margin is not None and -margin < low and high < margin


def judge(row: Row) -> str | None:
    """The verdict of a row that is corrected."""
    if row.p_adjusted is None:
        return None
    if row.p_adjusted < LEVEL:
        return row.verdict_alone
    if within(row.delta_ci_low, row.delta_ci_high, row.margin):
        return EQUIVALENT
    return UNSEEN if row.unseen else UNDETECTED


def _row(arm: Arm, score: Score, sample: Sample, answers: Cost) -> Row:
    low, high = score_interval(sample)
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
        n=len(sample.values),
        **asdict(answers),
    )


def _stderr(sample: Sample) -> float | None:
    n = len(sample.values)
    if n == 1:
        return None
    variance = 0.0
    values, all_weights = sample.steady
    for part, weights in zip(split(values, sample.strata), split(all_weights, sample.strata), strict=True):
        own = part if len(part) > 1 else values  # a member of one document: as all documents vary
        variance += float(own.var(ddof=1)) * float((weights**2).sum())
    return math.sqrt(variance) / n


def score_interval(sample: Sample) -> tuple[float, float]:
    """The 95 % interval of a sample's score, by the method that suits its values."""
    if sample.exact:
        return wilson(sample.score, len(sample.values))
    interval = share_interval if sample.shares else mean_interval
    return interval(*sample.steady, sample.strata)


def _differences(sample: Sample, reference: Sample) -> Floats:
    return round_off(sample.values - reference.values, sample.values, reference.values) * sample.weights


def compare(sample: Sample, reference: Sample) -> Comparison:
    """Two samples of the same documents."""
    most = 1.0 if sample.shares and reference.shares else math.inf
    return _test(_differences(sample, reference), sample, reference, most)


def _test(differences: Floats, sample: Sample, reference: Sample, most: float) -> Comparison:
    if sample.exact and reference.exact:
        return compare_discordant(int((differences > 0).sum()), int((differences < 0).sum()), len(differences))
    return compare_differences(differences, sample.weights, sample.strata, most)


def compare_differences(
    differences: Floats, weights: Floats, strata: Sequence[int], most: float = math.inf
) -> Comparison:
    """Whether differences of documents, times their `weights`, are zero in the mean. `most` is what a document's
    difference can be at most without its weight, and so the mean's.

    The test flips signs, and the interval excludes zero exactly where it rejects. Few changed documents: the share that
    changed times what flipping says of their mean, each end with the share farther out. Many: what flipping says of
    all, those that did not change among them.
    """
    changed, half = differences[differences != 0], LEVEL / 2
    k, n, step = len(changed), len(differences), lattice(differences)
    sizes, farthest = np.abs(changed), most * float(weights.max())
    p_value = min(1.0, 2 * min(tails(differences, step)))
    own = round_off(differences / weights, differences / weights)
    size = float(np.abs(own).max())
    if bool((own == own[0]).all()) or (bool((sizes == size).all()) and (k <= FEW or len(strata) == 1)):
        signs = compare_discordant(int((changed > 0).sum()), int((changed < 0).sum()), n)
        if farthest < math.inf:  # other sizes may be as frequent as would not have been seen
            far = size + (farthest - size) * _clopper_pearson(0, k)[1]
        else:
            far = size if 2 * 0.5**k < LEVEL else math.nan
        low = signs.low * (size if signs.low > 0 else far)
        high = signs.high * (size if signs.high < 0 else far)
    elif k <= FEW:
        share = _clopper_pearson(k, n)
        low, high = subset_ends(changed, half)
        low, high = max(low, -farthest), min(high, farthest)
        low, high = low * share[0 if low > 0 else 1], high * share[1 if high > 0 else 0]
    else:
        low = least_shift(differences, weights, half, step)
        high = -least_shift(-differences, weights, half, step)
    delta = float(min(max(differences.mean(), -most), most))
    more, few = _hidden_variance(differences, weights, strata)
    wider = few * math.sqrt(more)
    low = max(delta - wider * (delta - low), low / wider if low > 0 else -math.inf)
    high = min(delta + wider * (high - delta), high / wider if high < 0 else math.inf)
    return Comparison(delta, min(max(low, -most), delta), max(min(high, most), delta), p_value)


def _hidden_variance(differences: Floats, weights: Floats, strata: Sequence[int]) -> tuple[float, float]:
    """What small members of a group that weigh much show too little of: how many times the variance that is seen is
    likely, and by how much an interval is too narrow as that is known from few documents. Both are 1 where all
    documents weigh the same."""
    if (weights == weights[0]).all():
        return 1.0, 1.0
    own = differences / weights
    seen = likely = freedom = 0.0
    for part, weight in zip(split(own, strata), split(weights, strata), strict=True):
        square, varied = float((weight**2).sum()), float((part**2).mean())
        near = (len(part) * varied + PRIOR * float((own**2).mean())) / (len(part) + PRIOR)
        seen += square * varied
        likely += square * near
        freedom += (square * near) ** 2 / len(part)
    if not likely:
        return 1.0, 1.0
    few = float(t.ppf(1 - LEVEL / 2, likely**2 / freedom) / norm.ppf(1 - LEVEL / 2))
    return max(1.0, likely / seen), few


def _clopper_pearson(count: int, n: int) -> tuple[float, float]:
    if n == 0:
        return 0.0, 1.0
    low, high = proportion_confint(count, n, LEVEL, method="beta")
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for their number. statsmodels' own looks for all garbage, which takes it most of a second."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1))
    return [float(p) for p in np.minimum(adjusted, 1.0)]


def _adjust(rows: list[Row], outline: Outline) -> list[Row]:
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
            rows[i] = replace(rows[i], verdict=judge(rows[i]))
    return rows
