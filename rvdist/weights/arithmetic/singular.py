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
from collections.abc import Iterator, Sequence

import torch

from rvdist.weights.arithmetic.aside import Aside, room
from rvdist.weights.arithmetic.matrices import (
    Change,
    Chunks,
    Matrices,
    Matrix,
    held,
    inverse_root,
    mirror,
    no_number,
    nothing,
    of_rows,
    product,
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
        left = Aside(kept * len(alone), side)  # Uᵀ
        values, parts = [], []
        for matrix, most in zip(alone, largest, strict=True):
            sizes, vectors = spectrum(side, (block for _, (block,) in matrix.blocks()), most)
            first, begin = max(0, len(sizes) - kept), left.rows  # the smallest come first
            left.append(vectors[:, first:].T)
            del vectors
            values.append(sizes[first:])
            parts.append(slice(begin, left.rows))
        rank = left.rows
        if not rank:
            return nothing
        weights = torch.cat([alpha * own for alpha, own in zip(alphas, values, strict=True)])
        inverse = torch.cat(values).reciprocal_()

        def right(directions: torch.Tensor, differences: Sequence[torch.Tensor]) -> torch.Tensor:
            """Vᵀ in these columns, of Uᵀ."""
            found = torch.empty(rank, differences[0].shape[1], dtype=torch.float64)
            for difference, own in zip(differences, parts, strict=True):
                torch.mm(directions[own], difference, out=found[own])
            return found.mul_(inverse[:, None])

        def all_right() -> Iterator[torch.Tensor]:
            directions = left.read()  # which is gone when they are
            for _, blocks in tasks.blocks(share=2):  # beside two squares
                yield right(directions, blocks)

        root = Aside(rank, rank)
        root.append(mirror(inverse_root(*of_rows(left))))
        found = spectrum(rank, all_right(), 1.0)
        core = root.read().mul_(weights)
        times_inverse_root(core, *found)
        del root, found
        way = product(left, core)
        del core

        def fill(rows: range, columns: range, out: torch.Tensor) -> None:
            if not tasks.turned:
                some = way.read()[rows.start : rows.stop].clone()
                directions = left.read()
                factors = [(some[:, own] * inverse[own]) @ directions[own] for own in parts]
                del some, directions
                tasks.multiply(factors, columns, out)
                return
            directions, cuts = left.read(), []
            for own, blocks in tasks.blocks(columns):
                out[:rank, own] = right(directions, blocks)
                cuts.append(own)
            del directions
            back = way.read()
            for own in cuts:
                out[:, own] = back @ out[:rank, own].contiguous()

        return fill

    @staticmethod
    def bytes_held(shape: Sequence[int], rank: int, itemsize: int) -> int:
        return held(shape, itemsize)

    @staticmethod
    def bytes_aside(shape: Sequence[int], count: int) -> int:
        side = min(shape[-2:])
        return room(side // count * count, side)
