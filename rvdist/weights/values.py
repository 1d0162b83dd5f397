"""Ranges of tensors of several opened sources, and the difference of two of them: the one stream of plus − minus, and
its factors where it is stored so.

Holds a chunk of each source, and nothing else of a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from rvdist.core.point import Vector
from rvdist.weights.arithmetic.method import Scratch, subtract
from rvdist.weights.checkpoint.bound import bound
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.operand import open_operand
from rvdist.weights.stored import Operand

AT_ONCE = 128 * 1024  # elements of a source that are held


class Values:
    """The tensors of `sources`, each opened under its name. Not thread-safe."""

    def __init__(self, sources: Mapping[str, Checkpoint]) -> None:
        self.operands: Mapping[str, Operand] = {name: open_operand(source) for name, source in sources.items()}
        self._sources, self._bound = dict(sources), dict[str, Operand]()
        self._buffers: dict[str, torch.Tensor] = {}
        self._held: dict[str, tuple[tuple[str, int, int], torch.Tensor]] = {}  # what each buffer holds
        self._scratch = Scratch(AT_ONCE)

    def numel(self, name: str, sources: Iterable[str]) -> int:
        """How many elements of a floating-point tensor all of these have."""
        specs = [self.operands[source].checkpoint.tensors.get(name) for source in sources]
        return min(spec.numel if spec and spec.is_floating_point else 0 for spec in specs)

    def difference(self, name: str, begin: int, plus: str, minus: str | None, out: torch.Tensor) -> torch.Tensor:
        """Fills `out`, 1-d, fp32 or fp64, with elements from `begin` on of plus − minus, or of plus, rounded to its
        dtype. Raises BadInput where a file cannot be used, Failed where the Hub does not answer."""
        vector = bound(Vector(plus, minus), self._sources)
        plus, minus = vector.plus, vector.minus
        for start in range(0, out.numel(), AT_ONCE):
            part = out[start : start + AT_ONCE]
            first, last = begin + start, begin + start + part.numel()
            taken = self._read(plus, name, first, last)
            less = self._read(minus, name, first, last) if minus is not None else None
            subtract(part, taken, less, self._scratch(0, part.numel(), part.dtype))
        return out

    def factors(
        self, name: str, shape: Sequence[int], vectors: Iterable[Vector], number: int
    ) -> Iterator[list[torch.Tensor]]:
        """Streams of each vector, which is stored as factors, those of a matrix of tensor `name`, which in the base has
        this `shape`: left [rows, r] and right [r, columns] in fp64; rows that the vector has not are 0. Raises as
        `difference` does."""
        for vector in vectors:
            pairs = [self._operand(source).factors(name, number) for source in vector.sources()]
            rows = min(shape[-2], *(len(left) for left, _ in pairs))
            whole = torch.zeros(shape[-2], sum(left.shape[1] for left, _ in pairs), dtype=torch.float64)
            whole[:rows] = torch.cat([left[:rows] * sign for (left, _), sign in zip(pairs, (1, -1), strict=False)], 1)
            yield [whole, torch.cat([right for _, right in pairs])]

    def _read(self, source: str, name: str, first: int, last: int) -> torch.Tensor:
        """Elements as they are stored; what several differences have in common is read once."""
        wanted = (name, first, last)
        if source not in self._held or self._held[source][0] != wanted:
            if source not in self._buffers:
                self._buffers[source] = torch.empty(AT_ONCE * 8, dtype=torch.uint8)
            self._held[source] = wanted, self._operand(source).read(*wanted, self._buffers[source])
        return self._held[source][1]

    def _operand(self, source: str) -> Operand:
        if source in self.operands:
            return self.operands[source]
        if source not in self._bound:
            self._bound[source] = open_operand(self._sources[source])
        return self._bound[source]

    @property
    def bytes_read(self) -> int:
        """Of all sources so far."""
        return sum(operand.bytes_read for operand in (*self.operands.values(), *self._bound.values()))

    def close(self) -> None:
        """Closes the files."""
        for operand in (*self.operands.values(), *self._bound.values()):
            operand.close()
