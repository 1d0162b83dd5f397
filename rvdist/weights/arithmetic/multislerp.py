"""The weighted mean direction of any number of vectors, or models, at their mean length: mergekit's Multi-SLERP.

Source: Goddard, Multi-SLERP, goddard.blog/posts/multislerp-wow-what-a-cool-idea; mergekit 0.1.5's `multislerp`. With
u_k = v_k / (‖v_k‖ + 10⁻⁸) of one tensor and the weights w_k:

    m = Σ w_k·u_k        r = (Σ w_k·‖v_k‖) · m / ‖m‖        Σ w_k·v_k where ‖m‖ < 10⁻⁸

    vectors            v_k = d_k, w_k = α_k, and t is added to r
    the base among     v_0 = t, v_k = t + d_k, w_k = α_k, w_0 = 1 − Σ α_k

The step in the tangent space at m that mergekit takes then has no length: m is where it vanishes.
"""

from __future__ import annotations

import math

import numpy as np

from rvdist.weights.arithmetic.span import Numbers, Span, as_differences, of_models

_SHORT = 1e-8


class Multislerp(Span):
    """For any number of vectors."""

    def coefficients(self, products: Numbers, alphas: Numbers) -> Numbers:
        return np.array([1.0, *mean_direction(products[1:, 1:], alphas)])


class MultislerpModels(Span):
    """For any number of vectors; the base is one of the models, with what weight the others leave."""

    def coefficients(self, products: Numbers, alphas: Numbers) -> Numbers:
        return as_differences(mean_direction(of_models(products), np.array([1 - alphas.sum(), *alphas])))


def mean_direction(products: Numbers, weights: Numbers) -> Numbers:
    """The coefficients of the vectors that have these products."""
    norms = np.sqrt(products.diagonal())
    units = weights / (norms + _SHORT)
    length = math.sqrt(max(float(units @ products @ units), 0.0))
    return weights if length < _SHORT else np.asarray(units * (float(weights @ norms) / length))
