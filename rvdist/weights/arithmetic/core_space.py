"""Core Space: adapters of low rank, merged in the small space that all of them span.

Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786; its code
(github.com/apanariello4/core-space-merging, task_merger.py). For one matrix and K vectors d_k = B_k·A_k, with
orthonormal bases U of the columns of all B_k and V of the rows of all A_k,

    M_k = Uᵀ·d_k·V        r = t + U·merge(M_1, …, M_K)·Vᵀ

where c is the smaller side of the M_k, and `merge` is TSV-M, of each M_k the first ⌊c / K⌋ singular vectors, or Iso-C,
the sum with its singular values replaced by their sum over c. U and V are found by QR of the factors, so that nothing
as large as a square of the matrix is held; directions that are none, which QR does not leave out, do not count for c.
Tensors of one dimension, α and what else is none are as in the method merged by.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rvdist.weights.arithmetic.matrices import LEAST, Change, Chunks, Matrices, no_number, nothing, panel_held
from rvdist.weights.arithmetic.method import Place

_TILE = 512  # rows of a basis that are turned at a time


@dataclass(frozen=True)
class Decomposed:
    """left·diag(values)·rightᵀ in fp64, of orthonormal columns, largest value first: (c, r), (r,), (d, r)."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


class CoreSpace(Matrices):
    """For any number of vectors of low rank, whose factors it sees."""

    def change(self, place: Place, chunks: Chunks, number: int) -> Change:
        pairs = list(chunks(number))
        if not all(bool(side.isfinite().all()) for pair in pairs for side in pair):
            return no_number
        ranks = [left.shape[1] for left, _ in pairs]
        sides = [torch.cat([left for left, _ in pairs], 1), torch.cat([right.T for _, right in pairs], 1)]
        del pairs
        if place.shape[-2] > place.shape[-1]:
            sides.reverse()
        (left, own), (right, other) = (torch.linalg.qr(sides.pop(0)) for _ in range(2))
        tasks = [_decompose(*pair) for pair in zip(own.split(ranks, 1), other.split(ranks, 1), strict=True)]
        merged = self.merge(tasks, place.alphas, min(_rank(t.left for t in tasks), _rank(t.right for t in tasks)))
        if not len(merged.values):
            return nothing
        left, right = _turn(left, merged.left * merged.values), _turn(right, merged.right)

        def fill(rows: range, columns: range, out: torch.Tensor) -> None:
            torch.mm(left[rows.start : rows.stop], right[columns.start : columns.stop].T, out=out)

        return fill

    @abstractmethod
    def merge(self, tasks: Sequence[Decomposed], alphas: Sequence[float], side: int) -> Decomposed:
        """What the tasks come to in a space of which they span so much; its columns need not be orthonormal."""

    @staticmethod
    def bytes_held(shape: Sequence[int], rank: int, itemsize: int) -> int:
        return panel_held(shape, itemsize) + rank * (3 * (shape[-2] + shape[-1]) + 8 * min(rank, *shape[-2:])) * 8


class CoreTsvM(CoreSpace):
    """By TSV-M."""

    def merge(self, tasks: Sequence[Decomposed], alphas: Sequence[float], side: int) -> Decomposed:
        kept = side // len(tasks)
        values = torch.cat([alpha * task.values[:kept] for alpha, task in zip(alphas, tasks, strict=True)])
        left, right = ([one[:, :kept] for one in own] for own in ([t.left for t in tasks], [t.right for t in tasks]))
        return Decomposed(_orthogonal(left), values, _orthogonal(right))


class CoreIsoC(CoreSpace):
    """By Iso-C."""

    def merge(self, tasks: Sequence[Decomposed], alphas: Sequence[float], side: int) -> Decomposed:
        weighted = [alpha * task.left * task.values for alpha, task in zip(alphas, tasks, strict=True)]
        total = _decompose(torch.cat(weighted, 1), torch.cat([task.right for task in tasks], 1))
        mean = total.values.sum() / max(1, side)
        return Decomposed(total.left, mean.expand(len(total.values)), total.right)


def _decompose(left: torch.Tensor, right: torch.Tensor) -> Decomposed:
    """The singular values and vectors of left · rightᵀ that are not none."""
    (left, own), (right, other) = torch.linalg.qr(left), torch.linalg.qr(right)
    found, values, turned = _svd(own @ other.T)
    return Decomposed(left @ found, values, right @ turned.T)


def _svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those that are not none."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((values > LEAST * values[:1]).sum())
    return left[:, :rank], values[:rank], right[:rank]


def _rank(sides: Iterable[torch.Tensor]) -> int:
    """How many directions all of these columns have."""
    return len(_svd(torch.cat(list(sides), 1))[1])


def _orthogonal(sides: Sequence[torch.Tensor]) -> torch.Tensor:
    """The matrix with orthonormal columns nearest to all of these, side by side, in the directions that they have."""
    left, _, right = _svd(torch.cat(list(sides), 1))
    return left @ right


def _turn(basis: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """basis · columns, which are no more than it has, in its memory."""
    count = columns.shape[1]
    for start in range(0, len(basis), _TILE):
        own = basis[start : start + _TILE]
        own[:, :count] = own @ columns
    return basis[:, :count]
