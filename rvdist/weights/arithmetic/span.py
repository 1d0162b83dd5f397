"""Methods whose result is a sum of whole tensors by numbers that follow from their lengths and angles.

r = c_0·t + Σ c_k·d_k. The inner products of t and all d_k are found in fp64 in one pass over the tensor; from them come
the c, in fp64 and rounded to fp32, so that they do not hang on the order in which the products were summed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rvdist.weights.arithmetic.method import Place

Numbers = NDArray[np.float64]


class Span(ABC):
    """A method says in `coefficients` what its c are."""

    elementwise_sum = False
    surveys_base = True

    def __init__(self) -> None:
        self._products: Numbers = np.zeros((1, 1))

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        products = torch.zeros((), dtype=torch.float64)
        for tensors in chunks():
            rows = torch.stack([tensor.double() for tensor in tensors])
            products = products + rows @ rows.T
        self._products = products.numpy()

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        own, *others = self.coefficients(self._products, np.array(alphas)).astype(np.float32).tolist()
        if own != 1:
            total.mul_(own)
        for number, difference in zip(others, differences, strict=True):
            total.add_(difference.mul_(number))

    @abstractmethod
    def coefficients(self, products: Numbers, alphas: Numbers) -> Numbers:
        """c_0, c_1, …, from the inner products of t, d_1, …"""


def of_models(products: Numbers) -> Numbers:
    """The inner products of the models t, t + d_1, …, from those of t, d_1, …"""
    models = np.eye(len(products))
    models[:, 0] = 1
    return models @ products @ models.T


def as_differences(members: Numbers) -> Numbers:
    """The coefficients of t, d_1, … from those of the models t, t + d_1, …"""
    return np.array([members.sum(), *members[1:]])
