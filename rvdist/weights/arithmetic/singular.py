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
    Change,
    Chunks,
    Matrices,
    Matrix,
    held,
    inverse_root,
    no_number,
    nothing,
    of_columns,
    spectrum,
    times_inverse_root,
)
from rvdist.weights.arithmetic.method import Place


class TsvM(Matrices):
    """For any number of vectors."""

    def change(self, place: Place, chunks: Chunks, number: int) -> Change:
        tasks = Matrix(place, chunks, number, lambda differences: differences)
        largest = tasks.largest()
        if not all(map(math.isfinite, largest)):
            return no_number
        alone = [Matrix(place, chunks, number, lambda d, k=k: [d[k]]) for k in range(len(largest))]  # type: ignore[misc]
        return self.merge(tasks, alone, largest, place.alphas)

    def merge(
        self, tasks: Matrix, alone: Sequence[Matrix], largest: Sequence[float], alphas: Sequence[float]
    ) -> Change:
        """What the tasks' matrices come to: all of them together, each `alone`, and the largest magnitude of each."""
        side, _ = tasks.shape
        kept = side // len(alone)
        left = torch.empty(kept * len(alone), side, dtype=torch.float64).T  # takes memory as it is filled
        values, parts, rank = [], [], 0
        for matrix, most in zip(alone, largest, strict=True):
            sizes, vectors = spectrum(side, (block for _, (block,) in matrix.blocks()), most)
            first = max(0, len(sizes) - kept)  # the smallest come first
            values.append(sizes[first:])
            parts.append(slice(rank, rank + len(values[-1])))
            rank = parts[-1].stop
            left[:, parts[-1]] = vectors[:, first:]
            del vectors
        if not rank:
            return nothing
        left = left[:, :rank]
        weights = torch.cat([alpha * own for alpha, own in zip(alphas, values, strict=True)])
        inverse = torch.cat(values).reciprocal_()

        def right(differences: Sequence[torch.Tensor]) -> torch.Tensor:
            """Vᵀ in these columns."""
            found = torch.empty(rank, differences[0].shape[1], dtype=torch.float64)
            for difference, own in zip(differences, parts, strict=True):
                torch.mm(left[:, own].T, difference, out=found[own])
            return found.mul_(inverse[:, None])

        core = inverse_root(*of_columns(left))
        found = spectrum(rank, (right(blocks) for _, blocks in tasks.blocks()), 1.0, beside=core)
        times_inverse_root(core.mul_(weights), *found)
        del found
        way = left @ core
        del core

        def fill(rows: range, columns: range, out: torch.Tensor) -> None:
            if tasks.turned:
                for own, blocks in tasks.blocks(columns):
                    out[:, own] = way @ right(blocks)
                return
            some = way[rows.start : rows.stop]
            tasks.multiply([(some[:, own] * inverse[own]) @ left[:, own].T for own in parts], columns, out)

        return fill

    @staticmethod
    def bytes_held(shape: Sequence[int], rank: int, itemsize: int) -> int:
        return held(shape, itemsize, 3)
