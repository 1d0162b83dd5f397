"""TSV-M: of every task its largest singular vectors, all of them made orthogonal to each other.

Source: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, arXiv 2412.00081, algorithm
1; its code (github.com/AntoAndGar/task_singular_vectors, src/utils/TSVM_utils.py). For one matrix and K vectors, of
each

    d_k = U_k·diag(σ_k)·V_kᵀ        the first ⌊min(rows, columns) / K⌋ of its singular values and vectors

stand side by side as U, σ and V, where σ_k is multiplied by α_k. U⊥ and V⊥ are the matrices with orthonormal columns
nearest to U and V, U·(Uᵀ·U)^(−1/2). Then

    r = t + U⊥·diag(σ)·V⊥ᵀ

where V_kᵀ = diag(σ_k)⁻¹·U_kᵀ·d_k is found anew for the columns that are computed, and never held. Of a tensor of one
dimension r = t + Σ α_k·d_k / K. With every α equal to λ this is the paper's θ_0 + λ·Δ. Directions that are none, in d_k
or among those of U and V, are left out; the paper's code takes arbitrary ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rvdist.weights.arithmetic.matrices import (
    Chunks,
    Matrices,
    Matrix,
    held,
    inverse_root,
    of_columns,
    spectrum,
)
from rvdist.weights.arithmetic.method import Place


class TsvM(Matrices):
    """For any number of vectors."""

    def change(self, place: Place, chunks: Chunks, number: int, out: torch.Tensor) -> None:
        tasks = Matrix(place, chunks, number, lambda differences: differences)
        largest = tasks.largest()
        if not all(map(math.isfinite, largest)):
            out.fill_(torch.nan)  # what is not finite has no singular values, and is told of as any such result
            return
        alone = [Matrix(place, chunks, number, lambda d, k=k: [d[k]]) for k in range(len(largest))]  # type: ignore[misc]
        self.merge(out, tasks, alone, largest, place.alphas)

    def merge(
        self,
        out: torch.Tensor,
        tasks: Matrix,
        alone: Sequence[Matrix],
        largest: Sequence[float],
        alphas: Sequence[float],
    ) -> None:
        """Fills `out` with what the tasks' matrices come to: all of them together, each `alone`, and the largest
        magnitude of each."""
        side, _ = tasks.shape
        lefts, sizes = [], []
        for matrix, most in zip(alone, largest, strict=True):
            values, vectors = spectrum(side, (block for _, (block,) in matrix.blocks()), most)
            first = max(0, len(values) - side // len(alone))  # the smallest come first
            lefts.append(vectors[:, first:].clone())
            sizes.append(values[first:])
            del vectors
        left, values = torch.cat(lefts, 1), torch.cat(sizes)
        del lefts
        if not len(values):
            out.zero_()
            return
        ends = [0, *torch.tensor([len(own) for own in sizes]).cumsum(0).tolist()]

        def right(differences: Sequence[torch.Tensor]) -> torch.Tensor:
            """Vᵀ in these columns."""
            found = torch.empty(len(values), differences[0].shape[1], dtype=torch.float64)
            for difference, begin, end in zip(differences, ends, ends[1:], strict=False):
                torch.mm(left[:, begin:end].T, difference, out=found[begin:end])
            return found.div_(values[:, None])

        way = inverse_root(*spectrum(len(values), (right(blocks) for _, blocks in tasks.blocks()), 1.0))
        way.mul_(torch.cat([alpha * own for alpha, own in zip(alphas, sizes, strict=True)])[:, None])
        way = left @ (inverse_root(*of_columns(left)) @ way)
        for columns, blocks in tasks.blocks():
            out[:, columns] = way @ right(blocks)

    @staticmethod
    def bytes_held(shape: Sequence[int], rank: int, itemsize: int) -> int:
        return held(shape, itemsize, 5, 2)
