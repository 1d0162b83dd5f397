"""Methods that see a tensor as a matrix, by its singular values.

What is added to a matrix is held whole, in the working precision, and nothing else of its size: a matrix is read in
panels of columns, as often as it is needed. It is decomposed by the eigenvalues of its smaller Gram matrix, in fp64 and
in place, which takes a fraction of the time that singular values take. Directions below 10⁻⁶ of the largest singular
value count as none: fp32 cannot tell them from rounding. A tensor of three or more dimensions is a stack of matrices,
each by itself and one at a time.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rvdist.weights.arithmetic.method import Place

Chunks = Callable[..., Iterator[list[torch.Tensor]]]  # of the elements from the first given to before the second
LEAST = 1e-6  # of the largest singular value: what is smaller is none
_PANEL = 16 << 20  # bytes of a matrix, of all that are read together, that are held at a time
_BLOCK = 1 << 20  # elements of one that are widened at a time
_SLACK = 64 << 20  # bytes that LAPACK and the allocator keep
_LOCK = threading.Lock()
_inside, _before = 0, 1  # how many are in `one_thread`, and torch's threads before the first


class Matrices(ABC):
    """A method says in `change` what is added to the base, of a tensor of two dimensions or more. Of any other the mean
    of the terms is added."""

    elementwise_sum = False
    surveys_base = False

    def __init__(self) -> None:
        self._asked: tuple[Place, Chunks] | None = None
        self._held = -1, torch.empty(0)  # a matrix's number, and what is added to it

    def survey(self, place: Place, chunks: Chunks) -> None:
        """Looks at nothing: a matrix is, when the first of its elements is asked for."""
        self._asked = (place, chunks) if len(place.shape) > 1 and place.numel else None
        self._held = -1, torch.empty(0)

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        if self._asked is not None:
            size, at, end = math.prod(place.shape[-2:]), place.start, place.start + len(total)
            while at < end:
                number, offset = divmod(at, size)
                count = min(end - at, size - offset)
                own = self._change_of(number, total.dtype)[offset : offset + count]
                total[at - place.start :][:count].add_(own.to(total.device))
                at += count
            return
        mean = torch.zeros_like(total)
        for alpha, difference in zip(alphas, differences, strict=True):
            mean.add_(difference.mul_(alpha))
        total.add_(mean.div_(len(differences)))

    def _change_of(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        """What is added to a matrix, 1-d; kept until another is asked for."""
        if self._held[0] != number:
            assert self._asked, "there was no survey"
            place, chunks = self._asked
            self._held = -1, torch.empty(0)  # before there is another
            matrix = torch.empty(place.shape[-2:], dtype=dtype)  # takes memory as it is filled
            with one_thread():
                self.change(place, chunks, number, matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
            self._held = number, matrix.view(-1)
        return self._held[1]

    @abstractmethod
    def change(self, place: Place, chunks: Chunks, number: int, out: torch.Tensor) -> None:
        """Fills what is added to a matrix, (k, l) with k ≤ l: of one with more rows than columns, turned.
        `place.alphas` are those of the vectors."""

    @staticmethod
    @abstractmethod
    def bytes_held(shape: Sequence[int], rank: int, itemsize: int) -> int:
        """About how much memory a tensor takes at most, `itemsize` that of the working dtype, and `rank` that of all
        vectors together which are stored as factors."""


class Matrix:
    """One of the matrices in a tensor's elements, or several of its shape: `terms` makes them of each chunk's
    differences. k × l with k ≤ l; one with more rows than columns is turned."""

    def __init__(
        self, place: Place, chunks: Chunks, number: int, terms: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    ) -> None:
        self._rows, self._width = place.shape[-2:]
        self._first, self._chunks, self._terms = number * self._rows * self._width, chunks, terms
        self._turned = self._rows > self._width
        self.shape = min(place.shape[-2:]), max(place.shape[-2:])

    def largest(self) -> list[float]:
        """The largest magnitude in each; NaN where there is one."""
        found: list[list[torch.Tensor]] = [
            [one.abs().max() for one in terms] for _, terms in self._read(range(self._rows))
        ]
        return [float(torch.stack(each).max()) for each in zip(*found, strict=True)]

    def blocks(self) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Some columns of each, (k, w) in fp64, and which they are: the same ones at every call."""
        side, length = self.shape
        width = max(1, _BLOCK // side)
        for panel, begin in self._panels(width):
            for start in range(0, panel[0].shape[1], width):
                columns = slice(begin + start, min(begin + start + width, length))
                yield columns, [one[:, start : start + width].double() for one in panel]

    def _panels(self, multiple: int) -> Iterator[tuple[list[torch.Tensor], int]]:
        """As many columns of each as are held at a time, in the dtype they come in, and the first one's number."""
        side, length = self.shape
        probe = next(self._read(range(1)))[1]
        at_once = _PANEL // (side * len(probe) * probe[0].itemsize) // multiple * multiple or multiple
        panel = [torch.empty(0)] * len(probe)
        for begin in range(0, length, at_once):
            own = range(begin, min(begin + at_once, length))
            shape = (len(own), side) if self._turned else (side, len(own))
            if panel[0].shape != shape:
                panel = [one.new_empty(shape) for one in probe]
            rows, columns = (own, range(side)) if self._turned else (range(side), own)
            for start, terms in self._read(rows):
                for one, found in zip(terms, panel, strict=True):
                    _take(found, one, start - rows.start * self._width, self._width, columns)
            yield [found.T for found in panel] if self._turned else panel, begin

    def _read(self, rows: range) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Streams whole rows: the number of a chunk's first element in the matrix, and the terms."""
        start, stop = rows.start * self._width, rows.stop * self._width
        for differences in self._chunks(self._first + start, self._first + stop):
            terms = self._terms(differences)
            yield start, terms
            start += len(terms[0])


def _take(panel: torch.Tensor, elements: torch.Tensor, start: int, width: int, columns: range) -> None:
    """Puts those that stand in these columns into the panel, of 1-d `elements` of rows of this width."""
    row, column = divmod(start, width)
    while len(elements):
        if column or len(elements) < width:
            taken = min(width - column, len(elements))
            first, last = max(column, columns.start), min(column + taken, columns.stop)
            if first < last:
                own = elements[first - column : last - column]
                panel[row, first - columns.start : last - columns.start] = own
        else:
            count = len(elements) // width
            taken = count * width
            panel[row : row + count] = elements[:taken].view(count, width)[:, columns.start : columns.stop]
        row, column = divmod(row * width + column + taken, width)
        elements = elements[taken:]


def spectrum(side: int, blocks: Iterable[torch.Tensor], largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The singular values of a matrix (k, l), smallest first, and the left singular vectors as columns (k, r): fp64,
    those r that are not none. It is given by blocks of its columns, and by its largest magnitude. Takes 24·k² bytes, of
    which it leaves a third."""
    gram = torch.zeros(side, side, dtype=torch.float64)
    scale = _power(largest)
    for block in blocks:
        wide = block * scale
        gram.addmm_(wide, wide.T)
        del block, wide  # before LAPACK takes its share
    squares, vectors = torch.empty(side, dtype=torch.float64), gram.T
    torch.linalg.eigh(vectors, out=(squares, vectors))  # in place, in LAPACK's order
    least = float(squares[-1].clamp(min=0)) * LEAST**2 if side else 0.0
    first = int((squares <= least).sum())
    return squares[first:].sqrt() / scale, vectors[:, first:]


def inverse_root(values: torch.Tensor, vectors: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """factor · (M·Mᵀ)^(−1/2) by what `spectrum` found of M, which it overwrites."""
    vectors.mul_((factor / values).sqrt())
    return vectors @ vectors.T


def of_columns(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`spectrum` of the transpose of a matrix that is held in fp64, of columns of about length 1."""
    width = max(1, _BLOCK // max(1, columns.shape[1]))
    starts = range(0, columns.shape[0], width)
    return spectrum(columns.shape[1], (columns[start : start + width].T for start in starts), 1.0)


def _power(largest: float) -> float:
    """A power of two that brings a matrix so near to 1 that no square of its singular values over- or underflows."""
    return 2.0 ** -max(-1000, min(1000, math.frexp(largest)[1]))


@dataclass(frozen=True)
class Factors:
    """left·diag(values)·rightᵀ in fp64, columns orthonormal, largest value first: (k, r), (r,), (l, r)."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def factors(matrix: Matrix, largest: float) -> Factors:
    """A matrix's singular values and vectors, those that are not none."""
    side, length = matrix.shape
    values, left = (found.flip(-1) for found in spectrum(side, (block for _, (block,) in matrix.blocks()), largest))
    right = torch.empty(length, len(values), dtype=torch.float64)
    for columns, (block,) in matrix.blocks():
        right[columns] = block.T @ (left / values)
    return Factors(left, values, right)


def fill(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out = left @ right.T, rounded once."""
    width = max(1, _BLOCK // max(1, out.shape[0]))
    for begin in range(0, out.shape[1], width):
        out[:, begin : begin + width] = left @ right[begin : begin + width].T


def held(shape: Sequence[int], itemsize: int, while_found: int, while_added: int) -> int:
    """About how many bytes are held at most for a matrix: so many times fp64's of a square of the smaller side while
    what is added is found, and beside that while it is added up."""
    one, square = shape[-2] * shape[-1], min(shape[-2:]) ** 2 * 8
    panels = min(_PANEL, 2 * one * itemsize) + min(4 * _BLOCK, 4 * one) * 8 + min(_SLACK, 8 * one * itemsize)
    return max(while_found * square, one * itemsize + while_added * square) + panels


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
