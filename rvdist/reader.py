"""Reads weight points: the one place where bytes meet arithmetic, shared by the merge and the fleet.

Streams in chunks; never holds a model. Several points share every byte they read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from rvdist.arithmetic.method import Place, Scratch, combine, subtract, working_dtype
from rvdist.arithmetic.registry import build
from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.header import TensorSpec
from rvdist.checkpoint.source import open_source
from rvdist.checkpoint.stream import TORCH_DTYPE
from rvdist.operand import open_operand
from rvdist.point import Vector, WeightPoint, layer_count

CHUNK = 128 * 1024  # elements: the operands and the result of a chunk stay in a core's cache

Recipe = list[tuple[float, Vector]]  # α·m and the vector of every term that changes a tensor


class PointReader:
    """Computes the tensors of `points` from opened `sources` (by source name). Their bases have the same tensors,
    by name, dtype and shape.

    `dtype` is the output dtype of floating-point tensors; None keeps the base's own. Integer and boolean
    tensors are the base's.
    """

    def __init__(
        self, points: Sequence[WeightPoint], sources: Mapping[str, Checkpoint], dtype: torch.dtype | None = None
    ) -> None:
        self.points = points
        self.base = sources[points[0].base]
        self.nonfinite = [0] * len(points)
        self._dtype = dtype
        self._sources = sources
        self._layers = layer_count(self.base.tensors)
        self._files = {
            source: open_operand(sources[source])
            for source in dict.fromkeys(s for point in points for s in point.sources())
        }
        self._methods = [build(p.method.name, p.method.density, p.method.seed) for p in points]
        self._buffers: dict[str, torch.Tensor] = {}
        self._scratch = Scratch(CHUNK)

    @property
    def bytes_read(self) -> int:
        return sum(files.bytes_read for files in self._files.values())

    def output_dtype(self, spec: TensorSpec) -> torch.dtype:
        stored = TORCH_DTYPE[spec.dtype]
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def chunks(self, name: str, start: int, stop: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Elements [start, stop) of tensor `name`: (first element, one 1-d tensor a point) for each chunk.
        The tensors are valid until the next chunk is asked for."""
        spec = self.base.tensors[name]
        dtype = self.output_dtype(spec)
        recipes = [self._recipe(point, name) for point in self.points]
        for method, terms in zip(self._methods, recipes, strict=True):
            if method.whole_tensors and terms:
                assert (start, stop) == (0, spec.numel)
                method.survey(Place(name, spec.numel), lambda terms=terms: self._differences(name, terms))  # type: ignore[misc]
        wanted = dict.fromkeys(
            [point.base for point in self.points]
            + [source for terms in recipes for _, vector in terms for source in vector.sources()]
        )
        for begin, end in self._cuts(name, start, stop, list(wanted)):
            operand = {source: self._read(source, name, begin, end) for source in wanted}
            results = []
            for k, (point, terms) in enumerate(zip(self.points, recipes, strict=True)):
                out = self._buffer(f"out {k}")[: (end - begin) * dtype.itemsize].view(dtype)
                differences = [
                    (alpha, operand[vector.plus], operand[vector.minus] if vector.minus else None)
                    for alpha, vector in terms
                    if not self._methods[k].elementwise_sum or self._reaches(vector.plus, name, end)
                ]
                place = Place(name, spec.numel, begin)
                self.nonfinite[k] += combine(
                    self._methods[k], operand[point.base], differences, out, self._scratch, place
                )
                results.append(out)
            yield begin, results

    def _recipe(self, point: WeightPoint, name: str) -> Recipe:
        if not self._sources[point.base].tensors[name].is_floating_point:
            return []
        return point.recipe(name, self._layers, lambda source: name in self._sources[source].tensors)

    def _cuts(self, name: str, start: int, stop: int, wanted: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Chunks of [start, stop), none of them across the end of a source with fewer rows than the base."""
        ends = sorted({self._sources[source].tensors[name].numel for source in wanted})
        begin = start
        while begin < stop:
            end = min([begin + CHUNK, stop, *(e for e in ends if e > begin)])
            yield begin, end
            begin = end

    def _reaches(self, source: str, name: str, end: int) -> bool:
        """Whether the source's tensor has elements up to `end`. A sum leaves those that no vector reaches as they
        are, to the bit; other methods know a vector by its place in the list."""
        return end <= self._sources[source].tensors[name].numel

    def _read(self, source: str, name: str, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end), zeros where the source's tensor ends before them."""
        if self._reaches(source, name, end):
            return self._files[source].read(name, begin, end, self._buffer(source))
        dtype = TORCH_DTYPE[self._sources[source].tensors[name].dtype]
        return self._buffer(source)[: (end - begin) * dtype.itemsize].view(dtype).zero_()

    def _differences(self, name: str, terms: Recipe) -> Iterator[list[torch.Tensor]]:
        """Streams a whole tensor: for each chunk the difference of every term in working precision."""
        spec = self.base.tensors[name]
        dtype = {
            source: TORCH_DTYPE[self._sources[source].tensors[name].dtype]
            for source in dict.fromkeys(source for _, vector in terms for source in vector.sources())
        }
        work = working_dtype(
            [TORCH_DTYPE[spec.dtype], self.output_dtype(spec)],
            [(dtype[vector.plus], dtype[vector.minus] if vector.minus else None) for _, vector in terms],
        )
        for begin, end in self._cuts(name, 0, spec.numel, list(dtype)):
            operand = {source: self._read(source, name, begin, end) for source in dtype}
            subtrahend = self._scratch(1, end - begin, work)
            yield [
                subtract(
                    self._scratch(2 + k, end - begin, work),
                    operand[vector.plus],
                    operand[vector.minus] if vector.minus else None,
                    subtrahend,
                )
                for k, (_, vector) in enumerate(terms)
            ]

    def _buffer(self, key: str) -> torch.Tensor:
        if key not in self._buffers:
            self._buffers[key] = torch.empty(CHUNK * 8, dtype=torch.uint8)
        return self._buffers[key]

    def close(self) -> None:
        for files in self._files.values():
            files.close()


def read_point(point: WeightPoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of a point, in the base's stored dtypes: what a merge of it would write.

    Raises BadInput where a source cannot be read.
    """
    reader = PointReader([point], {source: open_source(source) for source in point.sources()})
    try:
        for name, spec in reader.base.tensors.items():
            tensor = torch.empty(spec.numel, dtype=reader.output_dtype(spec))
            for begin, (chunk,) in reader.chunks(name, 0, spec.numel):
                tensor[begin : begin + chunk.numel()] = chunk
            yield name, tensor.view(spec.shape)
    finally:
        reader.close()
