"""The loops that make a packed tensor whole again (`rvdist.weights.packed.spread`), compiled."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from rvdist.weights.arithmetic.blocks import BLOCK

_WORDS = BLOCK // 64
_ONE = np.uint64(1)


@intrinsic  # type: ignore[untyped-decorator]
def _lowest(typing: Any, word: Any) -> Any:
    """The place of the lowest bit that is set; one is."""
    return types.uint64(types.uint64), lambda context, builder, signature, arguments: builder.cttz(
        arguments[0], context.get_constant(types.boolean, True)
    )


@intrinsic  # type: ignore[untyped-decorator]
def _count(typing: Any, word: Any) -> Any:
    """How many bits are set."""
    return types.int64(types.uint64), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def bits(words, counts, values, first, limit, out):  # type: ignore[no-untyped-def]
    """Where a bit of `words`, 64 each, says that there is a value; 0 elsewhere."""
    done = 0
    for block in range(len(counts)):
        out[max(0, block * BLOCK - first) : max(0, (block + 1) * BLOCK - first)] = 0  # while that is in the cache
        begin = block * _WORDS
        end = min(begin + _WORDS, len(words))
        held = 0
        for k in range(begin, end):
            held += _count(words[k])
        if held != counts[block] or done + held > len(values):
            return False
        for k in range(begin, end):
            left, at = words[k], 64 * k - first
            if 64 * k + 64 > limit and left >> np.uint64(max(0, limit - 64 * k)):
                return False
            if at >= 0 and at + 64 <= len(out):
                part = out[at : at + 64]
                while left:
                    part[_lowest(left)] = values[done]
                    done += 1
                    left &= left - _ONE
                continue
            while left:
                place = at + np.int64(_lowest(left))
                if 0 <= place < len(out):
                    out[place] = values[done]
                done += 1
                left &= left - _ONE
    return True


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def places(where, counts, values, first, limit, out):  # type: ignore[no-untyped-def]
    """Where `where` says that a block has values; 0 elsewhere."""
    done = 0
    for block in range(len(counts)):
        out[max(0, block * BLOCK - first) : max(0, (block + 1) * BLOCK - first)] = 0
        last = np.int64(-1)
        for k in range(done, done + counts[block]):
            place = np.int64(where[k])
            if place <= last or place >= BLOCK or block * BLOCK + place >= limit:
                return False
            last = place
            at = block * BLOCK + place - first
            if 0 <= at < len(out):
                out[at] = values[k]
        done += counts[block]
    return True
