"""Reads weight points: the one place where bytes meet arithmetic, shared by the merge and the fleet.

Streams in chunks; never holds a model. Several points share every byte they read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle

import torch

from rvdist.arithmetic.method import Count, Place, Scratch, combine, subtract, unify_nans, working_dtype
from rvdist.arithmetic.registry import build
from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.header import TensorSpec
from rvdist.checkpoint.source import open_source
from rvdist.checkpoint.stream import TORCH_DTYPE
from rvdist.operand import open_operand
from rvdist.pipeline import CHUNK, Lane, open_lanes, part
from rvdist.point import Vector, WeightPoint, layer_count

Recipe = list[tuple[float, Vector]]  # α·m and the vector of every term that changes a tensor


class PointReader:
    """Computes the tensors of `points` from opened `sources` (by source name). Their bases have the same tensors,
    by name, dtype and shape.

    `dtype` is the output dtype of floating-point tensors; None keeps the base's own. Integer and boolean
    tensors are the base's. `device` is `cpu` or `cuda`, and does not change a bit. `lanes` are those to use instead of
    its own: readers that take turns can share their memory. Raises BadInput where there is no such device.
    """

    def __init__(
        self,
        points: Sequence[WeightPoint],
        sources: Mapping[str, Checkpoint],
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        lanes: Sequence[Lane] | None = None,
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
        self._lanes = lanes or open_lanes(device, buffers_of(points))
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
        copied = [not terms and dtype == TORCH_DTYPE[spec.dtype] for terms in recipes]
        cuts = self._cuts(name, start, stop, list(wanted), self._lanes[0].chunk)
        ahead: deque[tuple[int, Lane]] = deque()  # chunks that were launched, the oldest first
        try:
            for (begin, end), lane in zip(cuts, cycle(self._lanes), strict=False):
                operand = {
                    source: self._read(source, name, begin, end, lane.buffer(f"in {k}"))
                    for k, source in enumerate(wanted)
                }
                compute = partial(self._combine, Place(name, spec.numel, begin), end, recipes)
                lane.launch(operand, len(self.points), end - begin, dtype, compute)
                ahead.append((begin, lane))
                if len(ahead) == len(self._lanes):
                    yield self._finish(*ahead.popleft(), copied)
            while ahead:
                yield self._finish(*ahead.popleft(), copied)
        finally:
            for _, lane in ahead:
                lane.wait()

    def _combine(
        self,
        place: Place,
        end: int,
        recipes: Sequence[Recipe],
        operand: Mapping[str, torch.Tensor],
        outs: Sequence[torch.Tensor],
        scratch: Scratch,
    ) -> list[Count]:
        """Computes elements [place.start, end) of every point."""
        counts = []
        for point, method, terms, out in zip(self.points, self._methods, recipes, outs, strict=True):
            differences = [
                (alpha, operand[vector.plus], operand[vector.minus] if vector.minus else None)
                for alpha, vector in terms
                if not method.elementwise_sum or self._reaches(vector.plus, place.tensor, end)
            ]
            counts.append(combine(method, operand[point.base], differences, out, scratch, place))
        return counts

    def _finish(self, begin: int, lane: Lane, copied: Sequence[bool]) -> tuple[int, list[torch.Tensor]]:
        results, counts = lane.wait()
        for k, (result, count) in enumerate(zip(results, counts, strict=True)):
            self.nonfinite[k] += count
            if count and not copied[k]:
                unify_nans(result)
        return begin, results

    def _recipe(self, point: WeightPoint, name: str) -> Recipe:
        if not self._sources[point.base].tensors[name].is_floating_point:
            return []
        return point.recipe(name, self._layers, lambda source: name in self._sources[source].tensors)

    def _cuts(self, name: str, start: int, stop: int, wanted: Sequence[str], size: int) -> Iterator[tuple[int, int]]:
        """Chunks of [start, stop) of at most `size` elements, none of them across the end of a source with fewer rows
        than the base."""
        ends = sorted({self._sources[source].tensors[name].numel for source in wanted})
        begin = start
        while begin < stop:
            end = min([begin + size, stop, *(e for e in ends if e > begin)])
            yield begin, end
            begin = end

    def _reaches(self, source: str, name: str, end: int) -> bool:
        """Whether the source's tensor has elements up to `end`. A sum leaves those that no vector reaches as they
        are, to the bit; other methods know a vector by its place in the list."""
        return end <= self._sources[source].tensors[name].numel

    def _read(self, source: str, name: str, begin: int, end: int, buffer: torch.Tensor) -> torch.Tensor:
        """Elements [begin, end) in `buffer`, zeros where the source's tensor ends before them."""
        if self._reaches(source, name, end):
            return self._files[source].read(name, begin, end, buffer)
        return part(buffer, end - begin, TORCH_DTYPE[self._sources[source].tensors[name].dtype]).zero_()

    def _differences(self, name: str, terms: Recipe) -> Iterator[list[torch.Tensor]]:
        """Streams a whole tensor: for each chunk the difference of every term in working precision, on the CPU."""
        spec = self.base.tensors[name]
        dtype = {
            source: TORCH_DTYPE[self._sources[source].tensors[name].dtype]
            for source in dict.fromkeys(source for _, vector in terms for source in vector.sources())
        }
        work = working_dtype(
            [TORCH_DTYPE[spec.dtype], self.output_dtype(spec)],
            [(dtype[vector.plus], dtype[vector.minus] if vector.minus else None) for _, vector in terms],
        )
        lane = self._lanes[0]
        buffer = {source: lane.buffer(f"in {k}") for k, source in enumerate(dtype)}
        for begin, end in self._cuts(name, 0, spec.numel, list(dtype), min(CHUNK, lane.chunk)):
            operand = {source: self._read(source, name, begin, end, buffer[source]) for source in dtype}
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

    def close(self) -> None:
        for files in self._files.values():
            files.close()


def buffers_of(points: Sequence[WeightPoint]) -> int:
    """How many operands and results of a chunk a reader of these points needs memory for, at most."""
    return len({source for point in points for source in point.sources()}) + len(points)


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
