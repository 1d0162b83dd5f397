"""DELLA: drop elements of every vector at random, small ones more often, and sum, or elect as TIES does.

Source: DELLA-Merging, arXiv 2406.11617; mergekit 0.1.5's `della` and `della_linear`, which scale otherwise than the
paper. With d_k the differences of one tensor, by rows of its last dimension (a tensor of one dimension is one row), in
working precision and with one rounding an operation:

    keep    b = 1 with probability density − epsilon + 2 · epsilon · (rank − 1) / (n − 1), the rank from 1 for the
            smallest of the n magnitudes of the row; of equal ones the first has the lower. A density of 1 keeps all.
    scale   s_k = α_k · (‖d_k‖₁ / ‖b ⊙ d_k‖₁ · b ⊙ d_k); without `rescale` without that quotient
    sum     r = t + Σ s_k
    elect   r = t + what `consensus` makes of the s_k, times `factor`

The quotient, over the whole tensor, is found in fp64 and rounded to fp32; it is 1 where either length is below 10⁻⁷.
The paper divides each element by its own probability. The draws are those of `dare`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rvdist.weights.arithmetic.consensus import elect
from rvdist.weights.arithmetic.dare import draws
from rvdist.weights.arithmetic.method import Place
from rvdist.weights.arithmetic.ties import magnitudes

_LITTLE = 1e-7


class Della:
    """`density` is the mean probability with which an element stays, (0, 1], `epsilon` how far from it that of the
    smallest and of the largest of a row are. Its chunks are whole rows."""

    elementwise_sum = False
    surveys_base = False

    def __init__(self, density: float, seed: int, epsilon: float, rescale: float) -> None:
        self._density = density
        self._seed = seed
        self._epsilon = epsilon
        self._rescale = bool(rescale)
        self._scales: list[float] = []

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        """Raises ValueError where a probability would not be between 0 and 1."""
        densities = place.densities or (self._density,)
        for density in densities:
            if density < 1 and not self._epsilon < density < 1 - self._epsilon:
                raise ValueError(f"density {density:g} and epsilon {self._epsilon:g} make no probabilities")
        self._scales = []
        if not self._rescale or min(densities) == 1:
            return
        before = after = torch.zeros(len(next(chunks())), dtype=torch.float64)
        at = 0
        for differences in chunks():
            sizes = [difference.double().abs() for difference in differences]
            kept = [self._keep(d, vector, place, at) for vector, d in enumerate(differences)]
            before = before + torch.stack([size.sum() for size in sizes])
            after = after + torch.stack([(size * stays).sum() for size, stays in zip(sizes, kept, strict=True)])
            at += differences[0].numel()
        little = (before < _LITTLE) | (after < _LITTLE)
        self._scales = torch.where(little, 1.0, before / after).float().tolist()

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        self.drop(alphas, differences, place)
        for scaled in differences:
            total.add_(scaled)

    def drop(self, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place) -> None:
        """s_k, in place."""
        for vector, (alpha, difference) in enumerate(zip(alphas, differences, strict=True)):
            difference.mul_(self._keep(difference, vector, place, place.start).to(difference.device))
            if self._scales:
                difference.mul_(self._scales[vector])
            difference.mul_(alpha)

    def _keep(self, difference: torch.Tensor, vector: int, place: Place, start: int) -> torch.Tensor:
        """1 for those of the elements from `start` on that stay, else 0; they are whole rows of the vector."""
        density = place.densities[vector] if place.densities else self._density
        if density == 1:
            return torch.ones(difference.numel())
        rows = magnitudes(difference).cpu().view(-1, place.width)
        ranks = torch.empty_like(rows, dtype=torch.int64)
        ranks.scatter_(1, rows.argsort(stable=True, dim=1), torch.arange(place.width).expand(rows.shape))
        share = ranks.double() / (place.width - 1) if place.width > 1 else torch.full(ranks.shape, 0.5).double()
        limits = ((density - self._epsilon + 2 * self._epsilon * share) * 2**32).round_().view(-1).numpy()
        return torch.from_numpy(draws(self._seed, place.tensor, vector, start, difference.numel()) < limits).float()


class DellaTies(Della):
    """`normalize`: divide by the weights that agree. `factor`: mergekit's lambda."""

    def __init__(
        self, density: float, seed: int, epsilon: float, rescale: float, normalize: float, factor: float
    ) -> None:
        super().__init__(density, seed, epsilon, rescale)
        self._normalize = bool(normalize)
        self._factor = factor

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        self.drop(alphas, differences, place)
        total.add_(elect(alphas, differences, self._normalize).mul_(self._factor))
