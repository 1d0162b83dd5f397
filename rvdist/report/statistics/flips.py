"""Whether differences of documents are zero in the mean: what flipping their signs could have shown.

If two arms are alike, each document's difference was as likely to come with the other sign. The p value is the share of
all ways to flip signs that give a sum as far out as the one found; for equal differences that is McNemar's exact test.
The interval holds every δ that the same test, of the differences less δ, does not reject. `values` are fp64, one a
document. Knows numbers only.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom

from rvdist.report.statistics.intervals import Floats

FEW = 16  # changed documents up to which every way to flip is looked at; above, a saddlepoint approximation
_TINY = 1e-9  # of the scale of a sum: zero


def tails(values: Floats, step: float = 0.0) -> tuple[float, float]:
    """How likely flipping signs gives a sum at least as large, and at least as small, as that of `values`."""
    values = values[values != 0]
    sizes = np.abs(values)
    if len(values) and (sizes == sizes[0]).all():
        better, n = int((values > 0).sum()), len(values)
        return float(binom.sf(better - 1, n, 0.5)), float(binom.cdf(better, n, 0.5))
    if len(values) <= FEW:
        sums = _subset_sums(values)
        # A flipped sum is the sum less twice what was flipped.
        return float((sums <= 0).mean()), float((sums >= 0).mean())
    return _tail(values, step), _tail(-values, step)


def subset_ends(values: Floats, tail: float) -> tuple[float, float]:
    """The δ between which neither tail of `values` − δ is below `tail`: means of subsets (Hartigan 1969). Infinite
    where there are too few values."""
    sums = _subset_sums(values)[1:]
    means = np.sort(sums / _sizes(len(values))[1:])
    place = math.ceil(tail * (len(means) + 1) - 1e-9) - 1
    return (float(means[place - 1]), float(means[-place])) if place else (-math.inf, math.inf)


def least_shift(values: Floats, weights: Floats, tail: float, step: float = 0.0) -> float:
    """The least δ at which the upper tail of `values` − δ · `weights` is not below `tail`; more than 0 exactly where
    that of `values` is below."""
    distinct, counts = np.unique(np.stack([values, weights]), axis=1, return_counts=True)
    (value, weight), times = distinct, counts.astype(float)

    def rejects(delta: float) -> bool:
        return _tail(value - delta * weight, step, times) < tail

    mean = float(values.sum() / weights.sum())
    if tails(values, step)[0] < tail:
        low, high = 0.0, mean
    else:
        high = min(0.0, mean)
        reach = float(np.abs(values).max()) or 1.0
        while not rejects(low := high - reach):
            reach *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if rejects(middle):
            low = middle
        else:
            high = middle
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            break
    return high


def lattice(values: Floats) -> float:
    """The step that all values are multiples of, 0 where there is none: flipping moves a sum by twice the step."""
    sizes = np.unique(np.abs(values[values != 0]))
    if not len(sizes):
        return 0.0
    times = sizes / sizes[0]
    return float(sizes[0]) if np.abs(times - times.round()).max() < 1e-6 else 0.0


def _tail(values: Floats, step: float, counts: Floats | None = None) -> float:
    """P(Σ ±values ≥ Σ values) after Lugannani and Rice (1980), half a step of the lattice nearer."""
    counts = np.ones(len(values)) if counts is None else counts
    total = float(values @ counts)
    if total - step < 0:
        return 1.0 - _tail(-values, -step, counts)
    total -= step
    sizes = np.abs(values)
    most = float(sizes @ counts)
    if most == 0:
        return 1.0
    spread = math.sqrt(float(values**2 @ counts))
    if total < 1e-6 * spread:
        return 0.5
    if total >= most * (1 - 1e-12):
        return math.pow(0.5, float(counts[sizes > _TINY * sizes.max()].sum()))
    t = _saddle(sizes, counts, total, spread)
    scaled = t * sizes
    # log cosh, without overflow
    exponent = t * total - float((scaled + np.log1p(np.exp(-2 * scaled)) - math.log(2)) @ counts)
    root = math.sqrt(max(2 * exponent, 0.0))
    curvature = math.sqrt(float((values**2 * (1 - np.tanh(scaled) ** 2)) @ counts))
    if root < 1e-4 or t * curvature == 0:
        return float(ndtr(-root))
    density = math.exp(-root * root / 2) / math.sqrt(2 * math.pi)
    return float(min(1.0, max(math.exp(log_ndtr(-root)) + density * (1 / (t * curvature) - 1 / root), 0.0)))


def _saddle(sizes: Floats, counts: Floats, total: float, spread: float) -> float:
    """The t at which the tilted mean is the total: Newton's steps within a bracket."""
    low, high, t = 0.0, math.inf, total / spread**2
    for _ in range(100):
        tanh = np.tanh(t * sizes)
        excess = float((sizes * tanh) @ counts) - total
        if abs(excess) <= 1e-12 * total:
            break
        low, high = (low, t) if excess > 0 else (t, high)
        slope = float((sizes**2 * (1 - tanh**2)) @ counts)
        step = t - excess / slope if slope > 0 else math.inf
        t = step if low < step < high else (low + high) / 2 if high < math.inf else 2 * t
        if high - low <= 1e-14 * high:
            break
    return t


def _subset_sums(values: Floats) -> Floats:
    """Of every subset, that of none first; a sum that is a rounding away from zero is zero."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    if len(values):
        sums[np.abs(sums) <= _TINY * np.abs(values).max()] = 0.0
    return sums


@cache
def _sizes(n: int) -> Floats:
    return _subset_sums(np.ones(n))
