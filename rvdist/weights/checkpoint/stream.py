"""Tensor bytes in and out of files, a chunk at a time, in buffers that are used again.

pread, not mmap: a truncated file or a read error is an exception here, not a SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from rvdist.core.errors import BadInput, Failed
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.pieces import Assembled, read_pieces

if TYPE_CHECKING:
    from rvdist.weights.checkpoint.hub import RangeReader

TORCH_DTYPE = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


class TensorFiles:
    """Reads ranges of tensors of one checkpoint, with one open descriptor a file. Not thread-safe.

    A file of a Hub checkpoint is downloaded at its first read, or is read by ranges (`Checkpoint.hub`)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self._descriptors: dict[str, int] = {}
        self._ranges: RangeReader | None = None
        if checkpoint.hub and checkpoint.hub.ranged:
            from rvdist.weights.checkpoint.hub import RangeReader

            self._ranges = RangeReader(checkpoint)

    def read(self, spec: TensorSpec, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """Elements [start, stop) of a tensor in C order: a 1-d view, in the stored dtype, of `buffer`, a 1-d
        uint8 tensor. Raises BadInput, naming the file, where it ends too early, and Failed where it cannot be read
        or the Hub does not answer."""
        dtype = TORCH_DTYPE[spec.dtype]
        view = buffer[: (stop - start) * dtype.itemsize]
        if isinstance(spec, Assembled):
            with self._explain_errors(spec):
                read_pieces(spec, start, stop, view.numpy().data, self._fill)
            self.bytes_read += view.numel()
            return view.view(dtype)
        offset = spec.offset + start * dtype.itemsize
        with self._explain_errors(spec):
            if self._ranges and spec.file in self._ranges.files:
                self._ranges.read(spec, offset, view.numpy().data)
            else:
                read_exactly(self._descriptor(spec.file), offset, view)
        self.bytes_read += view.numel()
        return view.view(dtype)

    def locate(self, spec: TensorSpec, start: int) -> tuple[int, int] | None:
        """The descriptor of a tensor's file, and the byte where its element `start` is; None where it is in pieces, or
        read by ranges. Raises as `read` does."""
        if isinstance(spec, Assembled) or (self._ranges and spec.file in self._ranges.files):
            return None
        with self._explain_errors(spec):
            return self._descriptor(spec.file), spec.offset + start * TORCH_DTYPE[spec.dtype].itemsize

    def read_columns(self, spec: TensorSpec, rows: range, columns: range, buffer: torch.Tensor) -> torch.Tensor:
        """The same of some columns of some rows, and of no others. Of several matrices all rows are counted on."""
        dtype, width = TORCH_DTYPE[spec.dtype], spec.shape[-1]
        size = len(columns) * dtype.itemsize
        view = buffer[: len(rows) * size]
        if isinstance(spec, Assembled):
            whole = torch.empty(len(rows) * width * dtype.itemsize, dtype=torch.uint8)
            held = self.read(spec, rows.start * width, rows.stop * width, whole).view(-1, width)
            view.view(dtype).view(len(rows), -1).copy_(held[:, columns.start : columns.stop])
            return view.view(dtype)
        memory, offset = view.numpy().data, spec.offset + columns.start * dtype.itemsize
        with self._explain_errors(spec):
            ranged = self._ranges if self._ranges and spec.file in self._ranges.files else None
            descriptor = -1 if ranged else self._descriptor(spec.file)
            for k, row in enumerate(rows):
                part, at = memory[k * size : (k + 1) * size], offset + row * width * dtype.itemsize
                if ranged:
                    ranged.read(spec, at, part)
                elif os.preadv(descriptor, [part], at) != size:
                    read_exactly(descriptor, at, view[k * size : (k + 1) * size])
        self.bytes_read += view.numel()
        return view.view(dtype)

    def _fill(self, file: str, offset: int, memory: memoryview) -> None:
        fill_exactly(self._descriptor(file), offset, memory)

    @contextmanager
    def _explain_errors(self, spec: TensorSpec) -> Iterator[None]:
        try:
            yield
        except EOFError:
            path = self.checkpoint.path / spec.file
            raise BadInput(f"{path}: ends inside tensor {spec.name}; it changed or was truncated") from None
        except OSError as error:
            path = self.checkpoint.path / spec.file
            raise Failed(f"{path}: cannot be read ({error.strerror}); run again when it can") from None

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            path = self.checkpoint.path / file
            if self.checkpoint.hub:
                from rvdist.weights.checkpoint.hub import download, hub_stamp

                path = download(self.checkpoint.hub, file, hub_stamp(self.checkpoint, file))
            self._descriptors[file] = descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the kernel reads twice as far ahead
        return self._descriptors[file]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def read_exactly(descriptor: int, offset: int, view: torch.Tensor) -> None:
    """Fills a 1-d uint8 tensor from a file. Raises EOFError where the file is too short."""
    fill_exactly(descriptor, offset, view.numpy().data)


def fill_exactly(descriptor: int, offset: int, memory: memoryview) -> None:
    """Fills bytes from a file. Raises EOFError where the file is too short."""
    while memory:
        count = os.preadv(descriptor, [memory], offset)
        if count == 0:
            raise EOFError
        memory, offset = memory[count:], offset + count


def write_exactly(descriptor: int, offset: int, tensor: torch.Tensor) -> memoryview:
    """Writes a 1-d tensor's bytes at `offset` and returns them. Raises OSError."""
    whole = left = tensor.view(torch.uint8).numpy().data
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count
    return whole
