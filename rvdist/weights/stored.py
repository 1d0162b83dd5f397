"""A source's tensors as 1-d ranges of elements, where they lie in files as they are."""

from __future__ import annotations

import torch

from rvdist.core.errors import BadInput
from rvdist.weights.arithmetic.blocks import PackedFiles
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.stream import TORCH_DTYPE, TensorFiles


class Operand:
    """The tensors of `checkpoint`, which lie in its files as they are. Not thread-safe."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._files = TensorFiles(checkpoint)

    @property
    def checkpoint(self) -> Checkpoint:
        """What it reads."""
        return self._files.checkpoint

    @property
    def bytes_read(self) -> int:
        """So far, from files or the Hub."""
        return self._files.bytes_read

    def read(self, name: str, begin: int, end: int, buffer: torch.Tensor) -> torch.Tensor:
        """Elements [begin, end) of tensor `name` in C order: a 1-d view of `buffer`, a 1-d uint8 tensor of 8 bytes an
        element, or as many as its dtype has; in the dtype of its spec, but fp8 comes scaled in fp32 and wants 8. Raises
        BadInput where a file cannot be used, Failed where the Hub does not answer."""
        return self._files.read(self._tensors[name], begin, end, buffer)

    def file(self, name: str, begin: int, end: int) -> tuple[int, int] | None:
        """The descriptor of the file in which elements [begin, end) of a tensor lie as they are, and the byte where
        they begin; None where they lie otherwise. Raises as `read` does."""
        spec = self._tensors[name]
        return self._files.locate(spec, begin) if type(self) is Operand and end <= spec.numel else None

    def packed(self, name: str, begin: int, end: int) -> PackedFiles | None:
        """Where the parts of elements [begin, end) of a packed tensor are, to be read as they are summed; None where
        that cannot be. Raises as `read` does."""
        return None

    def factors(self, name: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """left [rows, r] and right [r, columns] in fp64, whose product is the matrix of this number in a tensor that is
        stored as factors. Raises as `read` does, and BadInput where it is not."""
        raise BadInput(f"{self.checkpoint.path}: holds tensor {name} not as two factors, and a method asks for these")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that elements of a tensor are read in."""
        return TORCH_DTYPE[self._tensors[name].dtype]

    def read_columns(self, name: str, rows: range, columns: range, buffer: torch.Tensor) -> torch.Tensor:
        """The same of some columns of some rows, where tensors lie as they are: any other kind is read by rows."""
        assert type(self) is Operand
        return self._files.read_columns(self._tensors[name], rows, columns, buffer)

    def _whole(self, spec: TensorSpec) -> torch.Tensor:
        """All of a tensor, in fp32 and its shape."""
        room = torch.empty(spec.nbytes, dtype=torch.uint8)
        return self._files.read(spec, 0, spec.numel, room).view(spec.shape).float()

    def close(self) -> None:
        self._files.close()
