"""Tensors of which most elements are zero, as their other values and where these are: made, and made whole again.

Losslessly: an element is one of the values unless all of its bits are 0. Knows arrays; nothing of files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rvdist.weights.checkpoint.difference import BLOCK

_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes of an element

Bits = NDArray[Any]


def bits(tensor: torch.Tensor) -> Bits:
    """The elements of a 1-d tensor as unsigned integers of their size."""
    return tensor.view(torch.uint8).numpy().view(_BITS[tensor.element_size()])


def has_places(count: int, numel: int) -> bool:
    """Whether the places of so many values of `numel` elements take less than a bit for each element."""
    return 2 * count < -(-numel // 8)


def packed_bytes(count: int, numel: int, itemsize: int) -> int:
    """What so many values of `numel` elements take, and where they are."""
    return count * itemsize + min(2 * count, -(-numel // 8)) + 8 * (-(-numel // BLOCK) + 1)


def locate(elements: Bits, places: bool) -> tuple[NDArray[np.bool_], Bits, NDArray[np.int64]]:
    """Of elements that begin with a block: which are values, where that is as `Packed` has it (their `places`, or
    bits), and how many there are in each block."""
    filled = elements != 0
    ends = np.arange(0, len(elements), BLOCK)
    counts = np.add.reduceat(filled, ends, dtype=np.int64) if len(elements) else np.empty(0, np.int64)
    where = (np.flatnonzero(filled) % BLOCK).astype(np.uint16) if places else np.packbits(filled, bitorder="little")
    return filled, where, counts


def spread(where: Bits, counts: NDArray[np.int64], values: Bits, first: int, limit: int, out: Bits) -> bool:
    """Fills `out` with elements from `first` on of some blocks, of which so many elements (`limit`) are the tensor's:
    the `values` of which `where` says where they are, and 0. Whether it says so: as many as `counts`, ascending, within
    the tensor. Otherwise `out` holds nothing of use."""
    from rvdist.weights.arithmetic import unpack  # only packed tensors need a compiler

    if where.dtype == np.uint16:
        return bool(unpack.places(where, counts, values, first, limit, out))
    if lacking := -len(where) % 8:
        where = np.concatenate([where, np.zeros(lacking, np.uint8)])
    return bool(unpack.bits(where.view("<u8"), counts, values, first, limit, out))
