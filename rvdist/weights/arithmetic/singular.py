"""TSV-M: of every task its largest singular vectors, all of them made orthogonal to each other.

Source: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, arXiv 2412.00081, algorithm
1; its code (github.com/AntoAndGar/task_singular_vectors, src/utils/TSVM_utils.py). For one matrix and K vectors, of
each

    d_k = U_k·diag(σ_k)·V_kᵀ        the first ⌊min(rows, columns) / K⌋ of its singular values and vectors

stand side by side as U, σ and V, where σ_k is multiplied by α_k. U⊥ and V⊥ are the matrices with orthonormal columns
nearest to U and V, U·(Uᵀ·U)^(−1/2). Then

    r = t + U⊥·diag(σ)·V⊥ᵀ

and of a tensor of one dimension r = t + Σ α_k·d_k / K. With every α equal to λ this is the paper's θ_0 + λ·Δ.
Directions that are none, in d_k or among those of U and V, are left out; the paper's code takes arbitrary ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rvdist.weights.arithmetic.matrices import (
    Chunks,
    Factors,
    Matrices,
    by_matrices,
    elements,
    factors,
    fill,
    gather,
    spectrum,
)
from rvdist.weights.arithmetic.method import Place


class TsvM(Matrices):
    """For any number of vectors."""

    def change(self, place: Place, chunks: Chunks) -> torch.Tensor:
        count = len(place.alphas)
        whole = torch.empty(0)
        found: list[list[Factors | None]] = []  # of every vector, of every matrix of the stack
        for number in range(count):
            del whole  # before there is another
            whole = gather(place, chunks, lambda differences, number=number: differences[number])  # type: ignore[misc]
            found.append([factors(matrix, self.kept(matrix.shape[0], count)) for matrix in by_matrices(place, whole)])
        for matrix, tasks in zip(by_matrices(place, whole), zip(*found, strict=True), strict=True):
            known = [task for task in tasks if task is not None]
            if len(known) < count:
                matrix.fill_(torch.nan)  # what is not finite has no singular values, and is told of as any such result
                continue
            self.merge(matrix, known, place.alphas)
        return whole

    def kept(self, side: int, count: int) -> int:
        """How many singular vectors of each task are found."""
        return side // count

    def merge(self, out: torch.Tensor, tasks: Sequence[Factors], alphas: Sequence[float]) -> None:
        """Fills `out` with what the tasks come to."""
        values = torch.cat([alpha * task.values for alpha, task in zip(alphas, tasks, strict=True)])
        left, right = (
            orthogonal(torch.cat(sides, 1)) for sides in zip(*[(t.left, t.right) for t in tasks], strict=True)
        )
        fill(out, left * values, right)

    @staticmethod
    def bytes_held(shape: Sequence[int], vectors: int, itemsize: int) -> int:
        numel, one, side = elements(shape)
        return numel * (itemsize + 8) + (numel // one + 6) * side * side * 8 + 2 * one * 8


def orthogonal(columns: torch.Tensor) -> torch.Tensor:
    """The matrix with orthonormal columns nearest to this one (k, r), in the directions that it has."""
    if not columns.shape[1]:
        return columns
    sizes, directions = spectrum(columns.T)
    return columns @ ((directions / sizes) @ directions.T)
