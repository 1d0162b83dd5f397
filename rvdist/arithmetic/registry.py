"""The methods by name."""

from __future__ import annotations

from rvdist.arithmetic.dare import Dare
from rvdist.arithmetic.linear import Linear
from rvdist.arithmetic.method import Method
from rvdist.arithmetic.ties import Ties

METHODS = ("linear", "ties", "dare")


def build(name: str, density: float, seed: int) -> Method:
    """The method of that name. Raises ValueError where there is none or its density is out of range."""
    if name == "linear":
        return Linear()
    if name not in METHODS:
        raise ValueError(f"{name!r} is not one of {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise ValueError(f"density {density} is not above 0 and at most 1")
    return Ties(density) if name == "ties" else Dare(density, seed)
