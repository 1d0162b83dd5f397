"""A tensor that lies in pieces: rectangles of it, each whole in some file, as ranks of a training save them.

Reads ranges of its elements by way of a reader of files. Knows no format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rvdist.weights.checkpoint.header import ITEMSIZE, TensorSpec

_AT_ONCE = 1 << 20  # bytes of a piece that are read to be laid out anew
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
ReadBytes = Callable[[str, int, memoryview], None]  # file, offset, what is filled


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a tensor: its first element's place, its shape, and where its own bytes are."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Assembled(TensorSpec):
    """A tensor in pieces; `file` and `offset` are those of the first."""

    pieces: tuple[Piece, ...] = ()


def assembled(name: str, dtype: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> TensorSpec:
    """The tensor that pieces make; a plain one where there is only one. Raises ValueError where they leave a hole,
    overlap, or lie otherwise than in a grid."""
    pieces = sorted((piece for piece in pieces if math.prod(piece.shape)), key=lambda piece: piece.begin)
    if math.prod(shape) == 0:
        raise ValueError(f"tensor {name} is empty")
    cuts = [sorted({(p.begin[d], p.shape[d]) for p in pieces}) for d in range(len(shape))]
    for size, row in zip(shape, cuts, strict=True):
        at = 0
        for begin, length in row:
            if begin != at:
                raise ValueError(f"the pieces of tensor {name} leave a hole or overlap")
            at += length
        if at != size:
            raise ValueError(f"the pieces of tensor {name} do not make its shape {list(shape)}")
    if len({p.begin for p in pieces}) != len(pieces) or len(pieces) != math.prod(len(row) for row in cuts):
        raise ValueError(f"the pieces of tensor {name} lack one, or one stands twice")
    first = pieces[0]
    if len(pieces) == 1:
        return TensorSpec(name, dtype, shape, first.file, first.offset)
    return Assembled(name, dtype, shape, first.file, first.offset, tuple(pieces))


def spread_over_files(spec: TensorSpec, nbytes: int) -> dict[str, int]:
    """How many of the bytes of a tensor are in which file, about; all of a plain one's are in its own."""
    if not isinstance(spec, Assembled):
        return {spec.file: nbytes}
    found: dict[str, int] = {}
    for piece in spec.pieces:
        found[piece.file] = found.get(piece.file, 0) + nbytes * math.prod(piece.shape) // spec.numel
    return found


def parts_of(spec: TensorSpec) -> list[TensorSpec]:
    """A tensor as its files have it: a part for each piece."""
    if not isinstance(spec, Assembled):
        return [spec]
    return [TensorSpec(spec.name, spec.dtype, piece.shape, piece.file, piece.offset) for piece in spec.pieces]


def read_pieces(spec: Assembled, begin: int, end: int, out: memoryview, read: ReadBytes) -> None:
    """Fills `out` with the bytes of elements [begin, end) in C order."""
    width = spec.numel // spec.shape[0] if spec.shape else 1
    first, last = begin // width, -(-end // width)
    for piece in spec.pieces:  # by where they begin
        if piece.begin and piece.begin[0] >= last:
            break
        if piece.begin and piece.begin[0] + piece.shape[0] <= first:
            continue
        for band in _bands(spec.shape, piece, ITEMSIZE[spec.dtype]):
            _read_band(piece.file, band, begin, end, out, ITEMSIZE[spec.dtype], read)


@dataclass(frozen=True, slots=True)
class _Band:
    """Rows of a tensor, `width` elements each, of which a piece has `length` from `column` on, one row after the
    other from the byte `offset` on."""

    first: int
    rows: int
    width: int
    column: int
    length: int
    offset: int


def _bands(shape: tuple[int, ...], piece: Piece, itemsize: int) -> Iterator[_Band]:
    """A piece as bands: one, but for a piece that is cut in a third dimension or later."""
    cut = max((d for d in range(len(shape)) if piece.shape[d] != shape[d]), default=0)
    inner = math.prod(shape[cut + 1 :])
    width, length, column = shape[cut] * inner, piece.shape[cut] * inner, piece.begin[cut] * inner
    rows, offset = piece.shape[cut - 1] if cut else 1, piece.offset
    for place in np.ndindex(*piece.shape[: max(0, cut - 1)]):
        first = 0
        for d, at in enumerate((*place, 0)[:cut]):
            first = first * shape[d] + piece.begin[d] + at
        yield _Band(first, rows, width, column, length, offset)
        offset += rows * length * itemsize


def _read_band(file: str, band: _Band, begin: int, end: int, out: memoryview, itemsize: int, read: ReadBytes) -> None:
    row, last = max(band.first, begin // band.width), min(band.first + band.rows, -(-end // band.width))
    while row < last:
        own = row * band.width + band.column  # the first element that the piece has of the row
        start, stop = max(begin, own), min(end, own + band.length)
        if start >= stop:
            row += 1
            continue
        count = 1
        if stop - start == band.length:  # and as many whole rows as are asked for
            count = min(last - row, (end - own - band.length) // band.width + 1)
            if band.length < band.width:
                count = min(count, max(1, _AT_ONCE // (band.length * itemsize)))
        size = (stop - start if count == 1 else count * band.length) * itemsize
        offset = band.offset + ((row - band.first) * band.length + start - own) * itemsize
        at = (start - begin) * itemsize
        if count == 1 or band.length == band.width:
            read(file, offset, out[at : at + size])
        else:
            rows = np.empty((count, band.length * itemsize), np.uint8)
            read(file, offset, rows.reshape(-1).data)
            place = np.frombuffer(out, np.uint8)[at:]
            np.lib.stride_tricks.as_strided(place, rows.shape, (band.width * itemsize, 1))[:] = rows
        row += count
