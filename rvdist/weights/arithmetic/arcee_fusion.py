"""Arcee Fusion: take the other model's element where its change matters most, else the base's.

Source: mergekit 0.1.5's `arcee_fusion`, which cites no paper but https://arcee.ai. With t and v = t + d the base's and
the other model's tensor, by rows of its last dimension (a tensor of one dimension is one row):

    p, q        softmax(v) + 10⁻⁸, softmax(t) + 10⁻⁸, each row by itself
    importance  |d| · Σ p·log(p / q), the sum over the row
    threshold   median + 1.5 · (third quartile − first), of the importance of all n elements: those at place ⌊q·(n − 1)⌋
    r           t + d where the importance is at least the threshold, else t

The sums over rows are found in fp64 and rounded to fp32; the quartiles are exact. α says only that the other takes
part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rvdist.weights.arithmetic.method import Place
from rvdist.weights.arithmetic.ties import kth_largest, of_bits

_LITTLE = 1e-8
_QUARTERS = (0.25, 0.5, 0.75)


class ArceeFusion:
    """For one vector. Its chunks are whole rows."""

    elementwise_sum = False
    surveys_base = True

    def __init__(self) -> None:
        self._divergence = torch.empty(0)  # of every row of the tensor
        self._threshold = torch.empty(())

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        """Raises ValueError where there is more than one vector."""
        at, self._divergence = 0, torch.empty(place.numel // place.width)  # pieces would leave holes between chunks
        for base, *differences in chunks():
            (difference,) = differences
            model = (base + difference).view(-1, place.width).double().softmax(-1) + _LITTLE
            own = base.view(-1, place.width).double().softmax(-1) + _LITTLE
            self._divergence[at : at + len(own)] = (model * (model / own).log()).sum(-1).clamp_(min=0)
            at += len(own)

        def importances() -> Iterator[list[torch.Tensor]]:
            at = 0
            for _, difference in chunks():
                found = self._importance(difference, at, place)
                at += difference.numel()
                yield [found] * len(_QUARTERS)

        ranks = [place.numel - int(quarter * (place.numel - 1)) for quarter in _QUARTERS]
        bits = kth_largest(importances, ranks)
        first, median, third = of_bits(bits, next(chunks())[0].dtype)
        self._threshold = median + 1.5 * (third - first)

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        (difference,) = differences
        importance = self._importance(difference, place.start, place)
        total.add_(difference.mul_(importance >= self._threshold.to(total.device)))

    def _importance(self, difference: torch.Tensor, start: int, place: Place) -> torch.Tensor:
        """Of elements from `start` on, whole rows."""
        first = start // place.width
        rows = self._divergence[first : first + difference.numel() // place.width].to(difference.device)
        return (difference.abs().view(-1, place.width) * rows.to(difference.dtype)[:, None]).view(-1)
