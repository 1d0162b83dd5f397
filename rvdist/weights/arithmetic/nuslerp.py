"""Spherical interpolation of two vectors, or of two models, by their weights: mergekit's NuSLERP.

Source: Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985; mergekit 0.1.5's `nuslerp`. With u and v the
two of one tensor, θ the angle between them, and s = α_v / (α_u + α_v), or 1/2 where that sum is within 10⁻⁶ of 0:

    u ⊕ v = sin((1 − s)θ)/sin θ · u + sin(sθ)/sin θ · v        (1 − s)·u + s·v where 1 − cos²θ ≤ 10⁻¹⁶

    two vectors           r = t + d_1 ⊕ d_2
    the base and a model  r = t ⊕ (t + d), with s = α
"""

from __future__ import annotations

import numpy as np

from rvdist.weights.arithmetic.span import Numbers, Span, as_differences, of_models

_COLLINEAR = 1e-16
_SHORT = 1e-7  # a norm that is taken for a smaller one
_NO_WEIGHT = 1e-6


class Nuslerp(Span):
    """For one vector, which is then added as a whole, or two."""

    def coefficients(self, products: Numbers, alphas: Numbers) -> Numbers:
        """Raises ValueError where there are more than two."""
        if len(alphas) == 1:
            return np.ones(2)
        if len(alphas) != 2:
            raise ValueError(f"nuslerp interpolates between two, not {len(alphas)}")
        total = alphas.sum()
        share = 0.5 if abs(total) < _NO_WEIGHT else alphas[1] / total
        return np.array([1.0, *interpolate(products[1:, 1:], share)])


class NuslerpModels(Span):
    """For one vector; α is how far to go, 0 the base and 1 the other model."""

    def coefficients(self, products: Numbers, alphas: Numbers) -> Numbers:
        """Raises ValueError where there is more than one."""
        (alpha,) = alphas
        return as_differences(interpolate(of_models(products), alpha))


def interpolate(products: Numbers, share: float) -> Numbers:
    """The coefficients of the two."""
    norms = np.sqrt(products.diagonal()).clip(min=_SHORT)
    cosine = np.clip(products[0, 1] / norms[0] / norms[1], -1, 1)
    if 1 - cosine * cosine <= _COLLINEAR:
        return np.array([1 - share, share])
    angle = np.arccos(cosine)
    return np.asarray(np.sin(np.array([1 - share, share]) * angle) / np.sin(angle))
