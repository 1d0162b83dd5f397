"""Methods that see a tensor as a matrix, by its singular values.

A matrix is read in panels, as often as it is needed, and what is added to it is computed in panels of rows, when their
elements are asked for: neither is held whole. It is decomposed by the eigenvalues of its smaller Gram matrix, in fp64,
which takes a fraction of the time that singular values take. Directions below 10⁻⁶ of the largest singular value count
as none: fp32 cannot tell them from rounding. A tensor of three or more dimensions is a stack of matrices, each by
itself and one at a time. How panels are cut follows from shapes, so that bits do not depend on what is asked for first.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from rvdist.weights.arithmetic.aside import Aside
from rvdist.weights.arithmetic.method import Place
from rvdist.weights.arithmetic.symmetric import eigh, give_back, one_thread_of_blas

Chunks = Callable[..., Iterator[list[torch.Tensor]]]  # of the elements from the first given to before the second
Change = Callable[[range, range, torch.Tensor], None]  # fills these rows and columns of what is added, in fp64
LEAST = 1e-6  # of the largest singular value: what is smaller is none
_PANEL = 64 << 20  # bytes of a matrix, of all that are read together, that are held at a time; and of what is added
_BLOCK = 1 << 20  # elements of them that are widened at a time
_TILE = 512  # rows of a square that are computed at a time
_SLACK = 64 << 20  # bytes that LAPACK and the allocator keep, and of libraries that are not used else
_LOCK = threading.Lock()
_inside, _before = 0, 1  # how many are in `one_thread`, and torch's threads before the first
_limits = ExitStack()  # what gives BLAS its threads again


class Matrices(ABC):
    """A method says in `change` what is added to the base, of a tensor of two dimensions or more. Of any other the mean
    of the terms is added."""

    elementwise_sum = False
    surveys_base = False

    def __init__(self) -> None:
        self._asked: tuple[Place, Chunks] | None = None
        self._changed: tuple[int, Change] | None = None  # a matrix's number, and what is added to it
        self._held = -1, torch.empty(0)  # the first element of a panel of this, and the panel

    def survey(self, place: Place, chunks: Chunks) -> None:
        """Looks at nothing: a matrix is, when the first of its elements is asked for."""
        self._asked = (place, chunks) if len(place.shape) > 1 and place.numel else None
        self._changed, self._held = None, (-1, torch.empty(0))

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        if self._asked is not None:
            at, end = place.start, place.start + len(total)
            while at < end:
                begin, panel = self._panel_at(at)
                own = panel[at - begin :][: end - at].to(total.dtype)
                total[at - place.start :][: len(own)].add_(own.to(total.device))
                at += len(own)
                del panel, own  # before there is another
            return
        mean = torch.zeros_like(total)
        for alpha, difference in zip(alphas, differences, strict=True):
            mean.add_(difference.mul_(alpha))
        total.add_(mean.div_(len(differences)))

    def _panel_at(self, at: int) -> tuple[int, torch.Tensor]:
        """Whole rows of what is added, 1-d and in fp64, among them the element `at`, and the first of these elements:
        kept until others are asked for."""
        assert self._asked, "there was no survey"
        place, chunks = self._asked
        rows, width = place.shape[-2:]
        number, row = at // (rows * width), at // width % rows
        at_once = max(1, _PANEL // (8 * max(width, len(place.alphas) * min(rows, width))))
        own = range(row // at_once * at_once, min((row // at_once + 1) * at_once, rows))
        begin = (number * rows + own.start) * width
        if self._held[0] != begin:
            self._held = -1, torch.empty(0)
            with one_thread():
                if not self._changed or self._changed[0] != number:
                    self._changed = None
                    self._changed = number, self.change(place, chunks, number)
                give_back()
                panel = torch.empty(len(own), width, dtype=torch.float64)
                if rows > width:
                    self._changed[1](range(width), own, panel.T)
                else:
                    self._changed[1](own, range(width), panel)
            self._held = begin, panel.view(-1)
        return self._held

    @abstractmethod
    def change(self, place: Place, chunks: Chunks, number: int) -> Change:
        """What is added to a matrix, (k, l) with k ≤ l: of one with more rows than columns, turned. All rows are asked
        for, or all columns. `place.alphas` are those of the vectors."""

    @staticmethod
    @abstractmethod
    def bytes_held(shape: Sequence[int], rank: int, itemsize: int) -> int:
        """About how much memory a tensor takes at most, `itemsize` that of the working dtype, and `rank` that of all
        vectors together which are stored as factors."""

    @staticmethod
    def bytes_aside(shape: Sequence[int], count: int) -> int:
        """How much of the temporary directory a tensor that `count` vectors change takes at most."""
        return 0


def nothing(rows: range, columns: range, out: torch.Tensor) -> None:
    """A change by none."""
    out.zero_()


def no_number(rows: range, columns: range, out: torch.Tensor) -> None:
    """That of a matrix which is not finite: it has no singular values, and is told of as any such result."""
    out.fill_(torch.nan)


class Matrix:
    """One of the matrices in a tensor's elements, or several of its shape: `terms` makes them of each chunk's
    differences. k × l with k ≤ l; one with more rows than columns is turned."""

    def __init__(
        self, place: Place, chunks: Chunks, number: int, terms: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    ) -> None:
        self._rows, self._width = place.shape[-2:]
        self._first, self._chunks, self._terms = number * self._rows * self._width, chunks, terms
        self.turned = self._rows > self._width
        self.shape = min(place.shape[-2:]), max(place.shape[-2:])

    def largest(self) -> list[float]:
        """The largest magnitude in each; NaN where there is one."""
        # not as tensors: each would stand in the way where a chunk's memory is free for the next
        found = [[float(one.abs().max()) for one in terms] for _, terms in self._read(range(self._rows))]
        most: list[float] = torch.tensor(found, dtype=torch.float64).amax(0).tolist()
        return most

    def blocks(self, columns: range | None = None, share: int = 1) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Some columns of each, (k, w) in fp64, and which of `columns` they are, which are all unless it is turned: the
        same ones at every call. Held at a time are so many bytes as a panel has, or this share of them, 1 / `share`."""
        side, length = self.shape
        columns = range(length) if columns is None else columns
        count, itemsize = self._probe()
        width = max(1, _BLOCK // (side * count))
        at_once = _PANEL // share // (side * count * itemsize) // width * width or width
        own = [columns[begin : begin + at_once] for begin in range(0, len(columns), at_once)]
        ranges = [(some, range(side)) if self.turned else (range(side), some) for some in own]
        for some, panel in zip(own, self._panels(ranges), strict=True):
            if self.turned:
                panel = [found.T for found in panel]
            for start in range(0, len(some), width):
                begin, end = some.start - columns.start + start, min(start + width, len(some))
                yield slice(begin, begin + end - start), [one[:, start:end].double() for one in panel]

    def multiply(self, factors: Sequence[torch.Tensor], columns: range, out: torch.Tensor) -> None:
        """out = Σ factor · matrix, of factors (r, k) in fp64, a matrix each, and these columns: of a matrix that is not
        turned all, which takes one reading."""
        if self.turned:
            for own, blocks in self.blocks(columns):
                out[:, own] = sum(factor @ block for factor, block in zip(factors, blocks, strict=True))
            return
        (side, length), (count, _) = self.shape, self._probe()
        deep, width = max(1, 4 * _BLOCK // (length * count)), max(1, _BLOCK // (side * count))
        taken = [range(begin, min(begin + deep, side)) for begin in range(0, side, deep)]
        out.zero_()
        for some, panel in zip(taken, self._panels([(some, columns) for some in taken]), strict=True):
            for factor, rows in zip(factors, panel, strict=True):
                left = factor[:, some.start : some.stop]
                for start in range(0, length, width):
                    out[:, start : start + width].addmm_(left, rows[:, start : start + width].double())

    def _probe(self) -> tuple[int, int]:
        """How many matrices there are, and the bytes of an element."""
        terms = next(self._read(range(1)))[1]
        return len(terms), terms[0].itemsize

    def _panels(self, ranges: Iterable[tuple[range, range]]) -> Iterator[list[torch.Tensor]]:
        """These rows and columns of each, as they lie and in the dtype they come in; valid until the next, in the same
        memory: the first are as many as any."""
        room: list[torch.Tensor] = []
        for rows, columns in ranges:
            shape = len(rows), len(columns)
            for start, terms in self._read(rows):
                room = room or [one.new_empty(math.prod(shape)) for one in terms]
                panel = [one[: math.prod(shape)].view(shape) for one in room]
                for one, found in zip(terms, panel, strict=True):
                    _take(found, one, start - rows.start * self._width, self._width, columns)
            yield panel

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
    those r that are not none. It is given by blocks of its columns, and by its largest magnitude. Takes 16·k² bytes, of
    which it leaves half."""
    gram = torch.empty(side, side, dtype=torch.float64)
    tiles = [slice(start, min(start + _TILE, side)) for start in range(0, side, _TILE)]
    for own in tiles:
        gram[own, : own.stop] = 0
    scale = _power(largest)
    for block in blocks:
        wide = block * scale
        for own in tiles:
            gram[own, : own.stop].addmm_(wide[own], wide[: own.stop].T)
        del block, wide  # before LAPACK takes its share
    squares, vectors = eigh(gram)
    least = float(squares[-1].clamp(min=0)) * LEAST**2
    first = int((squares <= least).sum())
    return squares[first:].sqrt() / scale, vectors[:, first:]


def inverse_root(values: torch.Tensor, vectors: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """factor · (M·Mᵀ)^(−1/2) by what `spectrum` found of M, which it overwrites."""
    vectors.mul_((factor / values).sqrt())
    return vectors @ vectors.T


def mirror(square: torch.Tensor) -> torch.Tensor:
    """Makes one that is symmetric but for rounding so to the bit: below the diagonal's tiles what is above."""
    for start in range(0, len(square), _TILE):
        square[start : start + _TILE, :start] = square[:start, start : start + _TILE].T
    return square


def times_inverse_root(matrix: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> None:
    """Multiplies in place by (M·Mᵀ)^(−1/2) from the right, by what `spectrum` found of M, which it overwrites."""
    vectors.mul_(values.rsqrt())
    for start in range(0, len(matrix), _TILE):
        own = matrix[start : start + _TILE]
        torch.mm(own @ vectors, vectors.T, out=own)


def of_rows(matrix: Aside) -> tuple[torch.Tensor, torch.Tensor]:
    """`spectrum` of a matrix that is aside, of rows of about length 1."""

    def blocks() -> Iterator[torch.Tensor]:
        whole = matrix.read()  # which is gone when they are
        width = max(1, _BLOCK // len(whole))
        for start in range(0, whole.shape[1], width):
            yield whole[:, start : start + width]

    return spectrum(matrix.rows, blocks(), 1.0)


def product(turned: Aside, matrix: torch.Tensor) -> Aside:
    """The product of the transpose of a matrix that is aside with another one, aside."""
    whole = turned.read()
    found = Aside(whole.shape[1], matrix.shape[1])
    for start in range(0, whole.shape[1], _TILE):
        found.append(whole[:, start : start + _TILE].T @ matrix)
    return found


def _power(largest: float) -> float:
    """A power of two that brings a matrix so near to 1 that no square of its singular values over- or underflows."""
    return 2.0 ** -max(-1000, min(1000, math.frexp(largest)[1]))


def held(shape: Sequence[int], itemsize: int) -> int:
    """About how many bytes are held at most for a matrix: two squares of the smaller side in fp64 while it is
    decomposed, or one beside panels."""
    one, square = shape[-2] * shape[-1], min(shape[-2:]) ** 2 * 8
    blocks, slack = min(4 * _BLOCK, 4 * one) * 8, min(_SLACK, 8 * one * itemsize)
    return square + max(square, min(2 * _PANEL, 16 * one)) + blocks + slack


def panel_held(shape: Sequence[int], itemsize: int) -> int:
    """The same for a matrix that is not read, and of which no square is held: of a panel of what is added."""
    one = shape[-2] * shape[-1]
    return min(_PANEL, 8 * one) + min(_SLACK, 8 * one * itemsize)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for LAPACK, whose sums hang on how many there are. Several of our threads may be inside at once."""
    global _inside, _before
    with _LOCK:
        if not _inside:
            _before = torch.get_num_threads()
            _limits.enter_context(one_thread_of_blas())
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                torch.set_num_threads(_before)
                _limits.close()
