"""SCE: select where the vectors vary, calculate their weights from their sizes, erase what the majority contradicts.

Source: FuseChat, arXiv 2408.07990, section 3.3; mergekit 0.1.5's `sce`. For one tensor and its K vectors d_k:

    select     all d_k = 0 but where the variance over k is among the k largest, k = ⌊density · how many are not 0⌋
    calculate  w_k = mean of d_k² / their sum over k; 1/K where that sum is below 10⁻⁶
    erase      e = 1 where Σ d_k ≥ 0, else −1; those d_k stay that have this sign
    r          t + Σ w_k·d_k / max(Σ w_k, 10⁻⁶), both over those that stay

A density of 1 selects all. Of equal variances at the least place, all are selected. The w are found in fp64 and rounded
to fp32. The α say only who takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rvdist.weights.arithmetic.consensus import elect_sign
from rvdist.weights.arithmetic.method import Place
from rvdist.weights.arithmetic.ties import kth_largest, magnitudes

_LITTLE = 1e-6


class Sce:
    """`density` is the share of the elements that is selected, (0, 1]: mergekit's select_topk."""

    elementwise_sum = False
    surveys_base = False

    def __init__(self, density: float) -> None:
        self._density = density
        self._least: int | None = None  # the smallest variance that is selected, as bits; None: any
        self._weights: list[float] = []

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        density = place.densities[0] if place.densities else self._density
        self._least = None
        if density < 1:
            varied = sum(int(_variance(differences).count_nonzero()) for differences in chunks())
            selected = int(varied * density)
            (least,) = kth_largest(lambda: ([_variance(d)] for d in chunks()), selected) if selected else [-1]
            self._least = least
        squares = torch.zeros(len(next(chunks())), dtype=torch.float64)
        for differences in chunks():
            self._select(differences)
            squares += torch.stack([difference.double().square().sum() for difference in differences])
        means = squares / place.numel
        total = float(means.sum())
        shares = torch.full_like(means, 1 / len(means)) if total < _LITTLE else means / total
        self._weights = shares.float().tolist()

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        self._select(differences)
        sign = elect_sign(differences)
        change, weight = torch.zeros_like(total), torch.zeros_like(total)
        for share, difference in zip(self._weights, differences, strict=True):
            agrees = difference.sign().eq_(sign).mul_(share)
            change.add_(difference.mul_(agrees))
            weight.add_(agrees)
        total.add_(change.div_(weight.clamp_(min=_LITTLE)))

    def _select(self, differences: Sequence[torch.Tensor]) -> None:
        if self._least is None:
            return
        selected = magnitudes(_variance(differences))
        selected = selected >= self._least if self._least >= 0 else torch.zeros_like(selected)
        for difference in differences:
            difference.mul_(selected)


def _variance(differences: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each element over the vectors: the mean square of what it differs from their mean."""
    mean = torch.zeros_like(differences[0])
    for difference in differences:
        mean.add_(difference)
    mean.div_(len(differences))
    variance = torch.zeros_like(mean)
    for difference in differences:
        apart = difference - mean
        variance.add_(apart.mul_(apart))
    return variance.div_(len(differences))
