"""Blocks of a packed tensor (`rvdist.weights.packed`) as files have them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096  # elements


class PackedFiles(NamedTuple):
    """Some of a tensor's blocks: the descriptors of files, and the bytes where their parts begin. `where`: a bit for
    each element if `in_bits`, or places; `values`: fp32; `starts`: how many of the tensor's there are before each block
    and the end. What is wanted begins with element `first` of the blocks, of which `limit` elements are the tensor's.
    """

    where: tuple[int, int]
    values: tuple[int, int]
    in_bits: bool
    starts: NDArray[np.int64]
    first: int
    limit: int

    def part(self, begin: int, count: int) -> PackedFiles:
        """The blocks that have so many elements, from one of what is wanted on."""
        begin += self.first
        block, end = begin // BLOCK, -(-(begin + count) // BLOCK)
        before = int(self.starts[block] - self.starts[0])
        where = self.where[0], self.where[1] + (block * BLOCK // 8 if self.in_bits else 2 * before)
        values, at = (self.values[0], self.values[1] + 4 * before), block * BLOCK
        return PackedFiles(where, values, self.in_bits, self.starts[block : end + 1], begin - at, self.limit - at)

    @property
    def nbytes(self) -> int:
        """Of both parts."""
        count = int(self.starts[-1] - self.starts[0])
        in_bits = min((len(self.starts) - 1) * BLOCK, self.limit) + 7 >> 3
        return 4 * count + (in_bits if self.in_bits else 2 * count)
