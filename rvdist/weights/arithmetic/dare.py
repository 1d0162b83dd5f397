"""DARE: drop elements of every vector at random, rescale those that stay, and sum.

Source: Language Models are Super Mario, arXiv 2311.03099, section 3. With d_k the differences, in working precision
and with one rounding an operation: r = t + Σ b_k·(α_k / density)·d_k, in listed order, where b_k is 1 with
probability `density` and else 0, for each element by itself.

The draws are counted, not drawn in turn: element i of the k-th vector of a tensor always gets the i-th draw of a
stream that (seed, k, tensor name) names. So they depend neither on chunks nor on who computes what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rvdist.weights.arithmetic.method import Place

_DRAWS = 8  # of 32 bits, in one step of Philox's counter


class Dare:
    """`density` is the probability with which an element stays, (0, 1]."""

    elementwise_sum = False
    surveys_base = False

    def __init__(self, density: float, seed: int) -> None:
        self._density = density
        self._seed = seed

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        """Needs no survey."""

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        for vector, (alpha, difference) in enumerate(zip(alphas, differences, strict=True)):
            self.drop(difference, alpha, vector, place)
            total.add_(difference)

    def drop(self, difference: torch.Tensor, alpha: float, vector: int, place: Place) -> None:
        """b_k·(α / density)·d_k, in place; `vector` is k."""
        density = place.densities[vector] if place.densities else self._density
        difference.mul_(alpha / density)
        if density < 1:
            drawn = draws(self._seed, place.tensor, vector, place.start, difference.numel())
            kept = torch.from_numpy((drawn < round(density * 2**32)).astype(np.float32))
            difference.mul_(kept.to(difference.device))


def draws(seed: int, tensor: str, vector: int, start: int, n: int) -> NDArray[np.uint32]:
    """Those of the elements [start, start + n) of the vector's tensor: evenly from 0 to 2³² − 1."""
    name = hashlib.blake2b(f"{seed} {vector} {tensor}".encode(), digest_size=16).digest()
    stream = np.random.Philox(key=int.from_bytes(name, "little"))
    steps, skip = divmod(start, _DRAWS)
    stream.advance(steps)
    return stream.random_raw((skip + n + 1) // 2).astype("<u8", copy=False).view("<u4")[skip : skip + n]
