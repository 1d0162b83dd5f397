"""A source's tensors as 1-d ranges of elements, whether they lie in files as they are or have to be computed.

What is computed has the same bits whatever the ranges: each element is a sum in fp64 over the rank, in its order, of
products that fp64 holds exactly, rounded once to fp32; or one product of fp32. Holds the factors or the scales of one
tensor, and nothing else of a model.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from rvdist.core.errors import BadInput
from rvdist.weights.arithmetic.blocks import PackedFiles
from rvdist.weights.checkpoint import mxfp4
from rvdist.weights.checkpoint.difference import Dense, Difference, Dora, LowRank, Packed, Rows, Sparse, Whole
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.experts import INTERLEAVED
from rvdist.weights.checkpoint.fp8 import MXFP4, Codes, Floats, Scaled, dequantize, unpack
from rvdist.weights.checkpoint.header import ITEMSIZE, TensorSpec
from rvdist.weights.checkpoint.layouts import UP, Relaid, View
from rvdist.weights.checkpoint.remapped import Remapped
from rvdist.weights.checkpoint.stream import TORCH_DTYPE
from rvdist.weights.packed_files import locate, make_whole
from rvdist.weights.products import Interleaved, Rescaled, multiply
from rvdist.weights.remapped_rows import RemappedOperand
from rvdist.weights.stored import Operand

_CHUNK = 256 * 1024  # elements
_SCALES = 128 * 1024  # that are held, or those of a row of blocks
_ROWS = 32  # of a matrix that are transposed at a time


class _Computed(Operand):
    """The tensors of a difference, each in its own form."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(difference)
        self._difference = difference
        self._factors: tuple[str, int, torch.Tensor, torch.Tensor] = ("", 0, torch.empty(0), torch.empty(0))
        self._stack: tuple[str, Interleaved] | None = None  # a tensor's left factors of many matrices
        self._parts: dict[str, torch.Tensor] = {}
        self._base = open_operand(difference.base) if difference.base else None
        self._rescaled: tuple[str, Rescaled | None] = "", None

    @property
    def bytes_read(self) -> int:
        return super().bytes_read + (self._base.bytes_read if self._base else 0)

    def close(self) -> None:
        super().close()
        if self._base:
            self._base.close()

    def read(self, name: str, begin: int, end: int, buffer: torch.Tensor) -> torch.Tensor:
        form = self._difference.forms[name]
        if isinstance(form, Dense) and form.scale == 1:
            return self._files.read(form.values, begin, end, buffer)
        dtype = TORCH_DTYPE[self._tensors[name].dtype]
        out = buffer[: (end - begin) * dtype.itemsize].view(dtype)
        if isinstance(form, Dense):
            out.copy_(self._part(form.values, begin, end).double().mul_(form.scale))
        elif isinstance(form, Whole):
            out.copy_(self._part(form.values, begin, end))
            if form.rows:
                self._put(form.rows, begin, out)
            out.sub_(self._of_base(name, begin, end).to(dtype))
        elif isinstance(form, Rows):
            out.zero_()
            for start, stop in self._put(form, begin, out):
                out[start - begin : stop - begin].sub_(self._of_base(name, start, stop).to(dtype))
        elif isinstance(form, Dora):
            self._load_rescaled(name, form).fill(begin, out)
        elif isinstance(form, LowRank):
            self._multiply(name, form, begin, out)
        elif isinstance(form, Packed):
            if not make_whole(form, self._tensors[name].numel, begin, out, self._part):
                raise BadInput(
                    f"{self._difference.path}: tensor {name} does not say where its values are; save the vector again"
                )
        else:
            self._scatter(name, form, begin, end, out)
        return out

    def _multiply(self, name: str, form: LowRank, begin: int, out: torch.Tensor) -> None:
        size, at, end = self._tensors[name].numel // form.count, begin, begin + out.numel()
        while at < end:
            number, offset = divmod(at, size)
            count = min(end - at, size - offset)
            left, right = self._load_factors(name, form, number)
            multiply(left, right, form.scale, offset, out[at - begin : at - begin + count])
            at += count

    def _put(self, form: Rows, begin: int, out: torch.Tensor) -> list[tuple[int, int]]:
        """Puts the rows that `out` has a part of into it: which elements of the tensor these are."""
        width, end = form.values.shape[1], begin + out.numel()
        found = []
        for k in range(bisect_left(form.rows, begin // width), bisect_left(form.rows, -(-end // width))):
            first, stored = form.rows[k] * width, form.places[k] * width
            start, stop = max(begin, first), min(end, first + width)
            values = self._part(form.values, stored + start - first, stored + stop - first)
            out[start - begin : stop - begin].copy_(values)
            found.append((start, stop))
        return found

    def _load_factors(self, name: str, form: LowRank, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """left [rows, r] and right [r, columns] of a matrix of the tensor, widened exactly to fp32; kept until another
        is read."""
        if self._factors[:2] != (name, number):
            assert form.transposed is not None, "nobody has told which way the experts of an adapter lie"
            if form.count == 1:
                left, right = self._whole(form.left), self._whole(form.right)
            else:
                rank, columns = form.right.shape[0] // form.count, form.right.shape[1]
                if self._stack is None or self._stack[0] != name:
                    self._stack = name, Interleaved(form.left.shape, form.count, partial(self._part, form.left))
                left, first = self._stack[1][number].float(), number * rank * columns
                right = self._part(form.right, first, first + rank * columns).view(rank, columns).float().clone()
            if form.transposed:
                left, right = right.T.contiguous(), left.T.contiguous()
            self._factors = (name, number, left, right)
        return self._factors[2:]

    def _load_rescaled(self, name: str, form: Dora) -> Rescaled:
        held = self._rescaled[1]
        if held is None or self._rescaled[0] != name:
            factors, magnitude = self._load_factors(name, form), self._whole(form.magnitude)
            held = Rescaled(*factors, form.scale, magnitude, form.transposed is True, partial(self._of_base, name))
            self._rescaled = name, held
        return held

    def factors(self, name: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        form = self._difference.forms[name]
        assert isinstance(form, LowRank) and not isinstance(form, Dora)
        left, right = self._load_factors(name, form, number)
        return left.double().mul_(form.scale), right.double()

    def packed(self, name: str, begin: int, end: int) -> PackedFiles | None:
        form, numel = self._difference.forms[name], self._tensors[name].numel
        if not isinstance(form, Packed):
            return None
        return locate(form, numel, begin, end, self._part, self._files.locate)

    def _of_base(self, name: str, begin: int, end: int) -> torch.Tensor:
        assert self._base, "an adapter that needs its base was not bound to one"
        if self._parts.setdefault("base", torch.empty(0, dtype=torch.uint8)).numel() < 8 * (end - begin):
            self._parts["base"] = torch.empty(8 * (end - begin), dtype=torch.uint8)
        return self._base.read(name, begin, end, self._parts["base"])

    def _part(self, spec: TensorSpec, begin: int, end: int) -> torch.Tensor:
        """Elements of a part, in memory that the next of this kind has: fresh memory costs a page fault for 4 KiB."""
        suffix, nbytes = spec.name.rpartition(".")[2], (end - begin) * ITEMSIZE[spec.dtype]
        if self._parts.setdefault(suffix, torch.empty(0, dtype=torch.uint8)).numel() < nbytes:
            self._parts[suffix] = torch.empty(nbytes + nbytes // 4, dtype=torch.uint8)
        return self._files.read(spec, begin, end, self._parts[suffix])

    def _scatter(self, name: str, form: Sparse, begin: int, end: int, out: torch.Tensor) -> None:
        room, indices = torch.empty(8, dtype=torch.uint8), range(form.indices.numel)

        def index(k: int) -> int:
            return int(self._files.read(form.indices, k, k + 1, room))

        first, last = bisect_left(indices, begin, key=index), bisect_left(indices, end, key=index)
        count = last - first
        at = self._files.read(form.indices, first, last, torch.empty(count * 8, dtype=torch.uint8)).long()
        values = self._files.read(form.values, first, last, torch.empty(count * 8, dtype=torch.uint8))
        out.zero_()
        ascend = bool((at.diff() > 0).all() and (at >= begin).all() and (at < end).all())
        left_out = (begin == 0 and first > 0) or (end == self._tensors[name].numel and last < len(indices))
        if not ascend or left_out:
            raise BadInput(
                f"{self._difference.path}: the indices of tensor {name} do not ascend; save the vector again"
            )
        out[at - begin] = values


class Dequantized(Operand):
    """The tensors of a checkpoint some of which are quantised: of one tensor at a time it keeps some scales."""

    def __init__(self, checkpoint: Scaled) -> None:
        super().__init__(checkpoint)
        self._scaled = checkpoint
        self._scale = "", 0, np.empty((0, 0), np.float32)  # of rows of blocks from which one on
        self._expert = ("", 0, torch.empty(0, dtype=torch.bfloat16))

    def read(self, name: str, begin: int, end: int, buffer: torch.Tensor) -> torch.Tensor:
        if name not in self._scaled.scales:
            return super().read(name, begin, end, buffer)
        count = end - begin
        if self._scaled.kind is MXFP4:
            return self._of_experts(name, begin, end, buffer)
        out = buffer[: 4 * count].view(torch.float32)
        self._dequantize(name, self._codes(name, begin, end, buffer[4 * count :]), begin, out.numpy())
        return out

    def dtype(self, name: str) -> torch.dtype:
        in_fp32 = name in self._scaled.scales and self._scaled.kind is not MXFP4
        return torch.float32 if in_fp32 else super().dtype(name)

    def stored(self, name: str, begin: int, end: int) -> tuple[Codes, torch.Tensor, Floats]:
        """Whole rows of blocks of a scaled tensor as they are stored: codes, a byte each, and scales, a row for each
        row of blocks; and what they mean."""
        shape, count = self._tensors[name].shape, end - begin
        codes = self._codes(name, begin, end, torch.empty(count + 16, dtype=torch.uint8))
        values = np.empty(count, np.float32)
        self._dequantize(name, codes, begin, values)
        (height, width), (rows, columns) = shape[-2:], self._scaled.block_of(name)
        matrix, row = divmod(begin // width, height)
        first, across = matrix * -(-height // rows) + row // rows, -(-width // columns)
        bands = -(-count // (width * rows))
        room = torch.empty(bands * across * 8, dtype=torch.uint8)
        scales = self._files.read(self._scaled.scales[name], first * across, (first + bands) * across, room)
        return codes, scales.view(bands, across), values

    def expert(self, name: str, number: int) -> tuple[Codes, Codes]:
        """An expert's codes, a byte each, and its exponents: matrices [outer, …], transposed."""
        blocks, scale = self._scaled.codes(name), self._scaled.scales[name]
        size, count = blocks.numel // blocks.shape[0], scale.numel // scale.shape[0]
        codes = self.raw(blocks, number * size, (number + 1) * size).numpy()
        exponents = self.raw(scale, number * count, (number + 1) * count).numpy()
        outer = self._tensors[name].shape[-1]
        return unpack(codes, 4, 0, 2 * size).reshape(outer, -1), exponents.reshape(outer, -1)

    def _of_experts(self, name: str, begin: int, end: int, buffer: torch.Tensor) -> torch.Tensor:
        """In bf16, which holds the values of E2M1 exactly. Keeps one expert, as its elements are ordered."""
        inner, outer = self._tensors[name].shape[-2:]
        out, size = buffer[: 2 * (end - begin)].view(torch.bfloat16), inner * outer
        at = begin
        while at < end:
            number, offset = divmod(at, size)
            if self._expert[:2] != (name, number):
                codes, exponents = self.expert(name, number)
                values = torch.empty(inner, outer, dtype=torch.bfloat16)
                step = max(1, _CHUNK // inner)
                for first in range(0, outer, step):
                    rows = slice(first, first + step)
                    values[:, rows] = torch.from_numpy(mxfp4.meaning(codes[rows], exponents[rows])).T
                self._expert = name, number, values.view(-1)
            count = min(end - at, size - offset)
            out[at - begin : at - begin + count] = self._expert[2][offset : offset + count]
            at += count
        return out

    def raw(self, spec: TensorSpec, begin: int, end: int) -> torch.Tensor:
        """Elements of what describes codes, as they are stored."""
        return self._files.read(spec, begin, end, torch.empty((end - begin) * ITEMSIZE[spec.dtype], dtype=torch.uint8))

    def _codes(self, name: str, begin: int, end: int, room: torch.Tensor) -> Codes:
        spec, bits = self._scaled.codes(name), self._scaled.kind.bits
        several = self._scaled.kind.codes_in(spec)
        first, last = begin // several, -(-end // several)
        if (last - first) * ITEMSIZE[spec.dtype] > room.numel():
            room = torch.empty((last - first) * ITEMSIZE[spec.dtype], dtype=torch.uint8)
        raw = self._files.read(spec, first, last, room).view(torch.uint8).numpy()
        return unpack(raw, bits, begin - first * several, end - begin)

    def _dequantize(self, name: str, codes: Codes, begin: int, out: Floats) -> None:
        shape, block, scales = self._tensors[name].shape, self._scaled.block_of(name), self._scaled.scales[name]
        (height, width), (rows, columns) = shape[-2:], block
        across, bands = -(-width // columns), -(-height // rows)  # of blocks in one matrix
        at, end, several = begin, begin + len(out), max(1, _SCALES // across)
        while at < end:
            matrix, row = divmod(at // width, height)
            first = (matrix * bands + row // rows) // several * several
            last = min(first + several, scales.numel // across)
            if self._scale[:2] != (name, first):
                held = self.raw(scales, first * across, last * across).float().view(-1, across)
                self._scale = name, first, held.numpy()
            stop = min(end, (last // bands * height + last % bands * rows) * width)
            part = slice(at - begin, stop - begin)
            dequantize(codes[part], self._scale[2], block, shape, at, out[part], self._scaled.kind, first)
            at = stop


class _Relaid(Operand):
    """The tensors of a checkpoint in another layout of experts, out of what reads them in its own. Where that is more
    than to put matrices one after the other it keeps one expert's part of one tensor."""

    def __init__(self, checkpoint: Relaid) -> None:
        assert checkpoint.inner is not None
        super().__init__(checkpoint)
        inner = replace(checkpoint.inner, path=checkpoint.path, hub=checkpoint.hub)  # as workers are told them
        self._relaid, self._inner = checkpoint, open_operand(inner)
        self._slab = ("", -1, torch.empty(0))
        self._held: dict[str, tuple[str, range, torch.Tensor]] = {}  # of weights, and of biases: what was read last
        self._rooms: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    @property
    def bytes_read(self) -> int:
        return self._inner.bytes_read

    def close(self) -> None:
        self._inner.close()

    def dtype(self, name: str) -> torch.dtype:
        """Of what is quantised in part the dtype of what is."""
        if name not in self._dtypes:
            view = self._relaid.views.get(name)
            holders = view.ranges() if view else [self._relaid.names[name]]
            self._dtypes[name] = max((self._inner.dtype(holder) for holder in holders), key=lambda own: own.itemsize)
        return self._dtypes[name]

    def read(self, name: str, begin: int, end: int, buffer: torch.Tensor) -> torch.Tensor:
        view = self._relaid.views.get(name)
        if view is None:
            return self._inner.read(self._relaid.names[name], begin, end, buffer)
        if view.joined:
            return self._join(name, view, begin, end, buffer)
        dtype, size = self.dtype(name), self._tensors[name].numel // view.count
        out = buffer[: (end - begin) * dtype.itemsize].view(dtype)
        for k in range(begin // size, -(-end // size)):
            if self._slab[:2] != (name, k):
                self._slab = name, k, self._assemble(name, view, view.first + k)
            first, last = max(begin, k * size), min(end, (k + 1) * size)
            out[first - begin : last - begin] = self._slab[2][first - k * size : last - k * size]
        return out

    def factors(self, name: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._inner.factors(self._relaid.names[name], number)

    def _join(self, name: str, view: View, begin: int, end: int, buffer: torch.Tensor) -> torch.Tensor:
        """Elements of matrices that lie one after the other, each read where it is."""
        dtype, several = self.dtype(name), len(view.projections)
        out = buffer[: (end - begin) * dtype.itemsize].view(dtype)
        size, at = self._tensors[name].numel // view.count // several, begin
        while at < end:
            number, offset = divmod(at, size)
            expert, projection = view.first + number // several, view.projections[number % several]
            count = min(end - at, size - offset)
            holder = view.source.holder(projection, expert, view.part)
            first = view.source.elements(projection, expert, view.part).start + offset
            if count == end - begin and self._inner.dtype(holder) == dtype:
                return self._inner.read(holder, first, first + count, buffer)
            room = torch.empty(8 * count, dtype=torch.uint8)
            out[at - begin : at - begin + count] = self._inner.read(holder, first, first + count, room)
            at += count
        return out

    def _assemble(self, name: str, view: View, expert: int) -> torch.Tensor:
        """What an expert has in a tensor of the wanted layout, 1-d. Memory is taken once, for the largest so far."""
        source, several = view.source, len(view.projections)
        rows, columns = source.shape(view.projections[0])
        columns = columns if view.part == "weight" else 1
        out = self._room("slab", several * rows * columns, self.dtype(name))
        for k, projection in enumerate(view.projections):
            holder = source.holder(projection, expert, view.part)
            elements = source.elements(projection, expert, view.part)
            held = self._held.get(view.part)
            if held is None or held[:2] != (holder, elements):  # gate and up may be in the same, also of two tensors
                room = self._room(view.part, len(elements), self._inner.dtype(holder)).view(torch.uint8)
                held = holder, elements, self._inner.read(holder, elements.start, elements.stop, room)
                self._held[view.part] = held
            read = held[2]
            if source.layout == INTERLEAVED:
                alternate = read.view(columns, rows, -1)  # gate and up, or down alone
                part = alternate[..., 1 if projection == UP else 0].T
            else:
                part = read.view(rows, columns)
            place = out.view(columns, rows, several)[..., k].T
            if view.layout != INTERLEAVED:
                place = out.view(several, rows, columns)[k]
            for row in range(0, rows, _ROWS):  # so that what is transposed stays in the cache
                place[row : row + _ROWS].copy_(part[row : row + _ROWS])
        return out

    def _room(self, use: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        nbytes = numel * dtype.itemsize
        if self._rooms.get(use, torch.empty(0)).numel() < nbytes:
            self._rooms[use] = torch.empty(nbytes, dtype=torch.uint8)
        return self._rooms[use][:nbytes].view(dtype)


def open_operand(checkpoint: Checkpoint) -> Operand:
    """The operand that reads this kind of checkpoint."""
    if isinstance(checkpoint, Remapped):
        inner = replace(checkpoint.inner, path=checkpoint.path, hub=checkpoint.hub)  # as workers are told them
        return RemappedOperand(checkpoint, [open_operand(one) for one in (inner, *checkpoint.lenders[1:])])
    if isinstance(checkpoint, Relaid):
        return _Relaid(checkpoint)
    if isinstance(checkpoint, Scaled):
        return Dequantized(checkpoint)
    return _Computed(checkpoint) if isinstance(checkpoint, Difference) else Operand(checkpoint)
