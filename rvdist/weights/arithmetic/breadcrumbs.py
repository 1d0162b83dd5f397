"""Model Breadcrumbs: leave out of every vector its largest elements and its smallest, and sum, or elect as TIES does.

Source: Model Breadcrumbs, arXiv 2312.06795, section 3; mergekit 0.1.5's `breadcrumbs` and `breadcrumbs_ties`. With d_k
the differences of one tensor of n elements, ordered by magnitude, in working precision and with one rounding an
operation:

    drop    the ⌊gamma · n⌋ largest of d_k, and of the rest all but the ⌊density · n⌋ largest; no more of the largest
            than leaves that many. A density of 1 drops nothing.
    sum     r = t + Σ α_k · d_k
    elect   r = t + what `consensus` makes of the α_k · d_k, times `factor`

Of equal magnitudes at either end, all stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rvdist.weights.arithmetic.consensus import elect
from rvdist.weights.arithmetic.method import Place
from rvdist.weights.arithmetic.ties import kth_largest, magnitudes

_ALL = -1, -1


class Breadcrumbs:
    """`density` is the share of each vector's elements that stays, (0, 1], `gamma` that of its largest which do not,
    [0, 1)."""

    elementwise_sum = False
    surveys_base = False

    def __init__(self, density: float, gamma: float) -> None:
        self._density = density
        self._gamma = gamma
        self._range: list[tuple[int, int]] | None = None  # each vector's magnitudes that stay, as bits; None: all do

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        vectors = len(next(chunks()))
        densities = place.densities or (self._density,) * vectors
        self._range = None
        if min(densities) >= 1:
            return
        n = place.numel
        ranks = []
        for density in densities:
            kept = int(density * n)
            above = min(int(self._gamma * n), n - kept)
            ranks += [min(above + 1, n), max(1, above + kept)] if density < 1 else [1, n]
        bits = kth_largest(lambda: ([d for d in found for _ in range(2)] for found in chunks()), ranks)
        self._range = [
            _ALL if int(density * n) == 0 else (least, most)
            for density, most, least in zip(densities, bits[::2], bits[1::2], strict=True)
        ]

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        self.drop(alphas, differences)
        for scaled in differences:
            total.add_(scaled)

    def drop(self, alphas: Sequence[float], differences: Sequence[torch.Tensor]) -> None:
        """α_k·d_k, without what is dropped, in place."""
        for vector, (alpha, difference) in enumerate(zip(alphas, differences, strict=True)):
            if self._range:
                (least, most), found = self._range[vector], magnitudes(difference)
                difference.mul_((found >= least).logical_and_(found <= most))
            difference.mul_(alpha)


class BreadcrumbsTies(Breadcrumbs):
    """`normalize`: divide by the weights that agree. `factor`: mergekit's lambda."""

    def __init__(self, density: float, gamma: float, normalize: float, factor: float) -> None:
        super().__init__(density, gamma)
        self._normalize = bool(normalize)
        self._factor = factor

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        self.drop(alphas, differences)
        total.add_(elect(alphas, differences, self._normalize).mul_(self._factor))
