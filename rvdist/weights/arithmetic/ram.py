"""RAM: what one vector alone changes is taken whole, what several change is averaged over those.

Source: Reinforced Agent Merging, arXiv 2601.13572; mergekit 0.1.5's `ram` and `ramplus_tl`. With d_k the differences of
one tensor, c the number of vectors with |d_k| > `epsilon` at an element, in working precision and with one rounding an
operation:

    r = t + Σ λ_k·d_k / max(c, 1) over those k       λ_k = 1; RAM+ where c = 1: 1 + r · min(ρ_k, alpha)

ρ_k is how many elements of this tensor vector k changes with others, by how many it alone changes. λ is found in fp64
and rounded to fp32. The α say only who takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rvdist.weights.arithmetic.method import Place


class Ram:
    """`epsilon`: what is no larger counts as no change."""

    elementwise_sum = False
    surveys_base = False

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon
        self._alone: list[float] = []  # what a vector's elements are multiplied by where it is alone; none: 1

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        """Needs no survey."""

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        changes, count = self._count(differences)
        change, alone = torch.zeros_like(total), count == 1
        count.clamp_(min=1)
        for number, (difference, changed) in enumerate(zip(differences, changes, strict=True)):
            difference.mul_(changed).div_(count)  # 0 times what is not finite is NaN: it cannot be hidden
            if self._alone:
                difference.mul_(torch.ones_like(count).masked_fill_(alone, self._alone[number]))
            change.add_(difference)
        total.add_(change)

    def _count(self, differences: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Where each vector changes an element, and how many do."""
        changes = [difference.abs() > self._epsilon for difference in differences]
        count = torch.zeros_like(differences[0])
        for changed in changes:
            count.add_(changed)
        return changes, count


class RamPlus(Ram):
    """`r`: how much is added where a vector is alone; `alpha`: the largest ρ that counts."""

    def __init__(self, r: float, alpha: float, epsilon: float) -> None:
        super().__init__(epsilon)
        self._strength = r
        self._most = alpha

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        shared: dict[int, int] = {}
        alone: dict[int, int] = {}
        for differences in chunks():
            changes, count = self._count(differences)
            for number, changed in enumerate(changes):
                own = count[changed]
                shared[number] = shared.get(number, 0) + int((own > 1).sum())
                alone[number] = alone.get(number, 0) + int((own == 1).sum())
        ratios = [min(shared[k] / max(alone[k], 1), self._most) for k in shared]
        self._alone = torch.tensor([1 + self._strength * ratio for ratio in ratios], dtype=torch.float32).tolist()
