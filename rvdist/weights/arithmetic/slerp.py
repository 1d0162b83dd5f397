"""Spherical interpolation from the base to one other model, each tensor taken as one vector.

Source: Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985; mergekit 0.1.5's `slerp`. With a the base's
tensor, b = a + d the other's and θ the angle between them, in working precision:

    r = sin((1 − α)θ)/sin θ · a + sin(αθ)/sin θ · b        (1 − α)·a + α·b where |cos θ| > 0.9995

computed as (c_a + c_b)·a + c_b·d. The two coefficients are found in fp64 and rounded to fp32, so that they do not
hang on the order in which cos θ was summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from rvdist.weights.arithmetic.method import Place

_COLLINEAR = 0.9995
_NO_DIRECTION = 1e-8  # a norm that is taken as 1


class Slerp:
    """For one vector; α is how far to go, 0 the base and 1 the other model."""

    elementwise_sum = False
    surveys_base = True

    def __init__(self) -> None:
        self._cosine = 1.0

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        """Raises ValueError where there is more than one vector."""
        squared_a = squared_b = product = 0.0
        for base, *differences in chunks():
            if len(differences) != 1:
                raise ValueError(f"slerp interpolates to one model, not to {len(differences)}")
            a = base.double()
            b = a + differences[0]
            squared_a += float(a.dot(a))
            squared_b += float(b.dot(b))
            product += float(a.dot(b))
        norms = [norm if norm > _NO_DIRECTION else 1.0 for norm in (math.sqrt(squared_a), math.sqrt(squared_b))]
        self._cosine = max(-1.0, min(1.0, product / norms[0] / norms[1]))

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        (alpha,), (difference,) = alphas, differences
        own, other = self._coefficients(alpha)
        total.mul_(own + other).add_(difference.mul_(other))

    def _coefficients(self, alpha: float) -> tuple[float, float]:
        if abs(self._cosine) > _COLLINEAR:
            return 1 - alpha, alpha
        angle = math.acos(self._cosine)
        own, other = (math.sin(share * angle) / math.sin(angle) for share in (1 - alpha, alpha))
        rounded = torch.tensor([own, other], dtype=torch.float32).tolist()
        return rounded[0], rounded[1]
