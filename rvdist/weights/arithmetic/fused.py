"""The loops most merges spend their arithmetic in: linear sums on bf16 tensors, compiled.

Does in one pass over a core's nearest cache what `combine` does in one pass over memory for every operation,
with the same roundings: LLVM fuses no multiply and add unless told to. So its bytes equal `combine`'s. Sums of 32 bits
are 64 in numba, which halves what a vector register holds: the rounding casts them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

_BLOCK = 4096  # elements: an fp32 sum of them stays in the first-level cache


def applies(tensors: Sequence[torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a loop can take all of these, which have to be of this `dtype`."""
    return all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)


def linear(
    base: torch.Tensor, differences: Sequence[tuple[float, torch.Tensor, torch.Tensor]], out: torch.Tensor
) -> int:
    """out = base + Σ α·(plus − minus) in fp32, rounded to nearest even; returns how many results are not finite.
    All tensors are 1-d bf16 of one length on the CPU."""
    alphas, plus, minus = zip(*differences, strict=True)
    return int(
        _linear(
            _bits(base), tuple(map(_bits, plus)), tuple(map(_bits, minus)), np.array(alphas, np.float32), _bits(out)
        )
    )


def shifted(base: torch.Tensor, vectors: Sequence[tuple[float, torch.Tensor]], out: torch.Tensor) -> int:
    """out = base + Σ α·v in fp32, rounded to nearest even; returns how many results are not finite. All tensors are 1-d
    of one length on the CPU, `base` and `out` bf16, v fp32."""
    alphas, differences = zip(*vectors, strict=True)
    return int(_shifted(_bits(base), tuple(v.numpy() for v in differences), np.array(alphas, np.float32), _bits(out)))


def _bits(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return tensor.view(torch.uint16).numpy()


@intrinsic  # type: ignore[untyped-decorator]
def _as_float(typing: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], context.get_value_type(types.float32)
    )


@intrinsic  # type: ignore[untyped-decorator]
def _as_bits(typing: Any, number: Any) -> Any:
    return types.uint32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], context.get_value_type(types.uint32)
    )


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _round(total, o):  # type: ignore[no-untyped-def]
    """fp32 to bf16; how many are not finite."""
    half, found = np.uint32(16), np.uint32(0)
    for i in range(o.size):
        u = _as_bits(total[i])
        rounded = np.uint32(np.uint32(u + np.uint32(0x7FFF) + ((u >> half) & np.uint32(1))) >> half)
        if (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            rounded = np.uint32(0x7FC0)  # a NaN stays one
        o[i] = np.uint16(rounded)
        found = np.uint32(found + np.uint32((rounded & np.uint32(0x7F80)) == np.uint32(0x7F80)))
    return found


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _linear(base, plus, minus, alphas, out):  # type: ignore[no-untyped-def]
    half = np.uint32(16)
    total = np.empty(_BLOCK, np.float32)
    nonfinite = np.int64(0)
    for begin in range(0, out.size, _BLOCK):
        n = min(_BLOCK, out.size - begin)
        b = base[begin : begin + n]
        for i in range(n):
            total[i] = _as_float(np.uint32(b[i]) << half)
        for k in range(len(plus)):
            p, m, alpha = plus[k][begin : begin + n], minus[k][begin : begin + n], alphas[k]
            for i in range(n):
                difference = _as_float(np.uint32(p[i]) << half) - _as_float(np.uint32(m[i]) << half)
                total[i] += alpha * difference
        nonfinite += _round(total, out[begin : begin + n])
    return nonfinite


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _shifted(base, vectors, alphas, out):  # type: ignore[no-untyped-def]
    half = np.uint32(16)
    total = np.empty(_BLOCK, np.float32)
    nonfinite = np.int64(0)
    for begin in range(0, out.size, _BLOCK):
        n = min(_BLOCK, out.size - begin)
        b = base[begin : begin + n]
        for i in range(n):
            total[i] = _as_float(np.uint32(b[i]) << half)
        for k in range(len(vectors)):
            v, alpha = vectors[k][begin : begin + n], alphas[k]
            for i in range(n):
                total[i] += alpha * v[i]
        nonfinite += _round(total, out[begin : begin + n])
    return nonfinite
