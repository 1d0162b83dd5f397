"""Products of factors, as adapters and low-rank vectors hold them, by ranges of elements; DoRA's rows of them;
and the factors of many matrices, which lie in turn.

What is computed has the same bits whatever the ranges. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

Floats = np.ndarray[Any, np.dtype[np.float64]]
_BLOCK = 128 * 1024  # elements
_WINDOW = 16 << 20  # bytes of left factors that lie in turn


def multiply(left: torch.Tensor, right: torch.Tensor, scale: float, begin: int, out: torch.Tensor) -> None:
    """Fills `out`, 1-d, fp32 or fp64, with the elements of scale · left · right from the flat index `begin`.

    The factors have at most 24 significant bits, so that fp64 holds their products: whether a multiplication and an
    addition are fused changes nothing."""
    columns = right.shape[1]
    for first, last, start, stop in _rectangles(begin, begin + out.numel(), columns):
        total = torch.zeros(last - first, stop - start, dtype=torch.float64)
        for k in range(right.shape[0]):
            total.addcmul_(left[first:last, k, None].double(), right[k, None, start:stop].double())
        offset = first * columns + start - begin
        out[offset : offset + total.numel()] = total.mul_(scale).view(-1)


class Interleaved:
    """The left factors [rows, rank] of `count` matrices, which lie as columns of one of this `shape`: every count-th is
    the next of a matrix. `read` gives its elements from a flat index up to another, in any dtype.

    Holds those of some matrices, which are next to each other: as many as _WINDOW bytes hold, or one."""

    def __init__(self, shape: tuple[int, ...], count: int, read: Callable[[int, int], torch.Tensor]) -> None:
        self._rows, self._width, self._count, self._read = *shape, count, read
        self._held = range(0), torch.empty(0)

    def __getitem__(self, number: int) -> torch.Tensor:
        """That of one matrix; valid until another is asked for."""
        if number not in self._held[0]:
            self._held = range(0), torch.empty(0)  # before there is another
            self._held = self._load(number)
        return self._held[1][number - self._held[0].start]

    def _load(self, number: int) -> tuple[range, torch.Tensor]:
        rank, itemsize = self._width // self._count, self._read(0, 1).itemsize
        size = max(1, _WINDOW // (self._rows * rank * itemsize))
        own = range(number // size * size, min((number // size + 1) * size, self._count))
        held, at_once = torch.empty(0), max(1, _BLOCK // self._width)
        for first in range(0, self._rows, at_once):
            last = min(first + at_once, self._rows)
            part = self._read(first * self._width, last * self._width).view(last - first, rank, self._count)
            if not first:
                held = part.new_empty(len(own), self._rows, rank)
            held[:, first:last] = part[:, :, own.start : own.stop].permute(2, 0, 1)
        return own, held


def _rectangles(begin: int, end: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Flat elements [begin, end) of a matrix as (first row, last row, first column, last column), ends exclusive: a
    part of a row, whole rows, a part of a row."""
    while begin < end:
        row, column = divmod(begin, columns)
        if column or end - begin < columns:
            stop = min(columns, column + end - begin)
            yield row, row + 1, column, stop
            begin += stop - column
        else:
            last = end // columns
            yield row, last, 0, columns
            begin = last * columns


class Rescaled:
    """DoRA's difference, W − W0 of a matrix W0 [rows, columns]: W is W0 + scale · left · right with each row, or each
    column where `by_columns`, as long as `magnitude` says. By blocks of whole rows, of which it holds one, in fp64.

    `read` gives elements of W0 from a flat index on. Where a norm is 0 there is no direction: what it gives is not
    finite. Source: peft's tuners/lora/variants.py (`DoraLinearVariant.merge_safe`) and dora.py (`get_weight_norm`)."""

    def __init__(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        scale: float,
        magnitude: torch.Tensor,
        by_columns: bool,
        read: Callable[[int, int], torch.Tensor],
    ) -> None:
        self._left, self._right, self._scale, self._read = left, right, scale, read
        self._shape = left.shape[0], right.shape[1]
        self._rows = max(1, _BLOCK // max(1, self._shape[1]))
        self._held = -1, torch.empty(0)
        self._magnitude, self._by_columns = magnitude.double().numpy(), by_columns
        self._of_columns = self._norms_of_columns() if by_columns else None

    def fill(self, begin: int, out: torch.Tensor) -> None:
        """Fills `out`, 1-d, with the elements from the flat index `begin`, rounded once to its dtype."""
        size, at, end = self._rows * self._shape[1], begin, begin + out.numel()
        while at < end:
            k, offset = divmod(at, size)
            if self._held[0] != k:
                self._held = k, self._difference(k)
            count = min(end - at, size - offset)
            out[at - begin : at - begin + count] = self._held[1][offset : offset + count]
            at += count

    def _moved(self, k: int) -> tuple[Floats, Floats]:
        """Block k of W0, and of W0 + scale · left · right."""
        first, last = k * self._rows, min((k + 1) * self._rows, self._shape[0])
        columns = self._shape[1]
        base = self._read(first * columns, last * columns).double()
        change = torch.empty_like(base)
        multiply(self._left, self._right, self._scale, first * columns, change)
        return base.view(-1, columns).numpy(), change.add_(base).view(-1, columns).numpy()

    def _difference(self, k: int) -> torch.Tensor:
        base, moved = self._moved(k)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if self._of_columns is not None:
                factors = (self._magnitude / self._of_columns)[None, :]
            else:
                norms = np.sqrt([np.add.reduce(row) for row in np.square(moved)])
                factors = (self._magnitude[k * self._rows :][: len(norms)] / norms)[:, None]
            return torch.from_numpy(factors * moved - base).view(-1)

    def _norms_of_columns(self) -> Floats:
        """Summed row by row, from the first on."""
        total = np.zeros(self._shape[1])
        for k in range(-(-self._shape[0] // self._rows)):
            for row in np.square(self._moved(k)[1]):
                total += row
        return np.sqrt(total)
