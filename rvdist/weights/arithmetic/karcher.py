"""The Karcher mean: the point of the sphere that is nearest to all models, each tensor taken as one vector.

Source: mergekit 0.1.5's `karcher`, which cites arXiv 2603.04972; Karcher, Riemannian Center of Mass and Mollifier
Smoothing, 1977. With the N models v_0 = t, v_k = t + d_k of one tensor and u_k = v_k / ‖v_k‖, those of a norm above
`tol`, begin with m = Σ u_k / ‖Σ u_k‖ (the first u where that sum is shorter than `tol`), and at most `max_iter` times

    g = mean of θ_k / sin θ_k · (u_k − cos θ_k · m), θ_k the angle of m and u_k; those below `tol` are left out
    m = cos ‖g‖ · m + sin ‖g‖ · g / ‖g‖        until ‖g‖ < tol

Then r = (Σ ‖v_k‖ / N) · m. Every m is a sum of the models, so that it is found from their inner products alone. The α
say only who takes part.
"""

from __future__ import annotations

import math

import numpy as np

from rvdist.weights.arithmetic.span import Numbers, Span, as_differences, of_models


class Karcher(Span):
    """For any number of vectors."""

    def __init__(self, max_iter: float, tol: float) -> None:
        super().__init__()
        self._most = int(max_iter)
        self._tolerance = tol

    def coefficients(self, products: Numbers, alphas: Numbers) -> Numbers:
        models = of_models(products)
        norms = np.sqrt(models.diagonal())
        valid = np.flatnonzero(norms > self._tolerance)
        members = np.zeros(len(models))
        if len(valid):
            units = models[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
            members[valid] = self._mean(units) / norms[valid] * norms.mean()
        return as_differences(members)

    def _mean(self, units: Numbers) -> Numbers:
        """The coefficients of the unit vectors that have these inner products."""

        def length(coefficients: Numbers) -> float:
            return math.sqrt(max(float(coefficients @ units @ coefficients), 0.0))

        count = len(units)
        mean = np.full(count, 1 / count)
        mean = mean / length(mean) if length(mean) >= self._tolerance else np.eye(count)[0]
        for _ in range(self._most):
            cosines = np.clip(units @ mean, -1, 1)
            angles = np.arccos(cosines)
            far = angles >= self._tolerance
            factors = np.zeros(count)
            factors[far] = angles[far] / np.sin(angles[far]) / count
            step = factors - (factors @ cosines) * mean
            size = length(step)
            if size < self._tolerance:
                break
            mean = np.cos(size) * mean + np.sin(size) / size * step
            mean /= length(mean)
        return mean
