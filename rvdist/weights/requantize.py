"""Computes points of a quantised target in the target's own format: codes, and the scales of their blocks.

A result is computed in fp32 as it is for every other output. Blocks in which nothing differs from the target keep its
codes and scale, byte for byte; another gets the scale of its largest element, rounded to the scales' dtype (up to a
power of two where the target's are such), and codes rounded once, to nearest even. So the bytes depend neither on units
nor on chunks. Holds some rows of blocks of one tensor, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rvdist.core.point import Vector, WeightPoint
from rvdist.weights.arithmetic.method import count_nonfinite
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.fp8 import FP8, INT8, MXFP4, Codes, Floats, Kind, Scaled, pack
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.mxfp4 import encode_expert, meaning
from rvdist.weights.lanes import CHUNK
from rvdist.weights.operand import Dequantized
from rvdist.weights.reader import PointReader
from rvdist.weights.remapped_rows import RemappedOperand

_AT_ONCE = 1 << 21  # elements of one tensor, or one row of blocks where that has more
_MOST_SCALES = 64 << 20  # bytes of scales that are remembered until they are asked for


class RequantizingReader(PointReader):
    """A reader whose output has the tensors of a `Scaled` base as they are stored: codes under the tensor's name, its
    scales under theirs."""

    quantizes = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._surveyed: tuple[str, int, list[tuple[bool, float]]] = "", 0, []
        self._experts: tuple[str, int, list[tuple[Codes, Codes]]] = "", 0, []
        self._found: dict[tuple[str, int], list[torch.Tensor]] = {}  # scales of rows of blocks, by their first element

    def output_dtype(self, spec: TensorSpec) -> torch.dtype:
        return torch.float32 if spec.name in self._scaled.scales else super().output_dtype(spec)

    def chunks(
        self, name: str, start: int, stop: int, into: torch.Tensor | None = None
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        assert into is None, "nobody fills memory of his own with codes and scales"
        scaled = self._scaled
        owner = scaled.coded.get(name) or scaled.owners.get(name)
        if owner and not any(self._recipe(point, owner) for point in self.points):
            yield from self._copied(name, owner, start, stop)
        elif owner and scaled.kind is MXFP4:
            yield from self._of_experts(owner, name in scaled.owners, start, stop)
        elif owner := scaled.coded.get(name):
            yield from self._codes(owner, start, stop)
        elif owner := scaled.owners.get(name):
            yield from self._scales(owner, start, stop)
        elif spec := scaled.companions_of_codes.get(name):
            yield start, [self._of(point).raw(spec, start, stop) for point in self.points]
        else:
            yield from super().chunks(name, start, stop)

    def blame(self, name: str) -> str:
        return super().blame(self._scaled.owners.get(name) or self._scaled.coded.get(name) or name)

    @property
    def _scaled(self) -> Scaled:
        assert isinstance(self.base, Scaled)
        return self.base

    def _of(self, point: WeightPoint) -> Dequantized:
        """What reads the base of a point, as it is."""
        operand = self._values.operands[point.base]
        operand = operand.own if isinstance(operand, RemappedOperand) else operand
        assert isinstance(operand, Dequantized)
        return operand

    def _work(self, name: str, ends: Any, terms: list[tuple[float, Vector]]) -> torch.dtype:
        """What counts is what is stored, on either end: codes, which have no more than 8 bits."""
        return super()._work(name, [torch.float8_e4m3fn] if name in self._scaled.scales else ends, terms)

    def _copied(self, name: str, owner: str, start: int, stop: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Elements of what no vector changes, as they are stored."""
        for at in range(start, stop, CHUNK):
            parts = []
            for k, point in enumerate(self.points):
                source = self._sources[point.base]
                assert isinstance(source, Scaled)
                spec = source.scales[owner] if name in self._scaled.owners else source.codes(owner)
                part = self._of(point).raw(spec, at, min(stop, at + CHUNK))
                if part.is_floating_point():
                    self.nonfinite[k] += int(count_nonfinite(part, self._scratch))
                parts.append(part)
            yield at, parts

    def _codes(self, name: str, start: int, stop: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Elements of the codes as they are stored, each of which may have several."""
        several, bits = self._scaled.kind.codes_in(self._scaled.codes(name)), self._scaled.kind.bits
        for begin, end, results in self._bands(name, start * several, stop * several):
            first, last = max(begin, start * several), min(end, stop * several)
            packed = [pack(codes[first - begin : last - begin], bits) for codes, _ in results]
            yield first // several, [torch.from_numpy(np.ascontiguousarray(codes)) for codes in packed]

    def _scales(self, name: str, start: int, stop: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Elements of the scales of tensor `name`: what was found with its codes, or is found anew."""
        (height, width), (rows, columns) = self._scaled.tensors[name].shape[-2:], self._scaled.block_of(name)
        across, bands = -(-width // columns), -(-height // rows)
        at = start
        while at < stop:
            matrix, band = divmod(at // across, bands)
            first = (matrix * height + band * rows) * width
            if (name, first) not in self._found:
                count = min(max(1, _AT_ONCE // (rows * width)), bands - band, -(-(stop - at) // across))
                for _ in self._bands(name, first, (matrix * height + min(height, (band + count) * rows)) * width):
                    pass
            found = self._found.pop((name, first))
            offset = at % across
            end = min(stop, at - offset + across)
            yield at, [scale[offset : offset + end - at] for scale in found]
            at = end

    def _of_experts(
        self, name: str, exponents: bool, start: int, stop: int
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Elements of codes or of exponents of tensor `name`, an expert at a time."""
        stored = self._scaled.scales[name] if exponents else self._scaled.codes(name)
        size, at = stored.numel // stored.shape[0], start
        while at < stop:
            number, offset = divmod(at, size)
            end = min(stop, at - offset + size)
            if exponents and (found := self._found.get((name, number))):
                yield at, [scales[offset : offset + end - at] for scales in found]
                at = end
                continue
            if self._experts[:2] != (name, number):
                self._experts = name, number, self._expert(name, number)
            yield at, [torch.from_numpy(parts[exponents][offset : offset + end - at]) for parts in self._experts[2]]
            at = end

    def _expert(self, name: str, number: int) -> list[tuple[Codes, Codes]]:
        """An expert's codes and exponents at each point, as they are stored. Some rows, of whole blocks, at a time."""
        inner, outer = self._scaled.tensors[name].shape[-2:]
        rows = max(1, _AT_ONCE // (32 * outer)) * 32
        stored = [self._of(point).expert(name, number) for point in self.points]
        for row in range(0, inner, rows):
            own, blocks = slice(row, min(inner, row + rows)), slice(row // 32, -(-min(inner, row + rows) // 32))
            begin = (number * inner + row) * outer
            computed = self._computed(name, begin, begin + (own.stop - own.start) * outer)
            for values, (codes, scales) in zip(computed, stored, strict=True):
                matrix = np.ascontiguousarray(values.reshape(-1, outer).T)
                parts = np.ascontiguousarray(codes[:, own]), np.ascontiguousarray(scales[:, blocks])
                codes[:, own], scales[:, blocks] = encode_expert(matrix, meaning(*parts), *parts)
        self._found[name, number] = [torch.from_numpy(scales.reshape(-1)) for _, scales in stored]
        while len(self._found) > max(1, _MOST_SCALES // (stored[0][1].size * len(stored))):
            del self._found[next(iter(self._found))]
        return [(pack(codes.reshape(-1), 4), scales.reshape(-1)) for codes, scales in stored]

    def _bands(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, list[tuple[Codes, torch.Tensor]]]]:
        """The rows of blocks in which elements [start, stop) of a tensor are, some at a time: first and last element,
        and codes and scales at each point. Of a matrix with one scale, rows."""
        (height, width), (rows, _) = self._scaled.tensors[name].shape[-2:], self._scaled.block_of(name)
        single = self._scaled.block == (0, 0)
        step = 1 if single else rows
        most = max(1, _AT_ONCE // (step * width)) * step
        at = start
        while at < stop:
            matrix, row = divmod(at // width, height)
            row -= row % step
            until = min(height, row + most, -(-(stop - matrix * height * width) // width))
            until = min(height, -(-until // step) * step)
            begin, end = (matrix * height + row) * width, (matrix * height + until) * width
            results = self._band(name, begin, end, self._survey(name, matrix) if single else None)
            if row % rows == 0:
                self._remember(name, begin, width * rows, [scales for _, scales in results])
            yield begin, end, results
            at = end

    def _remember(self, name: str, begin: int, step: int, scales: list[torch.Tensor]) -> None:
        """Keeps scales until they are asked for; the oldest are forgotten."""
        for k in range(scales[0].shape[0]):
            self._found[name, begin + k * step] = [scale[k] for scale in scales]
        size = scales[0].shape[1] * scales[0].element_size() * len(scales)
        while len(self._found) > max(1000, _MOST_SCALES // (size + 1000)):
            del self._found[next(iter(self._found))]

    def _survey(self, name: str, matrix: int) -> list[tuple[bool, float]]:
        """Of a matrix with one scale, at each point: whether anything differs, and the largest element."""
        if self._surveyed[:2] != (name, matrix):
            height, width = self._scaled.tensors[name].shape[-2:]
            found = [(False, 0.0)] * len(self.points)
            step = max(1, _AT_ONCE // width)
            for row in range(matrix * height, (matrix + 1) * height, step):
                begin, end = row * width, min((matrix + 1) * height, row + step) * width
                parts = zip(found, self._computed(name, begin, end), self._stored(name, begin, end), strict=True)
                found = [
                    (touched or bool((values != before).any()), max(largest, float(_sizes(values).max())))
                    for (touched, largest), values, (_, _, before) in parts
                ]
            self._surveyed = name, matrix, found
        return self._surveyed[2]

    def _band(
        self, name: str, begin: int, end: int, surveyed: list[tuple[bool, float]] | None
    ) -> list[tuple[Codes, torch.Tensor]]:
        """Codes, 1-d, and scales, a row for each row of blocks, of whole rows of blocks at each point."""
        width = self._scaled.tensors[name].shape[-1]
        form = self._scaled.kind, self._scaled.block_of(name), self._scaled.power_of_two
        results = []
        for k, (values, (codes, scales, before)) in enumerate(
            zip(self._computed(name, begin, end), self._stored(name, begin, end), strict=True)
        ):
            matrix = values.reshape(-1, width), before.reshape(-1, width), codes.reshape(-1, width)
            results.append(requantize(*matrix, scales, *form, surveyed[k] if surveyed else None))
            self.nonfinite[k] += int(results[-1][1].isfinite().logical_not().sum())  # for which their dtype has no room
        return results

    def _computed(self, name: str, begin: int, end: int) -> list[Floats]:
        """Elements at each point, in fp32."""
        computed = [np.empty(end - begin, np.float32) for _ in self.points]
        for at, tensors in super().chunks(name, begin, end):
            for whole, tensor in zip(computed, tensors, strict=True):
                whole[at - begin : at - begin + tensor.numel()] = tensor.numpy()
        return computed

    def _stored(self, name: str, begin: int, end: int) -> Iterator[tuple[Codes, torch.Tensor, Floats]]:
        """The same of each point's base, as it is stored and what that means."""
        return (self._of(point).stored(name, begin, end) for point in self.points)


def reader_of(base: Checkpoint, dtype: torch.dtype | None) -> type[PointReader]:
    """What computes points of this base for an output of this dtype; None: the base's own."""
    return RequantizingReader if dtype is None and isinstance(base, Scaled) else PointReader


def requantize(
    values: Floats,
    before: Floats,
    codes: Codes,
    scales: torch.Tensor,
    kind: Kind,
    block: tuple[int, int],
    power_of_two: bool,
    surveyed: tuple[bool, float] | None = None,
) -> tuple[Codes, torch.Tensor]:
    """Codes, 1-d, and scales of `values`, whole rows of blocks of a matrix, or with `surveyed` (whether anything of it
    differs, its largest element) some rows of the only block. `before` is what `codes` and `scales` of the target mean:
    blocks in which it is the same keep them."""
    rows, columns = block
    down, across = range(0, values.shape[0], rows), range(0, values.shape[1], columns)
    if surveyed:
        touched, largest = np.array([[surveyed[0]]]), np.array([[surveyed[1]]], np.float32)
    else:
        touched = np.logical_or.reduceat(np.logical_or.reduceat(values != before, down, axis=0), across, axis=1)
        largest = np.maximum.reduceat(np.maximum.reduceat(_sizes(values), down, axis=0), across, axis=1)
    if not touched.any():
        return codes.reshape(-1), scales
    fresh = scale_of(torch.from_numpy(largest), kind, scales.dtype, power_of_two)
    kept = torch.from_numpy(touched).logical_not() | (fresh == 0)
    scales = torch.where(kept, scales, fresh)
    wide = _spread(scales.float().numpy(), block, values.shape)
    np.divide(values, np.where(wide == 0, np.float32(np.inf), wide), out=values)
    return np.where(_spread(touched, block, values.shape), encode(values, kind), codes).reshape(-1), scales


def _sizes(values: Floats) -> Floats:
    """Magnitudes; 0 of what is not finite, for which no scale makes room."""
    sizes: Floats = np.abs(values)
    if not np.isfinite(sizes.max(initial=0)):
        sizes[~np.isfinite(sizes)] = 0
    return sizes


def scale_of(largest: torch.Tensor, kind: Kind, dtype: torch.dtype, power_of_two: bool = False) -> torch.Tensor:
    """The scale of blocks whose largest element, in size, is this; or the next power of two. Where `dtype` rounds it to
    0, the least that it has."""
    scale = largest / kind.largest
    if power_of_two:
        fraction, exponent = torch.frexp(scale)
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
        scale = torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent), scale)
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return torch.where((scale > 0) & (scale.to(dtype) == 0), torch.tensor(least, dtype=dtype), scale.to(dtype))


def encode(values: Floats, kind: Kind) -> Codes:
    """The codes of scaled values, which are spent: the nearest, the even one of two."""
    np.clip(values, np.nanmin(kind.values), np.nanmax(kind.values), out=values)
    if kind is FP8:
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    whole = np.rint(values, out=values).astype(np.int8)
    if kind is INT8:
        return whole.view(np.uint8)
    return (whole.astype(np.int16) + (1 << kind.bits - 1)).astype(np.uint8)


def _spread(of_blocks: np.ndarray[Any, Any], block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """For each element what is its block's."""
    if of_blocks.size == 1:
        return np.broadcast_to(of_blocks.reshape(1, 1), shape)
    tall = of_blocks if block[0] == 1 else np.repeat(of_blocks, block[0], 0)[: shape[0]]
    return tall if tall.shape[1] == 1 else np.repeat(tall, block[1], 1)[:, : shape[1]]
