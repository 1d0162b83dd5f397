"""The loops of task arithmetic with one packed vector (`rvdist.weights.packed`), compiled.

Reads the target's tensor to where the sum is to be, and the packed parts, some blocks at a time. Its bytes are those
that `combine` gives with the vector made whole, which it is not. In a block with few values those elements are summed
one by one; in one with many all are, several at a time, and in one where adding 0 changes others, as it does −0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from rvdist.weights.arithmetic.blocks import BLOCK, PackedFiles
from rvdist.weights.arithmetic.fused import _as_bits, _as_float, _pread, _round
from rvdist.weights.arithmetic.unpack import _count, _lowest

_AT_ONCE = 64  # blocks that are read at a time
ROOM = _AT_ONCE * BLOCK  # elements of a buffer
_WORDS = BLOCK // 64
_FEW = BLOCK // 20  # values of a block that are summed one by one
_ONE, _HALF, _HIGH, _LESS = np.uint32(1), np.uint32(16), np.uint32(0xFFFF0000), np.uint32(0x7FFF)
_MOST = torch.finfo(torch.float32).max
_SIGN, _EXPONENT = np.uint16(0x8000), np.uint16(0x7F80)
_TWICE_INFINITE = np.uint32(0xFEFF0000)  # twice what rounds to infinity, as bits: the sign is shifted out


def applies(alpha: float, out: torch.Tensor, room: int) -> bool:
    """Whether the loops can take this, with buffers of so many widest elements."""
    finite = abs(alpha) <= _MOST  # else 0 times it is not 0
    return finite and out.dtype == torch.bfloat16 and out.device.type == "cpu" and room >= ROOM


def of_files(
    base: tuple[int, int], packed: PackedFiles, alpha: float, out: torch.Tensor, rooms: Sequence[torch.Tensor]
) -> int | None:
    """out = base + α·v in fp32, rounded to nearest even: as many elements as `out` has, 1-d bf16. `base` is a
    descriptor and the byte where these begin. `rooms` are buffers for the places of ROOM elements as words of 64, and
    for as many fp32. How many results are not finite; None where not all could be read, or the parts do not fit each
    other: `out` is undefined then."""
    descriptors, offsets = zip(base, packed.where, packed.values, strict=True)
    found = _of_files(
        np.array(descriptors, np.int32),
        np.array(offsets, np.int64),
        packed.in_bits,
        packed.starts,
        packed.first,
        packed.limit,
        np.float32(alpha),
        *(room.numpy() for room in rooms),
        (out.data_ptr() - 2 * packed.first) % 4 == 0,
        out.view(torch.uint16).numpy(),
    )
    return None if found < 0 else int(found)


@intrinsic  # type: ignore[untyped-decorator]
def _expand_16(typing: Any, word: Any, values: Any, begin: Any, out: Any, place: Any) -> Any:
    """Of 64 elements from `place` on those whose bit of `word` is set are the values from `begin` on, the others 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, values, begin, out, place = arguments
        size, number = ir.IntType(64), ir.FloatType()
        vector, mask = ir.VectorType(number, 16), ir.VectorType(ir.IntType(1), 16)
        load = builder.module.declare_intrinsic(
            "llvm.masked.expandload.v16f32", (), ir.FunctionType(vector, [number.as_pointer(), mask, vector])
        )
        source = builder.gep(context.make_array(signature.args[1])(context, builder, values).data, [begin])
        target = builder.gep(context.make_array(signature.args[3])(context, builder, out).data, [place])
        for k in range(0, 64, 16):
            part = builder.trunc(builder.lshr(word, size(k)), ir.IntType(16))
            held = builder.call(load, [source, builder.bitcast(part, mask), ir.Constant(vector, [0.0] * 16)])
            builder.store(held, builder.bitcast(builder.gep(target, [size(k)]), vector.as_pointer()), align=4)
            source = builder.gep(source, [builder.zext(builder.ctpop(part), size)])
        return context.get_dummy_value()

    return types.void(types.uint64, values, types.intp, out, types.intp), generate


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _expand_1(word, values, begin, out, place):  # type: ignore[no-untyped-def]
    part = out[place : place + 64]
    part[:] = 0
    while word:
        part[_lowest(word)] = values[begin]
        begin += 1
        word &= word - np.uint64(1)


_expand = _expand_16 if binding.get_host_cpu_features().get("avx512f") else _expand_1


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _add_many(pairs, words, values, alpha, spread, out):  # type: ignore[no-untyped-def]
    """Elements are taken two by two, the even one in the lower half. Whether one may be infinite or not a number."""
    done = 0
    for k in range(_WORDS):
        _expand(words[k], values, done, spread, 64 * k)
        done += _count(words[k])
    most = np.uint32(0)
    for i in range(BLOCK // 2):
        even = _as_bits(_as_float(np.uint32(pairs[i] << _HALF)) + alpha * spread[2 * i])
        odd = _as_bits(_as_float(np.uint32(pairs[i] & _HIGH)) + alpha * spread[2 * i + 1])
        low = np.uint32(np.uint32(even + _LESS + ((even >> _HALF) & _ONE)) >> _HALF)
        out[i] = low | np.uint32(np.uint32(odd + _LESS + ((odd >> _HALF) & _ONE)) & _HIGH)
        most = max(most, max(np.uint32(even + even), np.uint32(odd + odd)))
    return most >= _TWICE_INFINITE


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _look_at(own):  # type: ignore[no-untyped-def]
    """Whether an element is infinite or not a number, and whether one is −0."""
    most, negative = np.uint16(0), np.uint16(0)
    for i in range(own.size):
        most = max(most, np.uint16(own[i] & ~_SIGN))
        negative = max(negative, np.uint16(own[i] == _SIGN))
    return most >= _EXPONENT, negative > 0


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _add_one(out, place, value, alpha):  # type: ignore[no-untyped-def]
    """Whether the result is infinite or not a number."""
    u = _as_bits(_as_float(np.uint32(out[place]) << _HALF) + alpha * value)
    out[place] = np.uint16(np.uint32(u + _LESS + ((u >> _HALF) & _ONE)) >> _HALF)
    if np.uint32(u + u) > np.uint32(0xFF000000):
        out[place] = np.uint16(0x7FC0)  # a NaN stays one
    return np.uint32(u + u) >= _TWICE_INFINITE


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _add_few(out, bits, words, places, values, alpha):  # type: ignore[no-untyped-def]
    """As `_add_many`, in place, of the elements that have a value."""
    odd = False
    if not bits:
        for k in range(places.size):
            odd |= _add_one(out, places[k], values[k], alpha)
        return odd
    done = 0
    for k in range(_WORDS):
        left = words[k]
        while left:
            odd |= _add_one(out, 64 * k + np.int64(_lowest(left)), values[done], alpha)
            done += 1
            left &= left - np.uint64(1)
    return odd


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _fits(words, held, limit):  # type: ignore[no-untyped-def]
    """Whether so many bits are set, none of them beyond the tensor."""
    for k in range(_WORDS):
        held -= _count(words[k])
        if 64 * k + 64 > limit and words[k] >> np.uint64(max(0, limit - 64 * k)):
            return False
    return held == 0


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _ascend(places, limit):  # type: ignore[no-untyped-def]
    """Whether these are places within the tensor, each beyond the one before."""
    last = np.int64(-1)
    for k in range(places.size):
        place = np.int64(places[k])
        if place <= last:
            return False
        last = place
    return last < min(limit, BLOCK)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _mark(places, words):  # type: ignore[no-untyped-def]
    """Sets the bits of these places."""
    words[:] = 0
    for k in range(places.size):
        words[places[k] >> 6] |= np.uint64(1) << np.uint64(places[k] & 63)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _of_files(descriptors, offsets, bits, starts, first, limit, alpha, where, values, even, out):  # type: ignore[no-untyped-def]
    nonfinite, done = np.int64(0), np.int64(0)  # values of blocks before
    spread, marked = np.empty(BLOCK, np.float32), np.empty(_WORDS, np.uint64)
    block, summed = np.zeros(BLOCK, np.uint16), np.empty(BLOCK, np.uint16)
    places, positive = where.view(np.uint16), _as_bits(alpha * np.float32(0)) == 0  # −0 + 0 is 0, −0 + −0 is −0
    for start in range(0, starts.size - 1, _AT_ONCE):
        several = min(_AT_ONCE, starts.size - 1 - start)
        held, begin = starts[start + several] - starts[start], start * BLOCK
        size = 2 * held
        if bits:
            size = (min(several * BLOCK, limit - begin) + 7) >> 3
            where[size >> 3 : several * _WORDS] = 0  # the tensor may end in the middle of a word
        at = start * BLOCK // 8 if bits else 2 * done
        own = out[max(0, begin - first) : min(out.size, begin + several * BLOCK - first)]
        place = offsets[0] + 2 * max(0, begin - first)
        if (
            _pread(descriptors[0], own.ctypes, 2 * own.size, place) != 2 * own.size
            or _pread(descriptors[1], where.ctypes, size, offsets[1] + at) != size
            or _pread(descriptors[2], values.ctypes, 4 * held, offsets[2] + 4 * done) != 4 * held
        ):
            return np.int64(-1)
        taken = np.int64(0)
        for k in range(several):
            count, at = starts[start + k + 1] - starts[start + k], begin + k * BLOCK
            words, listed = where[k * _WORDS : (k + 1) * _WORDS], places[taken : taken + count]
            if not (_fits(words, count, limit - at) if bits else _ascend(listed, limit - at)):
                return np.int64(-1)
            part, skipped = values[taken : taken + count], max(0, first - at)
            own = out[at + skipped - first : min(out.size, at + BLOCK - first)]
            whole, kept = own.size == BLOCK, block[skipped : skipped + own.size]
            odd, few = False, count <= _FEW
            if few:
                odd, negative = _look_at(own)
                few = not (negative and positive)
            if not (few and whole):
                for i in range(own.size):
                    kept[i] = own[i]
            if few:
                target = own if whole else block
                odd |= _add_few(target, bits, words, listed, part, alpha)
            else:
                if not bits:
                    words = marked
                    _mark(listed, words)
                target = own if whole and even else summed
                odd = _add_many(block.view(np.uint32), words, part, alpha, spread, target.view(np.uint32))
                if odd:
                    for i in range(BLOCK):
                        spread[i] = _as_float(np.uint32(block[i]) << _HALF) + alpha * spread[i]
                    _round(spread, target)
                kept = summed[skipped : skipped + own.size]
            if not (whole and (few or even)):
                for i in range(own.size):
                    own[i] = kept[i]
            if odd:
                for i in range(own.size):
                    nonfinite += (own[i] & _EXPONENT) == _EXPONENT
            taken += count
        done += held
    return nonfinite
