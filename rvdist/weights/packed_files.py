"""Packed tensors as files have them: some elements made whole, or located for a sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rvdist.weights.arithmetic.blocks import PackedFiles
from rvdist.weights.checkpoint.difference import BLOCK, Packed
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.packed import bits, spread

Read = Callable[[TensorSpec, int, int], torch.Tensor]  # elements [begin, end) of a part, in memory that the next gets
Find = Callable[[TensorSpec, int], tuple[int, int] | None]  # as `TensorFiles.locate`


class Blocks(NamedTuple):
    """The blocks of a packed tensor that have some elements: how many values there are before each and the end,
    where the elements begin and the tensor ends in them, and what of the parts is theirs. Valid until the next."""

    starts: NDArray[np.int64]
    first: int
    limit: int
    where: tuple[int, int]
    values: tuple[int, int]


def find_blocks(form: Packed, numel: int, begin: int, end: int, read: Read) -> Blocks | None:
    """The blocks of elements [begin, end) of a tensor that has so many; None where `starts` says what cannot be."""
    first, last = begin // BLOCK, -(-end // BLOCK)
    starts = read(form.starts, first, last + 1).numpy()
    counts, held = starts[1:] - starts[:-1], (int(starts[0]), int(starts[-1]))
    sound = (
        counts.min(initial=0) >= 0 and counts.max(initial=0) <= BLOCK and 0 <= held[0] <= held[1] <= form.values.numel
    )
    sound = sound and (first > 0 or held[0] == 0) and (last * BLOCK < numel or held[1] == form.values.numel)
    in_bits = first * BLOCK // 8, min(last * BLOCK // 8, form.where.numel)
    before = first * BLOCK
    where = held if form.where.dtype == "U16" else in_bits
    return Blocks(starts, begin - before, numel - before, where, held) if sound else None


def make_whole(form: Packed, numel: int, begin: int, out: torch.Tensor, read: Read) -> bool:
    """Fills `out`, 1-d, with elements from `begin` on. Whether the parts say where all values are: `out` holds nothing
    of use otherwise."""
    blocks = find_blocks(form, numel, begin, begin + out.numel(), read)
    if blocks is None:
        return False
    where, values = read(form.where, *blocks.where).numpy(), bits(read(form.values, *blocks.values))
    return spread(where, np.diff(blocks.starts), values, blocks.first, blocks.limit, bits(out))


def locate(form: Packed, numel: int, begin: int, end: int, read: Read, find: Find) -> PackedFiles | None:
    """Where the parts of elements [begin, end) of a tensor are, that has so many; None where its values are not fp32,
    its parts do not lie in files as they are, or `starts` says what cannot be."""
    if form.values.dtype != "F32" or end > numel or find(form.starts, 0) is None:
        return None
    if (blocks := find_blocks(form, numel, begin, end, read)) is None:
        return None
    where, values = find(form.where, blocks.where[0]), find(form.values, blocks.values[0])
    if where is None or values is None:
        return None
    return PackedFiles(where, values, form.where.dtype == "U8", blocks.starts.copy(), blocks.first, blocks.limit)
