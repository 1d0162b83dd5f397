"""Methods that see a tensor as a matrix, by its singular values.

A matrix is held whole, in the working precision. It is decomposed by the eigenvalues of its smaller Gram matrix, in
fp64, which takes a fraction of the time that singular values take. Directions below 10⁻⁶ of the largest singular value
count as none: fp32 cannot tell them from rounding. A tensor of three or more dimensions is a stack of matrices.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rvdist.weights.arithmetic.method import Place

Chunks = Callable[[], Iterator[list[torch.Tensor]]]
LEAST = 1e-6  # of the largest singular value: what is smaller is none
_BLOCK = 1 << 20  # elements of a matrix that are widened at a time
_LOCK = threading.Lock()
_inside, _before = 0, 1  # how many are in `one_thread`, and torch's threads before the first


class Matrices(ABC):
    """A method says in `change` what is added to the base, of a tensor of two dimensions or more. Of any other the mean
    of the terms is added."""

    elementwise_sum = False
    surveys_base = False

    def __init__(self) -> None:
        self._change: torch.Tensor | None = None

    def survey(self, place: Place, chunks: Chunks) -> None:
        self._change = None  # before there is another
        if len(place.shape) > 1 and place.numel:
            with one_thread():
                self._change = self.change(place, chunks)

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        if self._change is not None:
            total.add_(self._change[place.start : place.start + len(total)].to(total.device))
            return
        mean = torch.zeros_like(total)
        for alpha, difference in zip(alphas, differences, strict=True):
            mean.add_(difference.mul_(alpha))
        total.add_(mean.div_(len(differences)))

    @abstractmethod
    def change(self, place: Place, chunks: Chunks) -> torch.Tensor:
        """All elements of the change, 1-d, of the working dtype. `place.alphas` are those of the vectors."""

    @staticmethod
    @abstractmethod
    def bytes_held(shape: Sequence[int], vectors: int, itemsize: int) -> int:
        """About how much memory a tensor takes at most, `itemsize` that of the working dtype."""


def gather(place: Place, chunks: Chunks, term: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
    """All elements of what `term` makes of each chunk's differences, 1-d."""
    whole, begin = torch.empty(0), 0
    for differences in chunks():
        part = term(differences)
        if not begin:
            whole = torch.empty(place.numel, dtype=part.dtype)
        whole[begin : begin + len(part)] = part
        begin += len(part)
    return whole


def by_matrices(place: Place, whole: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of the matrices in a tensor's elements, (k, l) with k ≤ l: of one with more rows than columns, turned."""
    for matrix in whole.view(-1, *place.shape[-2:]):
        yield matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def spectrum(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The singular values of a matrix (k, l), k ≤ l, largest first, and the left singular vectors as columns (k, r):
    fp64, those r that are not none."""
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    scale = _power(matrix)
    for columns in _blocks(matrix):
        wide = matrix[:, columns].double() * scale
        gram.addmm_(wide, wide.T)
    squares, vectors = torch.linalg.eigh(gram)
    least = float(squares[-1].clamp(min=0)) * LEAST**2
    first = int((squares <= least).sum())  # they come smallest first
    return squares[first:].sqrt().flip(0) / scale, vectors[:, first:].flip(1)


def _power(matrix: torch.Tensor) -> float:
    """A power of two that brings a matrix so near to 1 that no square of its singular values over- or underflows."""
    most = max(float(matrix[:, columns].abs().max()) for columns in _blocks(matrix))
    return 2.0 ** -max(-1000, min(1000, math.frexp(most)[1]))


@dataclass(frozen=True)
class Factors:
    """left·diag(values)·rightᵀ in fp64, columns orthonormal, largest value first: (k, r), (r,), (l, r)."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def factors(matrix: torch.Tensor, most: int) -> Factors | None:
    """At most so many of a matrix's singular values and vectors, those that are not none; None where it is not
    finite."""
    if not matrix.isfinite().all():
        return None
    values, left = (found[..., :most] for found in spectrum(matrix))
    right = torch.empty(matrix.shape[1], len(values), dtype=torch.float64)
    for columns in _blocks(matrix):
        right[columns] = matrix[:, columns].double().T @ (left / values)
    return Factors(left.clone(), values, right)  # not a view of all that were found


def fill(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out = left @ right.T, rounded once."""
    for columns in _blocks(out):
        out[:, columns] = left @ right[columns].T


def multiply(left: torch.Tensor, matrix: torch.Tensor) -> None:
    """matrix = left @ matrix in fp64, rounded once, in place. `left`: (k, k), fp64."""
    for columns in _blocks(matrix):
        matrix[:, columns] = left @ matrix[:, columns].double()


def _blocks(matrix: torch.Tensor) -> Iterator[slice]:
    width = max(1, _BLOCK // max(1, matrix.shape[0]))
    for begin in range(0, matrix.shape[1], width):
        yield slice(begin, begin + width)


def elements(shape: Sequence[int]) -> tuple[int, int, int]:
    """Of a tensor of matrices: its elements, those of one matrix, and its smaller side."""
    return math.prod(shape), shape[-2] * shape[-1], min(shape[-2:])


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for LAPACK, whose sums hang on how many there are. Several of our threads may be inside at once."""
    global _inside, _before
    with _LOCK:
        if not _inside:
            _before = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                torch.set_num_threads(_before)
