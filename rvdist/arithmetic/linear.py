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


def combine(
    base: torch.Tensor,
    differences: Sequence[tuple[float, torch.Tensor, torch.Tensor]],
    out: torch.Tensor,
) -> int:
    """out = base + Σ α·(plus − minus), elementwise; returns how many results are not finite.

    All tensors have `out`'s shape; dtypes may differ and `base` is left as it is.
    """
    if not differences and base.dtype == out.dtype:
        out.copy_(base)
        return count_nonfinite(out)
    work = working_dtype([base.dtype, out.dtype, *(t.dtype for _, p, m in differences for t in (p, m))])
    result = torch.empty_like(base, dtype=work).copy_(base)
    difference = torch.empty_like(result)
    for alpha, plus, minus in differences:
        difference.copy_(plus)
        difference.sub_(minus.to(work)).mul_(alpha)
        result.add_(difference)
    out.copy_(result)
    return count_nonfinite(out)


def count_nonfinite(tensor: torch.Tensor) -> int:
    """How many elements are infinite or not a number."""
    if tensor.numel() == 0 or bool(torch.isfinite(tensor.abs().amax())):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())
