"""Rows of a tensor that lie in several checkpoints, are means or 0, read as if they stood in one.

Holds a chunk, and of each tensor the row that pads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rvdist.weights.checkpoint.remapped import MEAN, ZERO, Remapped
from rvdist.weights.stored import Operand

_CHUNK = 256 * 1024  # elements


class RemappedOperand(Operand):
    """The tensors of a checkpoint with the tokens of another; `lenders` read its lenders."""

    def __init__(self, checkpoint: Remapped, lenders: Sequence[Operand]) -> None:
        super().__init__(checkpoint)
        self._maps, self._lenders = checkpoint.rows, lenders
        self._padding: dict[str, torch.Tensor] = {}
        self._room = torch.empty(0, dtype=torch.uint8)

    @property
    def bytes_read(self) -> int:
        return sum(lender.bytes_read for lender in self._lenders)

    @property
    def own(self) -> Operand:
        """What reads the checkpoint as it is."""
        return self._lenders[0]

    def close(self) -> None:
        for lender in self._lenders:
            lender.close()

    def dtype(self, name: str) -> torch.dtype:
        return self._lenders[0].dtype(name)

    def read(self, name: str, begin: int, end: int, buffer: torch.Tensor) -> torch.Tensor:
        """As `Operand.read`. A mean is added up in fp64, in the order of its parts, and rounded once."""
        if name not in self._maps:
            return self._lenders[0].read(name, begin, end, buffer)
        rows, width, dtype = self._maps[name], self._width(name), self.dtype(name)
        out = buffer[: (end - begin) * dtype.itemsize].view(dtype)
        for first, stop, owner, row in rows.runs(begin // width, -(-end // width)):
            start, last = max(begin, first * width), min(end, stop * width)
            part, at = out[start - begin : last - begin], start - first * width
            if owner >= 0:
                at += row * width
                self._borrow(self._lenders[owner], name, at, part)
            elif owner == ZERO:
                part.zero_()
            elif owner == MEAN:
                part.copy_(self._mean(name, rows.means[row], at, len(part)))
            else:
                part.copy_(self._pad(name).repeat(stop - first)[at : at + len(part)])
        return out

    def _borrow(self, lender: Operand, name: str, at: int, out: torch.Tensor) -> None:
        """Elements that a lender may store in another dtype: then they are rounded once."""
        if lender.dtype(name) == out.dtype:
            lender.read(name, at, at + len(out), out.view(torch.uint8))
            return
        if len(self._room) < 8 * len(out):
            self._room = torch.empty(8 * len(out), dtype=torch.uint8)
        out.copy_(lender.read(name, at, at + len(out), self._room))

    def _width(self, name: str) -> int:
        return self._tensors[name].numel // self._tensors[name].shape[0]

    def _mean(self, name: str, of: Sequence[tuple[int, int]], at: int, count: int) -> torch.Tensor:
        room, total = torch.empty(8 * count, dtype=torch.uint8), torch.zeros(count, dtype=torch.float64)
        for lender, row in of:
            first = row * self._width(name) + at
            total += self._lenders[lender].read(name, first, first + count, room)
        return total / len(of)

    def _pad(self, name: str) -> torch.Tensor:
        """The mean of all rows that are tokens, added up one after the other."""
        if name not in self._padding:
            count, width, dtype = self._maps[name].tokens, self._width(name), self.dtype(name)
            step, total = max(1, _CHUNK // width), np.zeros(width)
            room = torch.empty(step * width * dtype.itemsize, dtype=torch.uint8)
            for first in range(0, count, step):
                values = self.read(name, first * width, min(count, first + step) * width, room)
                total = np.add.reduce(np.vstack([total, values.double().view(-1, width).numpy()]))
            self._padding[name] = torch.from_numpy(total / count).to(dtype)
        return self._padding[name]
