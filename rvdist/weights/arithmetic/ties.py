"""TIES: trim every vector, elect a sign for every element, average the vectors that agree with it.

Source: TIES-Merging, arXiv 2306.01708, Algorithm 1, within each tensor instead of over the whole model. With d_k the
differences of one tensor of n elements, in working precision and with one rounding an operation:

    trim    d_k = 0 unless |d_k| is at least the kept-th largest |d_k|, kept = max(1, round(density · n))
    scale   s_k = α_k · d_k
    elect   e = sign(Σ s_k)
    merge   r = t + (Σ s_k over those k with sign(s_k) = e) / (how many these are)

So α weighs a vector in the election and in the mean, but not in the trimming. With every α equal to λ this is the
paper's t + λ·τ_m. Where the election is a draw (e = 0) the element stays the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from rvdist.weights.arithmetic.method import Place

# The bits of |d| order as |d| does. They are found from the top, so many at a time that a histogram stays small:
# the integer dtype, the mask that takes the sign away, and where each group of bits begins.
_BITS = {
    torch.float32: (torch.int32, 0x7FFF_FFFF, (31, 15, 0)),
    torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF, (63, 47, 31, 15, 0)),
}


class Ties:
    """`density` is the share of each vector's elements that trimming leaves, (0, 1]."""

    elementwise_sum = False
    surveys_base = False

    def __init__(self, density: float) -> None:
        self._density = density
        self._least: list[int] | None = None  # each vector's smallest magnitude to be kept, as bits; None: all stay

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        kept = max(1, round(self._density * place.numel))
        self._least = kth_largest(chunks, kept) if kept < place.numel else None

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        elected = torch.zeros_like(total)
        for alpha, difference, bits in zip(alphas, differences, self._least or [0] * len(alphas), strict=True):
            if bits:
                difference.mul_(magnitudes(difference).ge_(bits))
            elected.add_(difference.mul_(alpha))
        sign, change, agreeing = elected.sign_(), torch.zeros_like(total), torch.zeros_like(total)
        for scaled in differences:
            agrees = scaled.sign().eq_(sign)  # 0 and 1 as numbers: torch is slow to widen truth values
            change.add_(scaled.mul_(agrees))  # 0 times what is not finite is NaN: a vote cannot hide it
            agreeing.add_(agrees)
        total.add_(change.div_(agreeing.clamp_(min=1)))


def magnitudes(difference: torch.Tensor) -> torch.Tensor:
    """|d| as integers of the same order. NaNs are the largest."""
    integer, mask, _ = _BITS[difference.dtype]
    return difference.view(integer) & mask


def of_bits(bits: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The magnitudes that these integers are."""
    return torch.tensor(bits, dtype=_BITS[dtype][0]).view(dtype)


def kth_largest(chunks: Callable[[], Iterator[list[torch.Tensor]]], kth: int | Sequence[int]) -> list[int]:
    """The `kth` largest magnitude of each vector, or of each its own, exactly, as integers."""
    return [bits for bits, _ in kth_and_rank(chunks, kth)]


def kth_and_rank(chunks: Callable[[], Iterator[list[torch.Tensor]]], kth: int | Sequence[int]) -> list[tuple[int, int]]:
    """The same, and which it is of those that are equal, from 1. In the memory of one histogram a vector: each pass
    over the differences counts the next bits of those that share the bits known so far."""
    first = next(chunks())
    known, rank = [0] * len(first), [kth] * len(first) if isinstance(kth, int) else list(kth)
    *_, starts = _BITS[first[0].dtype]
    for above, start in pairwise(starts):
        size = 1 << (above - start)
        counts = torch.zeros(len(known), size, dtype=torch.int64, device=first[0].device)
        for differences in chunks():
            for k, difference in enumerate(differences):
                found = magnitudes(difference)
                if above < starts[0]:
                    found = found[found >> above == known[k]]
                counts[k] += torch.bincount(found >> start & size - 1, minlength=size)
        for k, count in enumerate(counts):
            at_least = count.flip(0).cumsum(0).flip(0)  # how many have these bits or larger ones
            bits = int((at_least >= rank[k]).sum()) - 1
            rank[k] -= int(at_least[bits] - count[bits])
            known[k] = known[k] << (above - start) | bits
    return list(zip(known, rank, strict=True))
