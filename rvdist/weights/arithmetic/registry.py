"""The methods by name."""

from __future__ import annotations

from rvdist.weights.arithmetic.consensus import Consensus
from rvdist.weights.arithmetic.dare import Dare
from rvdist.weights.arithmetic.linear import Linear
from rvdist.weights.arithmetic.method import Method
from rvdist.weights.arithmetic.slerp import Slerp
from rvdist.weights.arithmetic.ties import Ties

METHODS = ("linear", "ties", "dare")
RECIPE_METHODS = ("ties_sum", "ties_mean", "dare_ties_sum", "dare_ties_mean", "slerp")  # what mergekit's recipes mean


def build(name: str, density: float, seed: int) -> Method:
    """The method of that name. Raises ValueError where there is none or its density is out of range."""
    if name == "linear":
        return Linear()
    if name == "slerp":
        return Slerp()
    if name not in METHODS + RECIPE_METHODS:
        raise ValueError(f"{name!r} is not one of {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise ValueError(f"density {density} is not above 0 and at most 1")
    if name in RECIPE_METHODS:
        dare = Dare(density, seed) if name.startswith("dare") else None
        return Consensus(density, name.endswith("mean"), dare)
    return Ties(density) if name == "ties" else Dare(density, seed)
