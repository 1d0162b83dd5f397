"""The loops most merges spend their arithmetic in: linear sums on bf16 tensors, compiled.

Does in one pass over a core's nearest cache what `combine` does in one pass over memory for every operation,
with the same roundings: LLVM fuses no multiply and add unless told to. So its bytes equal `combine`'s. Sums of 32 bits
are 64 in numba, which halves what a vector register holds: the rounding casts them back. Of sums whose tensors lie in
files it reads these too, so that Python has nothing to do for each chunk.
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
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.voidptr, types.uintp, types.int64))  # libc's


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


def linear_of_files(
    files: Sequence[tuple[int, int]],
    differences: Sequence[tuple[float, int, int]],
    out: torch.Tensor,
    buffers: torch.Tensor,
) -> int | None:
    """`linear` of what is read meanwhile. `files`: of the base and each other tensor a descriptor, and the byte where
    its first element is; `differences`: α, and the places of plus and minus among them. `out` is 1-d bf16, `buffers`
    as many rows of bf16 as there are files. None where not all could be read: `out` is undefined then."""
    descriptors, offsets = zip(*files, strict=True)
    alphas, plus, minus = zip(*differences, strict=True)
    found = _linear_of_files(
        np.array(descriptors, np.int32),
        np.array(offsets, np.int64),
        np.array(plus),
        np.array(minus),
        np.array(alphas, np.float32),
        _bits(buffers),
        _bits(out),
    )
    return None if found < 0 else int(found)


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


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _widen(base, total):  # type: ignore[no-untyped-def]
    half = np.uint32(16)
    for i in range(base.size):
        total[i] = _as_float(np.uint32(base[i]) << half)


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _add(alpha, p, m, total):  # type: ignore[no-untyped-def]
    half = np.uint32(16)
    for i in range(p.size):
        difference = _as_float(np.uint32(p[i]) << half) - _as_float(np.uint32(m[i]) << half)
        total[i] += alpha * difference


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _linear(base, plus, minus, alphas, out):  # type: ignore[no-untyped-def]
    total = np.empty(_BLOCK, np.float32)
    nonfinite = np.int64(0)
    for begin in range(0, out.size, _BLOCK):
        n = min(_BLOCK, out.size - begin)
        _widen(base[begin : begin + n], total)
        for k in range(len(plus)):
            _add(alphas[k], plus[k][begin : begin + n], minus[k][begin : begin + n], total)
        nonfinite += _round(total, out[begin : begin + n])
    return nonfinite


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _linear_of_files(descriptors, offsets, plus, minus, alphas, buffers, out):  # type: ignore[no-untyped-def]
    total = np.empty(_BLOCK, np.float32)
    nonfinite = np.int64(0)
    for start in range(0, out.size, buffers.shape[1]):
        count = min(buffers.shape[1], out.size - start)
        for k in range(descriptors.size):
            if _pread(descriptors[k], buffers[k].ctypes, 2 * count, offsets[k] + 2 * start) != 2 * count:
                return np.int64(-1)
        for begin in range(0, count, _BLOCK):
            end = min(begin + _BLOCK, count)
            _widen(buffers[0][begin:end], total)
            for k in range(alphas.size):
                _add(alphas[k], buffers[plus[k]][begin:end], buffers[minus[k]][begin:end], total)
            nonfinite += _round(total, out[start + begin : start + end])
    return nonfinite


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _shifted(base, vectors, alphas, out):  # type: ignore[no-untyped-def]
    total = np.empty(_BLOCK, np.float32)
    nonfinite = np.int64(0)
    for begin in range(0, out.size, _BLOCK):
        n = min(_BLOCK, out.size - begin)
        _widen(base[begin : begin + n], total)
        for k in range(len(vectors)):
            v, alpha = vectors[k][begin : begin + n], alphas[k]
            for i in range(n):
                total[i] += alpha * v[i]
        nonfinite += _round(total, out[begin : begin + n])
    return nonfinite
