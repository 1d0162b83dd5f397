"""Task arithmetic: r = t + Σ α·(p − m), widened exactly, combined in listed order, rounded once.

For each term d = round(p − m), s = round(α·d), r = round(t + s) in the working precision, never fused,
then one rounding to the output dtype, to nearest even: so the bytes depend neither on how tensors are
cut into chunks nor on the device. Source: arXiv 2212.04089; arXiv 2509.01363, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def working_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """fp32 where every operand has at most 16 bits, else fp64."""
    return torch.float32 if all(dtype.itemsize <= 2 for dtype in dtypes) else torch.float64


class Scratch:
    """Three buffers of `numel` elements of the widest dtype, used again for every chunk: fresh memory costs a page
    fault for each 4 KiB, which is more than the arithmetic."""

    def __init__(self, numel: int) -> None:
        self._buffers = [torch.empty(numel * 8, dtype=torch.uint8) for _ in range(3)]

    def __call__(self, place: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self._buffers[place][: numel * dtype.itemsize].view(dtype)


def combine(
    base: torch.Tensor,
    differences: Sequence[tuple[float, torch.Tensor, torch.Tensor]],
    out: torch.Tensor,
    scratch: Scratch | None = None,
) -> int:
    """out = base + Σ α·(plus − minus), elementwise; returns how many results are not finite.

    All tensors are 1-d of `out`'s length; dtypes may differ and `base` is left as it is.
    """
    scratch = scratch or Scratch(out.numel())
    if differences:
        work = working_dtype([base.dtype, out.dtype, *(t.dtype for _, p, m in differences for t in (p, m))])
        result, difference, subtrahend = (scratch(place, out.numel(), work) for place in range(3))
        result.copy_(base)
        for alpha, plus, minus in differences:
            difference.copy_(plus)
            difference.sub_(subtrahend.copy_(minus))
            result.add_(difference if alpha == 1 else difference.mul_(alpha))
        out.copy_(result)
    else:
        out.copy_(base)
    return count_nonfinite(out, scratch)


_EXPONENT = {  # the bits that are all set in infinities and NaNs, and in nothing else
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def count_nonfinite(tensor: torch.Tensor, scratch: Scratch | None = None) -> int:
    """How many elements of a 1-d tensor are infinite or not a number; 0 for dtypes that cannot be."""
    if tensor.numel() == 0 or tensor.dtype not in _EXPONENT:
        return 0
    integer, exponent = _EXPONENT[tensor.dtype]
    scratch = scratch or Scratch(tensor.numel())
    bits = torch.bitwise_and(tensor.view(integer), exponent, out=scratch(0, tensor.numel(), integer))
    return int((bits == exponent).sum()) if int(bits.amax()) == exponent else 0
