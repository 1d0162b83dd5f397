"""Reads weight points: the one place where bytes meet arithmetic, shared by the merge and the fleet.

Streams in chunks; never holds a model. Several points over one base share every byte read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from rvdist.arithmetic.linear import Scratch, combine
from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.header import TensorSpec
from rvdist.checkpoint.source import open_source
from rvdist.checkpoint.stream import TORCH_DTYPE, TensorFiles
from rvdist.point import WeightPoint

CHUNK = 128 * 1024  # elements: three bf16 operands and two fp32 intermediates stay in a core's cache


class PointReader:
    """Computes the tensors of `points`, which share one base, from opened `sources` (by source name).

    `dtype` is the output dtype of floating-point tensors; None keeps the base's own. Integer and boolean
    tensors are the base's.
    """

    def __init__(
        self, points: Sequence[WeightPoint], sources: Mapping[str, Checkpoint], dtype: torch.dtype | None = None
    ) -> None:
        (base,) = {point.base for point in points}
        self.points = points
        self.base = sources[base]
        self.nonfinite = [0] * len(points)
        self._dtype = dtype
        self._files = {
            source: TensorFiles(sources[source]) for source in {s for point in points for s in point.sources()}
        }
        self._base_files = self._files[base]
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
        recipes = [self._differences(point, name) for point in self.points]
        donors = {source for recipe in recipes for _, plus, minus in recipe for source in (plus, minus)}
        for begin in range(start, stop, CHUNK):
            end = min(begin + CHUNK, stop)
            base = self._base_files.read(spec, begin, end, self._buffer("base"))
            operand = {
                donor: self._files[donor].read(
                    self._files[donor].checkpoint.tensors[name], begin, end, self._buffer(f"donor {donor}")
                )
                for donor in donors
            }
            results = []
            for k, recipe in enumerate(recipes):
                out = self._buffer(f"out {k}")[: (end - begin) * dtype.itemsize].view(dtype)
                differences = [(alpha, operand[plus], operand[minus]) for alpha, plus, minus in recipe]
                self.nonfinite[k] += combine(base, differences, out, self._scratch)
                results.append(out)
            yield begin, results

    def _differences(self, point: WeightPoint, name: str) -> list[tuple[float, str, str]]:
        """(α·m, plus, minus) of every term that changes this tensor."""
        if not TORCH_DTYPE[self.base.tensors[name].dtype].is_floating_point:
            return []
        found = []
        for term in point.active_terms:
            vector = term.vector
            coefficient = term.alpha * term.mask.coefficient(name)
            if coefficient != 0 and name in self._files[vector.plus].checkpoint.tensors:
                found.append((coefficient, vector.plus, vector.minus))
        return found

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
