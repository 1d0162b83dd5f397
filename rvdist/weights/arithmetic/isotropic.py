"""Iso-C: the sum of the task matrices with all singular values alike, so that no direction drowns the others.

Source: Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, arXiv
2502.04959, algorithm 1; its code (github.com/danielm1405/iso-merging, src/utils/iso.py). For one matrix and the K
vectors d_k, with the singular value decomposition

    Σ α_k·d_k = U·diag(σ)·Vᵀ        r = t + σ̄·U·Vᵀ, σ̄ = Σ σ_i / min(rows, columns)

and of a tensor of one dimension r = t + Σ α_k·d_k / K. With every α equal to λ this is the paper's θ_0 + λ·Δ. U·Vᵀ is
the factor (M·Mᵀ)^(−1/2)·M of the sum M. Where M lacks rank, U and V are arbitrary in the directions that are none, and
the paper's code adds some there; we add nothing.
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
    spectrum,
)
from rvdist.weights.arithmetic.method import Place


class IsoC(Matrices):
    """For any number of vectors."""

    def change(self, place: Place, chunks: Chunks, number: int) -> Change:
        def weighted_sum(differences: list[torch.Tensor]) -> list[torch.Tensor]:
            total = torch.zeros_like(differences[0])
            for alpha, difference in zip(place.alphas, differences, strict=True):
                total.add_(difference.mul_(alpha))
            return [total]

        matrix = Matrix(place, chunks, number, weighted_sum)
        (largest,) = matrix.largest()
        if not math.isfinite(largest):
            return no_number
        side, _ = matrix.shape
        values, left = spectrum(side, (block for _, (block,) in matrix.blocks()), largest)
        scaled = inverse_root(values, left, float(values.sum()) / side)
        return lambda rows, columns, out: matrix.multiply([scaled[rows.start : rows.stop]], columns, out)

    @staticmethod
    def bytes_held(shape: Sequence[int], rank: int, itemsize: int) -> int:
        return held(shape, itemsize)
