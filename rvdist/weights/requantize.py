"""Computes points of a quantised target in the target's own format: fp8 codes, and the scales of their blocks.

A result is computed in fp32 as it is for every other output. Blocks in which nothing differs from the target keep its
codes and scale, byte for byte; another gets the scale amax / 448, rounded to the scales' dtype (up to a power of two
where the target's are such), and codes rounded once, to nearest even. So the bytes depend neither on units nor on
chunks. Holds some rows of blocks of one tensor, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rvdist.core.point import Vector
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.fp8 import Scaled
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.operand import Dequantized
from rvdist.weights.reader import PointReader

_AT_ONCE = 1 << 21  # elements of one tensor, or one row of blocks where that has more
_MOST_SCALES = 64 << 20  # bytes of scales that are remembered until they are asked for
_LARGEST = 448.0  # of E4M3
Floats = np.ndarray[Any, np.dtype[np.float32]]
Codes = np.ndarray[Any, np.dtype[np.uint8]]


class RequantizingReader(PointReader):
    """A reader whose output has the tensors of a `Scaled` base as they are stored: codes under the tensor's name, its
    scales under theirs."""

    quantizes = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._found: dict[tuple[str, int], list[torch.Tensor]] = {}  # scales of rows of blocks, by their first element

    def output_dtype(self, spec: TensorSpec) -> torch.dtype:
        return torch.float32 if spec.name in self._scaled.scales else super().output_dtype(spec)

    def chunks(self, name: str, start: int, stop: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        if name in self._scaled.scales:
            yield from self._codes(name, start, stop)
        elif owner := self._scaled.owners.get(name):
            yield from self._scales(owner, start, stop)
        else:
            yield from super().chunks(name, start, stop)

    def blame(self, name: str) -> str:
        return super().blame(self._scaled.owners.get(name, name))

    @property
    def _scaled(self) -> Scaled:
        assert isinstance(self.base, Scaled)
        return self.base

    def _work(self, name: str, ends: Any, terms: list[tuple[float, Vector]]) -> torch.dtype:
        """What counts is what is stored, on either end: fp8."""
        return super()._work(name, ends[:1] if name in self._scaled.scales else ends, terms)

    def _codes(self, name: str, start: int, stop: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        for begin, end, results in self._bands(name, start, stop):
            first, last = max(begin, start), min(end, stop)
            yield first, [torch.from_numpy(codes[first - begin : last - begin]) for codes, _ in results]

    def _scales(self, name: str, start: int, stop: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Elements of the scales of tensor `name`: what was found with its codes, or is found anew."""
        spec, (rows, columns) = self._scaled.tensors[name], self._scaled.block
        height, width = spec.shape[-2:]
        across, bands = -(-width // columns), -(-height // rows)
        at = start
        while at < stop:
            matrix, band = divmod(at // across, bands)
            first = (matrix * height + band * rows) * width
            if (name, first) not in self._found:
                count = min(self._rows_at_once(spec), bands - band, -(-(stop - at) // across))
                for _ in self._bands(name, first, (matrix * height + min(height, (band + count) * rows)) * width):
                    pass
            found = self._found.pop((name, first))
            offset = at % across
            end = min(stop, at - offset + across)
            yield at, [scale[offset : offset + end - at] for scale in found]
            at = end

    def _rows_at_once(self, spec: TensorSpec) -> int:
        """Rows of blocks that are computed together."""
        return max(1, _AT_ONCE // (self._scaled.block[0] * spec.shape[-1]))

    def _bands(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, list[tuple[Codes, torch.Tensor]]]]:
        """The rows of blocks in which elements [start, stop) of a tensor are, some at a time: first and last element,
        and codes and scales at each point."""
        spec, rows = self._scaled.tensors[name], self._scaled.block[0]
        height, width = spec.shape[-2:]
        most = self._rows_at_once(spec) * rows
        at = start
        while at < stop:
            matrix, row = divmod(at // width, height)
            row -= row % rows
            until = min(height, row + most, -(-(stop - matrix * height * width) // width))
            until = min(height, -(-until // rows) * rows)
            begin, end = (matrix * height + row) * width, (matrix * height + until) * width
            results = self._band(name, begin, end)
            self._remember(name, begin, width * rows, [scales for _, scales in results])
            yield begin, end, results
            at = end

    def _remember(self, name: str, begin: int, step: int, scales: list[torch.Tensor]) -> None:
        """Keeps scales until they are asked for; the oldest are forgotten."""
        for k in range(scales[0].shape[0]):
            self._found[name, begin + k * step] = [scale[k] for scale in scales]
        size = scales[0].shape[1] * scales[0].element_size() * len(scales)
        while len(self._found) > max(1000, _MOST_SCALES // size):
            del self._found[next(iter(self._found))]

    def _band(self, name: str, begin: int, end: int) -> list[tuple[Codes, torch.Tensor]]:
        """Codes, 1-d, and scales, a row for each row of blocks, of whole rows of blocks at each point."""
        width = self._scaled.tensors[name].shape[-1]
        computed = [np.empty(end - begin, np.float32) for _ in self.points]
        for at, tensors in super().chunks(name, begin, end):
            for whole, tensor in zip(computed, tensors, strict=True):
                whole[at - begin : at - begin + tensor.numel()] = tensor.numpy()
        results = []
        for point, values in zip(self.points, computed, strict=True):
            operand = self._values.operands[point.base]
            assert isinstance(operand, Dequantized)
            codes, scales, before = operand.stored(name, begin, end)
            results.append(
                requantize(
                    values.reshape(-1, width), before.reshape(-1, width), codes.reshape(-1, width), scales,
                    self._scaled.block, self._scaled.power_of_two,
                )
            )  # fmt: skip
        return results


def reader_of(base: Checkpoint, dtype: torch.dtype | None) -> type[PointReader]:
    """What computes points of this base for an output of this dtype; None: the base's own."""
    return RequantizingReader if dtype is None and isinstance(base, Scaled) else PointReader


def requantize(
    values: Floats, before: Floats, codes: Codes, scales: torch.Tensor, block: tuple[int, int], power_of_two: bool
) -> tuple[Codes, torch.Tensor]:
    """Codes, 1-d, and scales of `values`, whole rows of blocks of a matrix. `before` is what `codes` and `scales` of
    the target mean: blocks in which it is the same keep them."""
    rows, columns = block
    down, across = range(0, values.shape[0], rows), range(0, values.shape[1], columns)
    touched = np.logical_or.reduceat(np.logical_or.reduceat(values != before, down, axis=0), across, axis=1)
    if not touched.any():
        return codes.reshape(-1), scales
    largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(values), down, axis=0), across, axis=1)
    fresh = scale_of(torch.from_numpy(largest), scales.dtype, power_of_two)
    kept = torch.from_numpy(touched).logical_not() | (fresh == 0)
    scales = torch.where(kept, scales, fresh)
    wide = np.repeat(np.repeat(scales.float().numpy(), rows, 0)[: values.shape[0]], columns, 1)[:, : values.shape[1]]
    np.divide(values, np.where(wide == 0, np.float32(np.inf), wide), out=values)
    np.clip(values, -_LARGEST, _LARGEST, out=values)
    found = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    new = np.repeat(np.repeat(touched, rows, 0)[: values.shape[0]], columns, 1)[:, : values.shape[1]]
    return np.where(new, found, codes).reshape(-1), scales


def scale_of(largest: torch.Tensor, dtype: torch.dtype, power_of_two: bool) -> torch.Tensor:
    """The scale of blocks whose largest element, in size, is this: amax / 448, or the next power of two."""
    scale = largest / _LARGEST
    if power_of_two:
        fraction, exponent = torch.frexp(scale)
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
        scale = torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent), scale)
    return scale.to(dtype)
