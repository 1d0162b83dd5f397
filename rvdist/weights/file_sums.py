"""Sums of bf16 tensors that lie in files, read as they are summed: with donors that lie there, or one packed vector.

Knows where tensors are; `rvdist.weights.arithmetic` has the loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from rvdist.core.point import Vector
from rvdist.weights.arithmetic.blocks import PackedFiles
from rvdist.weights.arithmetic.method import Method, Scratch, combine_files, combine_packed, compiled
from rvdist.weights.stored import Operand


class Summed(NamedTuple):
    """How many results are not finite, and the bytes that were read."""

    nonfinite: int
    nbytes: int


Sum = Callable[[int, torch.Tensor, Scratch], Summed | None]
Terms = Sequence[tuple[float, Vector]]


def find_sum(
    method: Method, operands: Mapping[str, Operand], base: str, terms: Terms, name: str, start: int, stop: int
) -> Sum | None:
    """What does as `combine` does, in fp32, of elements [start, stop) of a tensor: fills a tensor of bf16, 1-d and on
    the CPU, from one of these elements on. `operands` by their sources' names. None where that cannot be, and from the
    sum where it cannot be done: then they are to be read and combined. Raises as `Operand.read`."""
    if not method.elementwise_sum or operands[base].dtype(name) != torch.bfloat16:
        return None
    if (own := operands[base].file(name, start, stop)) is None:
        return None
    if len(terms) == 1 and terms[0][1].minus is None:
        ((alpha, vector),) = terms
        packed = operands[vector.plus].packed(name, start, stop)
        return packed and partial(_sum_packed, method, start, own, packed, alpha)
    if not compiled():
        return None
    files, places = [own], dict[str | None, int]()
    for _, vector in terms:
        for source in (vector.plus, vector.minus):
            if source in places:
                continue
            if source is None or operands[source].dtype(name) != torch.bfloat16:
                return None
            if (file := operands[source].file(name, start, stop)) is None:
                return None
            places[source] = len(files)
            files.append(file)
    differences = [(alpha, places[vector.plus], places[vector.minus]) for alpha, vector in terms]
    return partial(_sum_donors, method, start, files, differences)


def _sum_packed(
    method: Method,
    start: int,
    own: tuple[int, int],
    packed: PackedFiles,
    alpha: float,
    begin: int,
    out: torch.Tensor,
    scratch: Scratch,
) -> Summed | None:
    part = packed.part(begin - start, out.numel())
    base = own[0], own[1] + 2 * (begin - start)
    count = combine_packed(method, base, part, alpha, out, scratch)
    return None if count is None else Summed(count, part.nbytes + out.nbytes)


def _sum_donors(
    method: Method,
    start: int,
    files: Sequence[tuple[int, int]],
    differences: Sequence[tuple[float, int, int]],
    begin: int,
    out: torch.Tensor,
    scratch: Scratch,
) -> Summed | None:
    there = [(descriptor, offset + 2 * (begin - start)) for descriptor, offset in files]
    count = combine_files(method, there, differences, out, scratch)
    return None if count is None else Summed(count, len(files) * out.nbytes)
