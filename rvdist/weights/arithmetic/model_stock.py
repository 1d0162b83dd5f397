"""Model Stock: go from the base to the mean of fine-tuned models as far as the angle between them says.

Source: Model Stock, arXiv 2403.19522, equation 5; mergekit 0.1.5's `model_stock`. For one tensor, N vectors d_k and
cos θ the mean of the cosines of all pairs (whose product of norms counts as at least 10⁻⁶):

    r = t + τ/N · Σ d_k        τ = N·cos θ / (1 + (N − 1)·cos θ)

τ is 0 where its denominator is within 10⁻⁶ of 0, and where there is one vector only. The α say only who takes part.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from rvdist.weights.arithmetic.span import Numbers, Span

_SINGULAR = 1e-6
_SHORT = 1e-6  # a product of norms that is taken for a smaller one


class ModelStock(Span):
    """For two vectors or more."""

    def coefficients(self, products: Numbers, alphas: Numbers) -> Numbers:
        between = products[1:, 1:]
        count, norms = len(between), np.sqrt(between.diagonal())
        pairs = list(combinations(range(count), 2))
        cosines = [np.clip(between[i, j] / max(norms[i] * norms[j], _SHORT), -1, 1) for i, j in pairs]
        cosine = np.mean(cosines) if pairs else 0.0
        denominator = 1 + (count - 1) * cosine
        ratio = 0.0 if abs(denominator) < _SINGULAR else count * cosine / denominator
        return np.array([1.0, *[ratio / count] * count])
