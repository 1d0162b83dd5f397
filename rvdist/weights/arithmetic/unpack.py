"""The loops that make a packed tensor whole again (`rvdist.weights.packed.spread`), compiled."""

from __future__ import annotations

import numba
import numpy as np

_BLOCK = 4096
_BIT = np.arange(256)[:, None] >> np.arange(8) & 1
_COUNT = _BIT.sum(1)
_BEFORE = (_BIT.cumsum(1) - _BIT).astype(np.uint8)  # how many bits of a byte are set below each
_MASK = -_BIT.astype(np.int64)  # all ones where it is set


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def bits(where, counts, values, first, limit, out):  # type: ignore[no-untyped-def]
    """Where a bit of `where` says that there is a value; `out` is 0 elsewhere already."""
    done = 0
    for block in range(len(counts)):
        begin = block * _BLOCK // 8
        end = min(begin + _BLOCK // 8, len(where))
        held = 0
        for k in range(begin, end):
            held += _COUNT[where[k]]
        if held != counts[block]:
            return False
        for k in range(begin, end):
            byte = where[k]
            if byte == 0:
                continue
            at = 8 * k - first
            if at >= 0 and at + 8 <= len(out) and 8 * k + 8 <= limit and done + 8 <= len(values):
                for i in range(8):
                    out[at + i] = values[done + _BEFORE[byte, i]] & out.dtype.type(_MASK[byte, i])
                done += _COUNT[byte]
                continue
            for i in range(8):
                if (byte >> i) & 1:
                    if 8 * k + i >= limit:
                        return False
                    if 0 <= at + i < len(out):
                        out[at + i] = values[done]
                    done += 1
    return True


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def places(where, counts, values, first, limit, out):  # type: ignore[no-untyped-def]
    """Where `where` says that a block has values."""
    done = 0
    for block in range(len(counts)):
        last = np.int64(-1)
        for k in range(done, done + counts[block]):
            place = np.int64(where[k])
            if place <= last or place >= _BLOCK or block * _BLOCK + place >= limit:
                return False
            last = place
            at = block * _BLOCK + place - first
            if 0 <= at < len(out):
                out[at] = values[k]
        done += counts[block]
    return True
