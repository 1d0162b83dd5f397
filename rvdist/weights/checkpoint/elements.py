"""Reads and compares elements of tensors as they are stored, here or at the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import (
    ITEMSIZE,
    TensorSpec,
    unreadable,
)
from rvdist.weights.checkpoint.pieces import Assembled, read_pieces
from rvdist.weights.checkpoint.stacked import Stacked

_BLOCK = 4 << 20


def hold_the_same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether all tensors are the same to the byte, in whatever files; reads up to the first that differs, a little of
    each tensor first. Of files that are still at the Hub it is known where these are the same."""
    stacked = isinstance(one, Stacked) or isinstance(other, Stacked)  # the same files may be in another order
    if one.path == other.path or (not stacked and [*one.stamps.values()] == [*other.stamps.values()]):
        return True
    if type(one) is not Checkpoint or type(other) is not Checkpoint:  # what is computed or scaled is not looked at
        return False
    if one.hub or other.hub or one.tensors.keys() != other.tensors.keys():
        return False
    pairs = [(spec, other.tensors[name]) for name, spec in one.tensors.items()]
    if any((spec.dtype, spec.shape) != (twin.dtype, twin.shape) for spec, twin in pairs):
        return False
    return all(equal_bytes(one, spec, other, twin, most) for most in (1024, None) for spec, twin in pairs)


def equal_bytes(
    one: Checkpoint, spec: TensorSpec, other: Checkpoint, twin: TensorSpec, most: int | None = None
) -> bool:
    """Whether the middle `most` elements of two tensors of one dtype and shape are the same bytes, or all; reads up to
    the first block that differs. Raises BadInput."""
    count = spec.numel if most is None else min(most, spec.numel)
    begin, block = (spec.numel - count) // 2, _BLOCK // ITEMSIZE[spec.dtype]
    return all(
        read_elements(one, spec, k, size) == read_elements(other, twin, k, size)
        for k in range(begin, begin + count, block)
        for size in [min(block, begin + count - k)]
    )


def read_elements(checkpoint: Checkpoint, spec: TensorSpec, start: int, count: int) -> bytes:
    """The bytes of `count` elements of a tensor as they are stored, from the flat index `start` on. Raises BadInput."""
    itemsize = ITEMSIZE[spec.dtype]
    offset = spec.offset + start * itemsize
    if checkpoint.hub:
        from rvdist.weights.checkpoint.hub import read_bytes  # the Hub's client takes a while to import

        return read_bytes(checkpoint, spec.file, offset, offset + count * itemsize)
    if isinstance(spec, Assembled):
        whole = bytearray(count * itemsize)

        def fill(file: str, offset: int, memory: memoryview) -> None:
            memory[:] = _read_bytes(checkpoint.path / file, offset, len(memory))

        read_pieces(spec, start, start + count, memoryview(whole), fill)
        return bytes(whole)
    return _read_bytes(checkpoint.path / spec.file, offset, count * itemsize)


def _read_bytes(path: Path, offset: int, size: int) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            raw = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(raw) < size:
        raise BadInput(f"{path}: was truncated while it was read; run again when it is at rest")
    return raw
