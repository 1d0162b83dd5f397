"""Where results come from that are infinite or not a number, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from rvdist.weights.stored import Operand

_AT_ONCE = 256 * 1024  # elements


def tell_nonfinite(operand: Operand, name: str, part: str, stop: int) -> str:
    """How many of the first `stop` elements of a tensor are infinite or not a number, in words that name its file and
    what `part` it plays; "" where all are finite."""
    spec, checkpoint = operand.checkpoint.tensors[name], operand.checkpoint
    buffer = torch.empty(_AT_ONCE * 8, dtype=torch.uint8)
    count, first = 0, -1
    for begin in range(0, min(spec.numel, stop), _AT_ONCE):
        end = min(begin + _AT_ONCE, spec.numel, stop)
        odd = operand.read(name, begin, end, buffer).double().isfinite().logical_not()
        if first < 0 and odd.any():
            first = begin + int(odd.nonzero()[0])
        count += int(odd.sum())
    if not count:
        return ""
    place = [int(at) for at in np.unravel_index(first, spec.shape)]
    where = f"{checkpoint.hub}/{spec.file}" if checkpoint.hub else checkpoint.path / spec.file
    values = "1 value that is" if count == 1 else f"{count:,} values that are"
    return f"{where} ({part}) has {values} not finite there{f', the first at {place}' if place else ''}"


def blame(name: str, parts: Mapping[str, list[str]], operands: Mapping[str, Operand], rows: int, dtype: str) -> str:
    """Why tensor `name`, of so many elements and of `dtype`, would hold such results, and what to do. `parts` says what
    each source is there, as one of `operands`."""
    suspects = [tell_nonfinite(operands[source], name, " and ".join(own), rows) for source, own in parts.items()]
    if any(suspects):
        stays = any("the target" in own and odd for own, odd in zip(parts.values(), suspects, strict=True))
        mask = "" if stays else " keep the vector from this tensor (vector.mask.exclude),"
        return (
            f"tensor {name} would be infinite or not a number: {' and '.join(filter(None, suspects))}; get a sound "
            f"copy,{mask} or set allow_nonfinite=true"
        )
    return (
        f"tensor {name} would be infinite or not a number: all it is made of is finite, and the result overflows "
        f"{dtype}; choose a smaller alpha, another dtype, or set allow_nonfinite=true"
    )
