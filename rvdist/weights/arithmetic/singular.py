"""TSV-M: of every task its largest singular vectors, all of them made orthogonal to each other.

Source: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, arXiv 2412.00081, algorithm
1; its code (github.com/AntoAndGar/task_singular_vectors, src/utils/TSVM_utils.py). For one matrix and K vectors, of
each

    d_k = U_k·diag(σ_k)·V_kᵀ        the first ⌊min(rows, columns) / K⌋ of its singular values and vectors

stand side by side as U, σ and V, where σ_k is multiplied by α_k. U⊥ and V⊥ are the matrices with orthonormal columns
nearest to U and V, U·(Uᵀ·U)^(−1/2); of two tasks by blocks of half the size. Then

    r = t + U⊥·diag(σ)·V⊥ᵀ

where V_kᵀ = diag(σ_k)⁻¹·U_kᵀ·d_k is found anew for the columns that are computed, and never held. Of a tensor of one
dimension r = t + Σ α_k·d_k / K. With every α equal to λ this is the paper's θ_0 + λ·Δ. Directions that are none, in d_k
or among those of U and V, are left out; the paper's code takes arbitrary ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from rvdist.weights.arithmetic.matrices import (
    LEAST,
    Chunks,
    Matrices,
    Matrix,
    by_matrices,
    held,
    inverse_root,
    of_columns,
    spectrum,
)
from rvdist.weights.arithmetic.method import Place


class TsvM(Matrices):
    """For any number of vectors."""

    def change(self, place: Place, chunks: Chunks, whole: torch.Tensor) -> None:
        for number, out in enumerate(by_matrices(place, whole)):
            tasks = Matrix(place, chunks, number, lambda differences: differences)
            largest = tasks.largest()
            if all(map(math.isfinite, largest)):
                alone = [Matrix(place, chunks, number, lambda d, k=k: [d[k]]) for k in range(len(largest))]  # type: ignore[misc]
                self.merge(out, tasks, alone, largest, place.alphas)
            else:
                out.fill_(torch.nan)  # what is not finite has no singular values, and is told of as any such result

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

        weights = torch.cat([alpha * own for alpha, own in zip(alphas, sizes, strict=True)])
        of_all = (right(blocks) for _, blocks in tasks.blocks())
        if len(alone) == 2:
            way = left.clone()
            make_orthogonal(way, left[:, : ends[1]].T @ left[:, ends[1] :])
            orthogonal_beside(way.mul_(weights), of_all, ends[1])
        else:
            way = inverse_root(*spectrum(len(values), of_all, 1.0)).mul_(weights[:, None])
            way = left @ (inverse_root(*of_columns(left)) @ way)
        for columns, blocks in tasks.blocks():
            out[:, columns] = way @ right(blocks)

    @staticmethod
    def bytes_held(shape: Sequence[int], rank: int, itemsize: int) -> int:
        return held(shape, itemsize, 5, 2)


def make_orthogonal(columns: torch.Tensor, cross: torch.Tensor) -> None:
    """columns (k, r + s) · G^(−1/2), in place, where G = [[I, C], [Cᵀ, I]] and C = `cross` (r, s).

    With C·Cᵀ = P·diag(c²)·Pᵀ the eigenvalues of G are 1 ± c, those of both signs have (P, ±Cᵀ·P / c), and G^(−1/2) has
    the blocks P·f·Pᵀ, P·g·Pᵀ·C and I + Cᵀ·P·h·Pᵀ·C, where f = ((1 + c)^(−1/2) + (1 − c)^(−1/2)) / 2,
    g = ((1 + c)^(−1/2) − (1 − c)^(−1/2)) / 2c, h = (f − 1) / c². Nothing of G's size is held."""
    count = len(cross)
    squares, vectors = torch.empty(count, dtype=torch.float64), (cross @ cross.T).T
    torch.linalg.eigh(vectors, out=(squares, vectors))
    squares = squares.clamp_(1e-300, 1)
    size = squares.sqrt()
    more, less = 1 + size, 1 - size
    shared = less <= LEAST**2 * (more[-1] if count else 1)  # 1 − c is none
    less = torch.where(shared, 1.0, less)
    root, other = more.rsqrt(), less.rsqrt()
    f = torch.where(shared, root, root + other) / 2
    g = torch.where(
        shared, root / (2 * size), -root * other / (more.sqrt() + less.sqrt())
    )  # no difference of two alike
    h = (f - 1) / squares
    turned = vectors.T @ cross
    for rows in columns.split(256):  # type: ignore[no-untyped-call]
        own, others = rows[:, :count] @ vectors, rows[:, count:] @ turned.T
        rows[:, :count] = (own * f + others * g) @ vectors.T
        rows[:, count:] += (own * g + others * h) @ turned


def orthogonal_beside(columns: torch.Tensor, blocks: Iterable[torch.Tensor], count: int) -> None:
    """columns · (VᵀV)^(−1/2), in place: `blocks` are some columns of Vᵀ each, whose first `count` rows are orthonormal
    but for rounding, as are the others. That rounding, which is worst for directions of little size, is taken out by
    Cholesky factors of both blocks, and what is returned is for V as it is."""
    sides = count, columns.shape[1] - count
    first, second, cross = (
        torch.zeros(s, t, dtype=torch.float64)
        for s, t in zip((sides[0], sides[1], sides[0]), (sides[0], sides[1], sides[1]), strict=True)
    )
    for block in blocks:
        own, others = block.split(sides)  # type: ignore[no-untyped-call]
        first.addmm_(own, own.T)
        second.addmm_(others, others.T)
        cross.addmm_(own, others.T)
    for square in (first, second):
        torch.linalg.cholesky(square, out=square)
    torch.linalg.solve_triangular(first, cross, upper=False, out=cross)
    torch.linalg.solve_triangular(second.T, cross, upper=True, left=False, out=cross)
    make_orthogonal(columns, cross)
    for part, square in zip(columns.split(sides, 1), (first, second), strict=True):  # type: ignore[no-untyped-call]
        for rows in part.split(256):
            rows.copy_(torch.linalg.solve_triangular(square, rows, upper=False, left=False))
