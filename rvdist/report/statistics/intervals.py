"""How far off a score may be: 95 % intervals of a weighted mean over documents that were drawn by stratum.

`values` and `weights` are fp64, one a document, stratum after stratum; `strata` are the numbers of documents; weights
have a mean of 1. Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Floats = NDArray[np.float64]
_Z = float(norm.ppf(0.975))
PRIOR = 4.0  # documents that score as all strata together, added to each, as Agresti and Coull add to a share
_DOUBT = 4.0  # documents that answer all right or all wrong, added to those seen to vary


def known(number: float) -> float | None:
    """The number, None where nothing is known of it."""
    return number if math.isfinite(number) else None


def split(values: Floats, strata: Sequence[int]) -> list[Floats]:
    """The values of each stratum."""
    return np.split(values, np.cumsum(strata)[:-1])


def share_interval(values: Floats, weights: Floats, strata: Sequence[int]) -> tuple[float, float]:
    """Of scores between 0 and 1: Wilson's, of as many documents as would make the mean as sure as it is."""
    score = float((values * weights).mean())
    share = score * (1 - score)
    variance = most = freedom = 0.0
    for part, weight in zip(split(values, strata), split(weights, strata), strict=True):
        n, mean = len(part), float(part.mean())
        near = (n * mean + PRIOR * score) / (n + PRIOR)
        varying = n - int(np.unique(part, return_counts=True)[1].max())
        own = float(part.var(ddof=1)) if n > 1 else 0.0
        square = float(weight.sum() / len(values)) ** 2 / n
        part_variance = square * (varying * own + _DOUBT * near * (1 - near)) / (varying + _DOUBT)
        variance += part_variance
        most += square
        freedom += part_variance**2 / n
    if not variance or not share:
        return wilson(score, 1 / most)
    few = _Z / float(t.ppf(0.975, variance**2 / freedom))  # where a small stratum weighs much
    return wilson(score, few**2 * share / variance)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n (JASA 22 (1927) 209)."""
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    reach = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return max(0.0, min(middle - reach, share)), min(1.0, max(middle + reach, share))


def mean_interval(values: Floats, weights: Floats, strata: Sequence[int]) -> tuple[float, float]:
    """Of scores without bounds: Student's t with Hall's (1992) correction for skewness; NaN where nothing varies."""
    n = len(values)
    mean = float((values * weights).mean())
    spread = float(values.std())
    if n < 2 or spread == 0:
        return math.nan, math.nan
    variance = third = freedom = 0.0
    for part, weight in zip(split(values, strata), split(weights, strata), strict=True):
        size = len(part)
        share = float(weight.sum()) / n
        squares = float(((part - part.mean()) ** 2).sum())
        own = (squares + spread**2 * (len(strata) > 1)) / (size - (len(strata) == 1))
        part_variance = share**2 * own / size
        variance += part_variance
        freedom += part_variance**2 / max(1, size - 1)
        third += (share / size) ** 3 * float(((part - part.mean()) ** 3).sum())
    error = math.sqrt(variance)
    reach = float(t.ppf(0.975, variance**2 / freedom))
    low, high = (_undo_skew(x, third / error**3) for x in (reach, -reach))
    return mean - error * low, mean - error * high


def _undo_skew(x: float, skew: float) -> float:
    """The studentised mean at which Hall's transformation, a cubic without turns, is x."""
    if abs(skew) < 1e-9:
        return x
    return 3 / skew * (float(np.cbrt(1 + skew * (x - skew / 6))) - 1)
