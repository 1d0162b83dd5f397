"""Elect a sign for every element and sum, or average by weight, the vectors that agree: as mergekit does.

Source: mergekit 0.1.5's `ties` and `dare_ties`. With d_k the differences of one tensor of n elements, in working
precision and with one rounding an operation:

    drop    ties: d_k = 0 unless |d_k| is at least the kept-th largest |d_k|, kept = max(1, ⌊density · n⌋)
            dare_ties: d_k = b_k · d_k / density, with the draws b_k of `dare`
    scale   s_k = α_k · d_k
    elect   e = 1 where Σ s_k ≥ 0, else −1
    merge   r = t + Σ s_k over those k with sign(s_k) = e; to normalise, this sum is divided by their Σ α_k (0 as 1)

Against `ties` (the paper's) the mean is weighted, or is a sum; `kept` is rounded down; and a draw elects +.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rvdist.weights.arithmetic.dare import Dare
from rvdist.weights.arithmetic.method import Place
from rvdist.weights.arithmetic.ties import kth_largest, magnitudes


class Consensus:
    """`density` is the share of each vector's elements that stays, (0, 1]: of the largest, or where `dare` is given,
    of random ones. `normalize`: divide by the weights that agree."""

    elementwise_sum = False
    surveys_base = False

    def __init__(self, density: float, normalize: bool, dare: Dare | None = None) -> None:
        self._density = density
        self._normalize = normalize
        self._dare = dare
        self._least: list[int] | None = None  # each vector's smallest magnitude to be kept, as bits; None: all stay

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        densities = place.densities or (self._density,)
        kept = [max(1, int(density * place.numel)) for density in densities]
        few = len(kept) == 1
        self._least = kth_largest(chunks, kept[0] if few else kept) if min(kept) < place.numel else None

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        for vector, (alpha, difference) in enumerate(zip(alphas, differences, strict=True)):
            if self._dare:
                self._dare.drop(difference, 1.0, vector, place)
            elif self._least:
                difference.mul_(magnitudes(difference).ge_(self._least[vector]))
            difference.mul_(alpha)
        total.add_(elect(alphas, differences, self._normalize))


def elect_sign(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """1 where the terms add up to 0 or more, else −1."""
    sign = torch.zeros_like(terms[0])
    for term in terms:
        sign.add_(term)
    return sign.copy_(sign >= 0).mul_(2).sub_(1)


def elect(alphas: Sequence[float], scaled: Sequence[torch.Tensor], normalize: bool) -> torch.Tensor:
    """The sum, or the mean by weight, of those of the terms that have the elected sign; the terms are overwritten."""
    sign = elect_sign(scaled)
    change, weight = torch.zeros_like(sign), torch.zeros_like(sign)
    for alpha, term in zip(alphas, scaled, strict=True):
        agrees = term.sign().eq_(sign)
        change.add_(term.mul_(agrees))  # 0 times what is not finite is NaN: a vote cannot hide it
        weight.add_(agrees.mul_(alpha))
    return change.div_(weight.masked_fill_(weight == 0, 1)) if normalize else change


def ties_sum(density: float) -> Consensus:
    """mergekit's `ties` with `normalize: false`."""
    return Consensus(density, normalize=False)


def ties_mean(density: float) -> Consensus:
    """mergekit's `ties` with `normalize: true`."""
    return Consensus(density, normalize=True)


def dare_ties_sum(density: float, seed: int) -> Consensus:
    """mergekit's `dare_ties` with `normalize: false`."""
    return Consensus(density, normalize=False, dare=Dare(density, seed))


def dare_ties_mean(density: float, seed: int) -> Consensus:
    """mergekit's `dare_ties` with `normalize: true`."""
    return Consensus(density, normalize=True, dare=Dare(density, seed))
