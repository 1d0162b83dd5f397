"""Reads weight points: the one place where bytes meet arithmetic, shared by the merge and the fleet.

Streams in chunks; never holds a model. Several points share every byte they read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch

from rvdist.core.point import Rename, Vector, WeightPoint, layer_count
from rvdist.weights.arithmetic.method import (
    Count,
    Place,
    Scratch,
    combine,
    count_nonfinite,
    unify_nans,
    working_dtype,
)
from rvdist.weights.arithmetic.registry import build
from rvdist.weights.checkpoint.bound import bound, settle
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.fp8 import Scaled
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.layouts import lay_out
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.stream import TORCH_DTYPE
from rvdist.weights.checkpoint.vocabulary import Open, remap
from rvdist.weights.file_sums import Sum, find_sum
from rvdist.weights.lanes import CHUNK, Compute, Lane, open_lanes
from rvdist.weights.nonfinite import blame
from rvdist.weights.stored import Operand
from rvdist.weights.values import AT_ONCE, Values

Recipe = list[tuple[float, Vector]]  # α·m and the vector of every term that changes a tensor
Read = Callable[[], Mapping[str, torch.Tensor]]


class PointReader:
    """Computes the tensors of `points` from opened `sources` (by source name). Their bases have the same tensors,
    by name, dtype and shape.

    `dtype` is the output dtype of floating-point tensors; None keeps the base's own. Integer and boolean
    tensors are the base's. `device` is `cpu` or `cuda`, and does not change a bit. `lanes` are those to use instead of
    its own: readers that take turns can share their memory. Raises BadInput where there is no such device.
    """

    quantizes = False  # whether fp8 comes out as it is stored

    def __init__(
        self,
        points: Sequence[WeightPoint],
        sources: Mapping[str, Checkpoint],
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        lanes: Sequence[Lane] | None = None,
    ) -> None:
        sources = dict(sources)
        self.points = points = [_bound(point, sources) for point in points]
        self.base = sources[points[0].base]
        assert dtype is not None or self.quantizes or not isinstance(self.base, Scaled), "fp8 is not written here"
        self.nonfinite = [0] * len(points)
        self.spoiled: dict[str, None] = {}  # the tensors that `fill` found to hold such results
        self._dtype, self._device = dtype, device
        self._sources = sources
        self._layers = layer_count(self.base.tensors)
        used = dict.fromkeys(source for point in points for source in point.sources())
        self._values = Values({source: sources[source] for source in used})
        self._methods = [build(point.method) for point in points]
        self._lanes = lanes or open_lanes(device, buffers_of(points))
        self._scratch = Scratch(CHUNK)
        self._prepared = ""  # the tensor that the methods saw last
        self._bytes_read = 0  # by compiled loops

    @property
    def bytes_read(self) -> int:
        """Of all sources so far."""
        return self._values.bytes_read + self._bytes_read

    def output_dtype(self, spec: TensorSpec) -> torch.dtype:
        """The dtype that a tensor of the base is computed to."""
        stored = TORCH_DTYPE[spec.dtype]
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def chunks(
        self, name: str, start: int, stop: int, into: torch.Tensor | None = None
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Elements [start, stop) of tensor `name`: (first element, one 1-d tensor a point) for each chunk.
        The tensors are valid until the next chunk is asked for; of the only point, they may go `into` one of the
        device, 1-d and of the output dtype."""
        spec = self.base.tensors[name]
        dtype = self.output_dtype(spec)
        recipes, works, copied = self._prepare(name)
        add = self._find_sum(name, start, stop, recipes[0], works[0]) if len(self.points) == 1 else None
        seen = len(spec.shape) > 1 and all(point.method.facts.whole_matrices for point in self.points)
        vectors = [vector for terms in recipes for _, vector in terms if not seen]
        at_once = self._lanes[0].chunk * (2 if add else 1)  # of 4 bytes an element, for which buffers have WIDEST
        cuts = self._cuts(name, start, stop, vectors, at_once)
        ahead: deque[tuple[int, Lane]] = deque()  # chunks that were launched, the oldest first
        try:
            for (begin, end, present), lane in zip(cuts, cycle(self._lanes), strict=False):
                read = partial(self._read, [*(p.base for p in self.points), *_donors(present)], name, begin, end, lane)
                compute = partial(self._combine, self._place(name, begin), recipes, works, present)
                outs = [] if into is None else [into[begin - start : end - start]]
                if add:
                    compute = partial(self._sum_or_combine, add, begin, read, compute)
                lane.launch({} if add else read(), len(self.points), end - begin, dtype, compute, outs)
                ahead.append((begin, lane))
                if len(ahead) == len(self._lanes):
                    yield self._finish(*ahead.popleft(), copied)
            while ahead:
                yield self._finish(*ahead.popleft(), copied)
        finally:
            for _, lane in ahead:
                lane.wait()

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        """Writes as many elements of tensor `name`, from `start` on, of the only point as `out` has: 1-d, of the output
        dtype, and on the CPU or on the reader's device."""
        (point,), stop = self.points, start + out.numel()
        (recipe,), (work,), (copied,) = self._prepare(name)
        if copied and self._device == "cpu":
            self._values.operands[point.base].read(name, start, stop, out.view(torch.uint8))
            for begin in range(0, out.numel(), CHUNK):
                self._note(name, count_nonfinite(out[begin : begin + CHUNK], self._scratch))
            return
        add = self._find_sum(name, start, stop, recipe, work)
        if add and (count := self._sum(add, start, out, self._scratch)) is not None:
            self._note(name, count)
            if count:
                unify_nans(out)
            return
        row = self._row(name)
        first, last = start // row * row, -(-stop // row) * row
        if (first, last) != (start, stop):  # a part of a row is computed with the others of it
            whole = torch.empty(last - first, dtype=out.dtype, device=out.device)
            self.fill(name, first, whole)
            out.copy_(whole[start - first : stop - first])
            return
        there, before = out.device.type == self._device, self.nonfinite[0]
        for begin, (result,) in self.chunks(name, start, stop, out if there else None):
            if not there:
                out[begin - start : begin - start + result.numel()].copy_(result)
        if self.nonfinite[0] > before:
            self.spoiled.setdefault(name)

    def _find_sum(self, name: str, start: int, stop: int, recipe: Recipe, work: torch.dtype) -> Sum | None:
        """What sums these elements of the only point as it reads them; None where nothing does."""
        (point,), (method,), dtype = self.points, self._methods, self.output_dtype(self.base.tensors[name])
        if not recipe or (self._device, work, dtype) != ("cpu", torch.float32, torch.bfloat16):
            return None
        return find_sum(method, self._values.operands, point.base, recipe, name, start, stop)

    def _sum(self, add: Sum, start: int, out: torch.Tensor, scratch: Scratch) -> int | None:
        summed = add(start, out, scratch)
        self._bytes_read += summed.nbytes if summed else 0
        return summed.nonfinite if summed else None

    def _sum_or_combine(
        self, add: Sum, start: int, read: Read, combine: Compute, _: object, outs: list[torch.Tensor], scratch: Scratch
    ) -> list[Count]:
        """Computes a chunk of the only point, of which nothing has been read."""
        count = self._sum(add, start, outs[0], scratch)
        return combine(read(), outs, scratch) if count is None else [count]

    def fill_columns(self, name: str, rows: range, columns: range, out: torch.Tensor) -> None:
        """Writes these columns of these rows, of the only point: `out` is 1-d, as for `fill`. Of several matrices in
        one tensor all rows are counted on. Other columns are read only where a source is computed, the method needs
        other elements or their places, or the arithmetic is a card's."""
        (point,), width = self.points, self.base.tensors[name].shape[-1]
        recipes, works, (copied,) = self._prepare(name)
        vectors = [vector for _, vector in recipes[0]]
        operands = {source: self._values.operands[source] for source in [point.base, *_donors(vectors)]}
        lane = self._lanes[0]
        sought = point.method.facts.by_element and all(type(operand) is Operand for operand in operands.values())
        if self._device != "cpu" or not sought:
            at_once, wanted = max(1, lane.chunk // width), out.view(len(rows), len(columns))
            for begin in range(0, len(rows), at_once):
                some = rows[begin : begin + at_once]
                whole = torch.empty(len(some), width, dtype=out.dtype, device=out.device)
                self.fill(name, some.start * width, whole.view(-1))
                wanted[begin : begin + len(some)].copy_(whole[:, columns.start : columns.stop])
            return
        at_once = max(1, min(CHUNK, lane.chunk) // len(columns)) * width
        for begin, end, present in self._cuts(name, rows.start * width, rows.stop * width, vectors, at_once):
            own = range(begin // width, end // width)
            result = out[(own.start - rows.start) * len(columns) : (own.stop - rows.start) * len(columns)]
            if copied:
                operands[point.base].read_columns(name, own, columns, result.view(torch.uint8))
                self._note(name, count_nonfinite(result, self._scratch))
                continue
            operand = {
                source: operands[source].read_columns(name, own, columns, lane.buffer(f"in {k}"))
                for k, source in enumerate(dict.fromkeys([point.base, *_donors(present)]))
            }
            self._fill(self._place(name, begin), recipes, works, present, operand, result)

    def _fill(
        self,
        place: Place,
        recipes: Sequence[Recipe],
        works: Sequence[torch.dtype],
        present: Sequence[Vector],
        operand: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """Computes a chunk of the only point."""
        (count,) = self._combine(place, recipes, works, present, operand, [out], self._scratch)
        if count:
            self._note(place.tensor, int(count))
            unify_nans(out)

    def _note(self, name: str, count: int) -> None:
        if count:
            self.nonfinite[0] += count
            self.spoiled.setdefault(name)

    def _prepare(self, name: str) -> tuple[list[Recipe], list[torch.dtype], list[bool]]:
        """For each point the terms that change a tensor, the working precision, and whether its bytes are the base's.
        Methods that must see the whole tensor first have then seen it."""
        dtype = self.output_dtype(self.base.tensors[name])
        recipes = [self._recipe(point, name) for point in self.points]
        stored = [TORCH_DTYPE[self._sources[point.base].tensors[name].dtype] for point in self.points]
        works = [self._work(name, [own, dtype], terms) for own, terms in zip(stored, recipes, strict=True)]
        if name != self._prepared and self.base.tensors[name].numel:
            for point, method, terms, work in zip(self.points, self._methods, recipes, works, strict=True):
                if point.method.facts.whole_tensors and terms:
                    base = [point.base] * method.surveys_base
                    place = replace(self._at(self._place(name), point), alphas=tuple(alpha for alpha, _ in terms))
                    see = partial(self._differences, name, base, terms, work)
                    factors = partial(self._values.factors, name, place.shape, [vector for _, vector in terms])
                    method.survey(place, factors if point.method.facts.low_rank else see)
            self._prepared = name
        return recipes, works, [not terms and dtype == own for own, terms in zip(stored, recipes, strict=True)]

    def _combine(
        self,
        place: Place,
        recipes: Sequence[Recipe],
        works: Sequence[torch.dtype],
        present: Sequence[Vector],
        operand: Mapping[str, torch.Tensor],
        outs: list[torch.Tensor],
        scratch: Scratch,
    ) -> list[Count]:
        """Computes a chunk of every point. Where a vector has no rows, a sum leaves out its term, so that what no
        vector reaches stays as it is, to the bit; other methods know it by its place in the list, and take it as 0."""
        counts = []
        for point, method, terms, work, out in zip(self.points, self._methods, recipes, works, outs, strict=True):
            differences = [
                (alpha, operand[vector.plus], operand[vector.minus] if vector.minus else None)
                if vector in present
                else (alpha, torch.zeros_like(out), None)
                for alpha, vector in terms
                if vector in present or not method.elementwise_sum
            ]
            own = self._at(place, point)
            counts.append(combine(method, operand[point.base], differences, out, scratch, own, work))
        return counts

    def _place(self, name: str, begin: int = 0) -> Place:
        spec = self.base.tensors[name]
        return Place(name, spec.numel, begin, shape=spec.shape)

    def _row(self, name: str) -> int:
        """How many elements chunks must not part; 1 where they may part any."""
        whole = any(point.method.facts.whole_rows for point in self.points)
        return max(1, self._place(name).width) if whole and self.base.tensors[name].is_floating_point else 1

    def _at(self, place: Place, point: WeightPoint) -> Place:
        """The place, with the densities of the terms that change its tensor."""
        name = place.tensor
        densities = point.densities(name, self._layers, lambda source: name in self._sources[source].tensors)
        return replace(place, densities=densities) if densities else place

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

    def _work(self, name: str, ends: Sequence[torch.dtype], terms: Recipe) -> torch.dtype:
        """The working precision of a tensor, from the dtypes that are stored: the same on all of its rows."""
        donors = _donors(vector for _, vector in terms)
        stored = {source: TORCH_DTYPE[self._sources[source].tensors[name].dtype] for source in donors}
        return working_dtype(ends, [(stored[v.plus], stored[v.minus] if v.minus else None) for _, v in terms])

    def _cuts(
        self, name: str, start: int, stop: int, vectors: Iterable[Vector], size: int
    ) -> Iterator[tuple[int, int, tuple[Vector, ...]]]:
        """(begin, end, the vectors that have these elements): chunks of [start, stop) of at most `size` elements, none
        of them across the end of a vector with fewer rows than the base. A vector has the rows that both donors have.
        Where a method wants whole rows, `start` begins one.
        """
        row = self._row(name)
        size = max(row, size // row * row)
        ends = {
            vector: min(self._sources[source].tensors[name].numel for source in vector.sources()) for vector in vectors
        }
        begin = start
        while begin < stop:
            end = min([begin + size, stop, *(e for e in ends.values() if e > begin)])
            yield begin, end, tuple(vector for vector, e in ends.items() if end <= e)
            begin = end

    def _read(self, sources: Iterable[str], name: str, begin: int, end: int, lane: Lane) -> dict[str, torch.Tensor]:
        return {
            source: self._values.operands[source].read(name, begin, end, lane.buffer(f"in {k}"))
            for k, source in enumerate(dict.fromkeys(sources))
        }

    def _differences(
        self,
        name: str,
        bases: Sequence[str],
        terms: Recipe,
        work: torch.dtype,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[list[torch.Tensor]]:
        """Streams a whole tensor, or some elements of it: for each chunk the base, if it is asked for, and the
        difference of every term, in working precision, on the CPU."""
        stop = self.base.tensors[name].numel if stop is None else stop
        for begin, end, present in self._cuts(name, start, stop, [vector for _, vector in terms], AT_ONCE):
            outs = [self._scratch(k, end - begin, work) for k in range(len(bases) + len(terms))]
            for out, base in zip(outs, bases, strict=False):
                self._values.difference(name, begin, base, None, out)
            for out, (_, vector) in zip(outs[len(bases) :], terms, strict=True):
                if vector in present:
                    self._values.difference(name, begin, vector.plus, vector.minus, out)
                else:
                    out.zero_()
            yield outs

    def forget(self) -> None:
        """Lets go of a matrix that a method holds."""
        if any(point.method.facts.whole_matrices for point in self.points):
            self._methods = [build(point.method) for point in self.points]
            self._prepared = ""

    def blame(self, name: str) -> str:
        """Where results of tensor `name` come from that are infinite or not a number, and what to do: in a sentence."""
        parts: dict[str, dict[str, None]] = {}  # each source, and what it is there
        for point in self.points:
            parts.setdefault(point.base, {})["the target"] = None
            for _, vector in self._recipe(point, name):
                parts.setdefault(vector.plus, {})["plus" if vector.minus else "the vector"] = None
                if vector.minus:
                    parts.setdefault(vector.minus, {})["minus"] = None
        spec = self.base.tensors[name]
        dtype = str(self.output_dtype(spec)).removeprefix("torch.")
        return blame(name, {k: list(own) for k, own in parts.items()}, self._values.operands, spec.numel, dtype)

    def close(self) -> None:
        """Closes the files."""
        self._values.close()


def _bound(point: WeightPoint, sources: dict[str, Checkpoint]) -> WeightPoint:
    """The point, each adapter of which is a difference by itself: `sources` gets those that are not."""
    return replace(point, terms=tuple(replace(term, vector=bound(term.vector, sources)) for term in point.terms))


def _donors(vectors: Iterable[Vector]) -> dict[str, None]:
    """What these vectors are made of, each once."""
    return dict.fromkeys(source for vector in vectors for source in vector.sources())


def buffers_of(points: Sequence[WeightPoint]) -> int:
    """How many operands and results of a chunk a reader of these points needs memory for, at most."""
    return len({source for point in points for source in point.sources()}) + len(points)


def open_point(
    point: WeightPoint,
    look_up: Callable[[str, Rename], Checkpoint] = open_source,
    device: str = "cpu",
    remap: Callable[[WeightPoint, Mapping[str, Checkpoint], Open], Mapping[str, Checkpoint]] = remap,
) -> PointReader:
    """A reader of one point, in the base's stored dtypes, bf16 where it is quantised. Raises BadInput where a source
    cannot be read, or there is no such device."""
    sources = {source: look_up(source, rename) for source, rename in point.renames()}
    sources = {name: lay_out(source, sources[point.base]) for name, source in sources.items()}
    if point.vocabulary:
        sources |= remap(point, sources, lambda source: look_up(source, ()))
    dtype = torch.bfloat16 if isinstance(sources[point.base], Scaled) else None
    return PointReader([settle(point, sources)], sources, dtype, device)
