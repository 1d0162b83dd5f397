"""Sums of products over a tensor that comes in chunks: the same bits wherever the chunks end.

Elements are summed pairwise in blocks that begin at fixed places of the tensor, and the blocks one after the other
with what each addition loses carried along (Neumaier, ZAMM 54 (1974) 39); all in fp64, without fused operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
BLOCK = 16 * 1024  # elements: 128 KiB, which a core's second cache holds


class Dot:
    """Σ aᵢ·bᵢ. Every `add` but the last takes a multiple of BLOCK elements."""

    def __init__(self) -> None:
        self._total = self._lost = 0.0

    def add(self, a: Floats, b: Floats, scratch: Floats) -> None:
        """Adds the products of two 1-d arrays, which `scratch` has room for."""
        products = np.multiply(a, b, out=scratch[: len(a)])
        whole = len(a) // BLOCK * BLOCK
        sums: list[float] = products[:whole].reshape(-1, BLOCK).sum(axis=1).tolist()
        for value in [*sums, float(products[whole:].sum())]:
            total = self._total + value
            larger, smaller = (self._total, value) if abs(self._total) >= abs(value) else (value, self._total)
            self._lost += (larger - total) + smaller
            self._total = total

    @property
    def value(self) -> float:
        """The sum so far."""
        return self._total + self._lost
