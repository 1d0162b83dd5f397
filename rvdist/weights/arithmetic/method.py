"""How task vectors change a tensor: the contract of a method, and what all methods share.

Everything is widened exactly to a working precision, combined there without fused operations, and rounded once
to the output dtype, to nearest even: so the bytes depend neither on how tensors are cut into chunks nor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import torch

from rvdist.weights.arithmetic.blocks import PackedFiles

Count = int | torch.Tensor  # of elements; on a card a 0-d tensor there, since the CPU would have to wait for a number
Difference = tuple[float, torch.Tensor, torch.Tensor | None]  # α, plus, minus; no minus: plus is the difference


@dataclass(frozen=True)
class Place:
    """Where a chunk stands: its tensor, that tensor's number of elements, and its first element. `densities`: the share
    that is kept of each vector, where it is not the method's own. `shape`: the tensor's. `alphas`: of the vectors, for
    a survey."""

    tensor: str
    numel: int
    start: int = 0
    densities: tuple[float, ...] = ()
    shape: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """The elements of a row; a tensor of one dimension is one."""
        return self.shape[-1] if len(self.shape) > 1 else self.numel


class Method(Protocol):
    """Turns differences into the change of a tensor. `elementwise_sum`: is base + Σ α·(plus − minus). `surveys_base`: a
    survey must see the base too."""

    elementwise_sum: bool
    surveys_base: bool

    def survey(self, place: Place, chunks: Callable[..., Iterator[list[torch.Tensor]]]) -> None:
        """Looks at a whole tensor before `add` is called for its chunks. Each call of `chunks` streams all of it, or
        the elements from the first number it is given to before the second,
        one 1-d difference a vector and chunk, valid until the next, with the base before them where `surveys_base`.
        For a method of `low_rank` it streams instead, of the matrix that has the number it is given, the factors of one
        vector after the other, in fp64: left (rows, r) and right (r, columns), whose product is the difference.
        Only called for a method of `whole_tensors` (rvdist/core/method.py)."""

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        """Adds the change to `total`, in place. All tensors are 1-d, of one length and of the working dtype, fp32
        or fp64; the differences may be overwritten."""


class Scratch:
    """Buffers of `numel` elements of the widest dtype, used again for every chunk: fresh memory costs a page
    fault for each 4 KiB, which is more than the arithmetic."""

    def __init__(self, numel: int, device: str = "cpu") -> None:
        self.numel, self._device = numel, device
        self._buffers: list[torch.Tensor] = []

    def __call__(self, place: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        while len(self._buffers) <= place:
            self._buffers.append(torch.empty(self.numel * 8, dtype=torch.uint8, device=self._device))
        return self._buffers[place][: numel * dtype.itemsize].view(dtype)


def working_dtype(
    ends: Sequence[torch.dtype], vectors: Sequence[tuple[torch.dtype, torch.dtype | None]]
) -> torch.dtype:
    """fp32 where every operand has at most 16 bits, else fp64. `ends` are the dtypes of the base and the output,
    `vectors` those of plus and minus, as they are stored: fp8 with scales counts as fp8. A stored difference is
    already in working precision: in fp32 it asks for no more than fp32."""
    dtypes = list(ends)
    for plus, minus in vectors:
        dtypes += [plus, minus] if minus is not None else [plus] * (plus != torch.float32)
    return torch.float32 if all(dtype.itemsize <= 2 for dtype in dtypes) else torch.float64


def subtract(
    difference: torch.Tensor, plus: torch.Tensor, minus: torch.Tensor | None, scratch: torch.Tensor
) -> torch.Tensor:
    """round(plus − minus) in the dtype of `difference`, which it fills; `scratch` is another of that dtype."""
    difference.copy_(plus)
    return difference if minus is None else difference.sub_(scratch.copy_(minus))


_loops: ModuleType | None = None  # `fused`, once it is loaded


@cache
def warm_up() -> None:
    """Loads the compiled loops, which takes half a second and pays from gigabytes on. Without them, and where there is
    no compiler, torch's operations give the same bytes."""
    global _loops
    try:
        from rvdist.weights.arithmetic import fused
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
    else:
        nothing = torch.zeros(1, dtype=torch.bfloat16)
        fused.linear(nothing, [(1.0, nothing, nothing)], torch.empty_like(nothing))
        _loops = fused


def compiled() -> bool:
    """Whether the compiled loops are loaded."""
    return _loops is not None


def combine(
    method: Method,
    base: torch.Tensor,
    differences: Sequence[Difference],
    out: torch.Tensor,
    scratch: Scratch | None = None,
    place: Place | None = None,
    work: torch.dtype | None = None,
) -> Count:
    """out = base + the method's change, elementwise; returns how many results are not finite.

    All tensors are 1-d of `out`'s length and on its device; dtypes may differ and `base` is left as it is. `work` is
    the working precision, None for that of these tensors' dtypes.
    """
    scratch = scratch or Scratch(out.numel(), out.device.type)
    if not differences:
        out.copy_(base)
        return _count(out, scratch)
    vectors = [(plus.dtype, minus.dtype if minus is not None else None) for _, plus, minus in differences]
    work, n = work or working_dtype([base.dtype, out.dtype], vectors), out.numel()
    if _loops and method.elementwise_sum and work == torch.float32 and _loops.applies([base, out]):
        pairs = [(alpha, plus, minus) for alpha, plus, minus in differences if minus is not None]
        if not pairs and _loops.applies([v for _, v, _ in differences], torch.float32):
            return int(_loops.shifted(base, [(alpha, v) for alpha, v, _ in differences], out))
        operands = (t for _, plus, minus in pairs for t in (plus, minus))
        if len(pairs) == len(differences) and _loops.applies(list(operands)):
            return int(_loops.linear(base, pairs, out))
    total, subtrahend = scratch(0, n, work), scratch(1, n, work)
    taken = [subtract(scratch(2 + k, n, work), p, m, subtrahend) for k, (_, p, m) in enumerate(differences)]
    total.copy_(base)
    method.add(total, [alpha for alpha, _, _ in differences], taken, place or Place("", n))
    out.copy_(total)
    return _count(out, scratch)


def combine_files(
    method: Method,
    files: Sequence[tuple[int, int]],
    differences: Sequence[tuple[float, int, int]],
    out: torch.Tensor,
    scratch: Scratch,
) -> int | None:
    """What `combine` does in fp32, of bf16 tensors that are read meanwhile: `files` are the base's and those of plus
    and minus of each difference, which has their places; each is a descriptor and the byte where it begins. None where
    that cannot be done: they are to be read and combined then."""
    if not (_loops and method.elementwise_sum and _loops.applies([out])):
        return None
    size = min(scratch.numel, 1 << (4 * scratch.numel // len(files)).bit_length() - 1)
    buffers = scratch(0, len(files) * size, torch.bfloat16).view(len(files), size)
    found: int | None = _loops.linear_of_files(files, differences, out, buffers)
    return found


def combine_packed(
    method: Method, base: tuple[int, int], packed: PackedFiles, alpha: float, out: torch.Tensor, scratch: Scratch
) -> int | None:
    """What `combine` does in fp32 of a bf16 base and one packed difference, which are read meanwhile. `base` is a
    descriptor, and the byte where what `out` is to have begins. None where that cannot be done, or the parts do not fit
    each other: the difference is to be read and combined then."""
    from rvdist.weights.arithmetic import packed_sum  # packed tensors need a compiler however they are read

    if not (method.elementwise_sum and packed_sum.applies(alpha, out, scratch.numel)):
        return None
    count = packed_sum.ROOM
    rooms = scratch(0, count // 4, torch.uint64), scratch(1, count, torch.float32)
    return packed_sum.of_files(base, packed, alpha, out, rooms)


def _count(out: torch.Tensor, scratch: Scratch) -> Count:
    return tally_nonfinite(out, scratch) if out.is_cuda else count_nonfinite(out, scratch)


_EXPONENT = {  # the bits that are all set in infinities and NaNs, and in nothing else
    torch.float8_e4m3fn: (torch.int8, 0x7F),
    torch.float8_e5m2: (torch.int8, 0x7C),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def count_nonfinite(tensor: torch.Tensor, scratch: Scratch | None = None) -> int:
    """How many elements of a 1-d tensor are infinite or not a number; 0 for dtypes that cannot be."""
    if tensor.numel() == 0 or tensor.dtype not in _EXPONENT:
        return 0
    bits, exponent = _exponents(tensor, scratch)
    return int((bits == exponent).sum()) if int(bits.amax()) == exponent else 0


def tally_nonfinite(tensor: torch.Tensor, scratch: Scratch | None = None) -> torch.Tensor:
    """What `count_nonfinite` counts, as a 0-d tensor on the same device: nothing waits for it."""
    if tensor.dtype not in _EXPONENT:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits, exponent = _exponents(tensor, scratch)
    return (bits == exponent).sum()


def _exponents(tensor: torch.Tensor, scratch: Scratch | None) -> tuple[torch.Tensor, int]:
    """The bits of the exponents, and what these are where an element is not finite."""
    integer, exponent = _EXPONENT[tensor.dtype]
    scratch = scratch or Scratch(tensor.numel(), tensor.device.type)
    return torch.bitwise_and(tensor.view(integer), exponent, out=scratch(0, tensor.numel(), integer)), exponent


def unify_nans(tensor: torch.Tensor) -> None:
    """Makes every NaN the same one: which of them an operation gives depends on device and instruction."""
    integer, _ = _EXPONENT[tensor.dtype]  # torch fills no fp8 tensor by a mask, but one of integers
    one = int(torch.tensor(math.nan, dtype=tensor.dtype).view(integer))
    tensor.view(integer).masked_fill_(tensor.isnan(), one)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many for torch's operations: on chunks as small as ours, more than one only wait for each other, twenty times
    as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
