"""Core Space: adapters of low rank, merged in the small space that all of them span.

Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786; its code
(github.com/apanariello4/core-space-merging, task_merger.py). For one matrix and K vectors d_k = B_k·A_k, with
orthonormal bases U of the columns of all B_k and V of the rows of all A_k,

    M_k = Uᵀ·d_k·V        r = t + U·merge(M_1, …, M_K)·Vᵀ

where c is the smaller side of the M_k, and `merge` is TSV-M, of each M_k the first ⌊c / K⌋ singular vectors, or Iso-C,
the sum with its singular values replaced by their sum over c. U and V are found from the products d_k, whose
directions they are. Tensors of one dimension, α and directions that are none are as in the method merged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rvdist.weights.arithmetic.matrices import (
    LEAST,
    Change,
    Factors,
    Matrix,
    factors,
    held,
    inverse_root,
    nothing,
    of_columns,
)
from rvdist.weights.arithmetic.singular import TsvM


class CoreTsvM(TsvM):
    """For any number of vectors of low rank."""

    def merge(
        self, tasks: Matrix, alone: Sequence[Matrix], largest: Sequence[float], alphas: Sequence[float]
    ) -> Change:
        found = [factors(matrix, most) for matrix, most in zip(alone, largest, strict=True)]
        left, right = _basis([task.left for task in found]), _basis([task.right for task in found])
        return self.merge_core(found, alphas, left, right)

    def merge_core(
        self, tasks: Sequence[Factors], alphas: Sequence[float], left: torch.Tensor, right: torch.Tensor
    ) -> Change:
        """What the tasks come to in the space of these bases, (k, c) and (l, d). Singular vectors in
        that space are those outside, seen in the bases."""
        kept = min(left.shape[1], right.shape[1]) // len(tasks)
        cut = [replace(t, left=t.left[:, :kept], values=t.values[:kept], right=t.right[:, :kept]) for t in tasks]
        values = torch.cat([alpha * task.values for alpha, task in zip(alphas, cut, strict=True)])
        left, right = (_orthogonal(torch.cat(sides, 1)) for sides in ([t.left for t in cut], [t.right for t in cut]))
        return _product(left * values, right)

    @staticmethod
    def bytes_held(shape: Sequence[int], rank: int, itemsize: int) -> int:
        factors_and_bases = rank * (7 * min(shape[-2:]) + 4 * max(shape[-2:])) * 8
        return held(shape, itemsize, 2) + factors_and_bases


class CoreIsoC(CoreTsvM):
    """For any number of vectors of low rank."""

    def merge_core(
        self, tasks: Sequence[Factors], alphas: Sequence[float], left: torch.Tensor, right: torch.Tensor
    ) -> Change:
        core = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
        for alpha, task in zip(alphas, tasks, strict=True):
            core += (left.T @ task.left * (alpha * task.values)) @ (task.right.T @ right)
        if not core.numel():
            return nothing
        own, values, turned = torch.linalg.svd(core, full_matrices=False)
        rank = int((values > LEAST * values[0]).sum())
        mean = values[:rank].sum() / len(values)
        return _product(mean * (left @ own[:, :rank]), right @ turned[:rank].T)


def _product(left: torch.Tensor, right: torch.Tensor) -> Change:
    """left · rightᵀ."""

    def fill(rows: range, columns: range, out: torch.Tensor) -> None:
        torch.mm(left[rows.start : rows.stop], right[columns.start : columns.stop].T, out=out)

    return fill


def _basis(sides: Sequence[torch.Tensor]) -> torch.Tensor:
    """An orthonormal basis of all these columns, as columns."""
    columns = torch.cat(list(sides), 1)
    if not columns.shape[1]:
        return columns
    sizes, directions = of_columns(columns)
    return columns @ (directions / sizes)


def _orthogonal(columns: torch.Tensor) -> torch.Tensor:
    """The matrix with orthonormal columns nearest to this one (k, r), in the directions that it has."""
    return columns @ inverse_root(*of_columns(columns)) if columns.shape[1] else columns
