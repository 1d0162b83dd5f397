"""The methods by name."""

from __future__ import annotations

from rvdist.arithmetic.linear import Linear
from rvdist.arithmetic.method import Method

METHODS = ("linear",)


def build(name: str, density: float, seed: int) -> Method:
    """The method of that name. Raises ValueError where there is none or its parameters are out of range."""
    if name == "linear":
        return Linear()
    raise ValueError(f"{name!r} is not one of {', '.join(METHODS)}")
