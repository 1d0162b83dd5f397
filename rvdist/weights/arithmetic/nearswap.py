"""NearSwap: take the other model's element where it is near the base's, and only lean to it where it is far.

Source: Alchemonaut, QuartetAnemoi-70B-t0.0001 (its model card); mergekit 0.1.5's `nearswap`. For each element:

    r = t + min(1, max(0, α / max(|d|, 10⁻⁶)))·d

So α is mergekit's t: elements that differ by at most α become the other's, others move by α towards it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rvdist.weights.arithmetic.method import Place

_NEAR = 1e-6  # a distance that is taken for a smaller one


class Nearswap:
    """For one vector."""

    elementwise_sum = False
    surveys_base = False

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        """Needs no survey."""

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        """Raises ValueError where there is more than one vector."""
        if len(differences) != 1:
            raise ValueError(f"nearswap goes to one model, not to {len(differences)}")
        (alpha,), (difference,) = alphas, differences
        share = torch.full_like(difference, alpha).div_(difference.abs().clamp_(min=_NEAR)).clamp_(0, 1)
        total.add_(difference.mul_(share))
