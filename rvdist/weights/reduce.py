"""A matrix with less: as two factors of its truncated SVD. Tensors in, tensors out."""

from __future__ import annotations

import os

import torch

from rvdist.weights.arithmetic.method import torch_threads

_SMALL_SVD = 1024  # up to this many rows or columns every singular value is computed, beyond it only the largest
_OVERSAMPLED, _POWER_ITERATIONS = 16, 4


def factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left [rows, rank] and right [rank, columns] of the truncated SVD; the singular values are shared between them."""
    left, values, right = _svd(matrix, rank)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def rank_within(matrix: torch.Tensor, error: float) -> int:
    """The least rank at which ‖matrix − left · right‖ is at most `error` · ‖matrix‖; 0 of zeros."""
    norm, rank = float(matrix.double().square().sum()), 2 * _OVERSAMPLED
    while norm:
        squares = _svd(matrix, rank)[1].double().square()
        left = norm - squares.cumsum(0)
        if len(squares) == min(matrix.shape):  # all: what is left is their own sum, without cancellation
            left = squares.flip(0).cumsum(0).flip(0) - squares
        within = (left <= error**2 * norm).nonzero()
        if len(within):
            return int(within[0]) + 1
        if len(squares) == min(matrix.shape):
            return len(squares)
        rank *= 2
    return 0


def _svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All singular values and vectors of a small matrix, and some more than `rank` of a large one's."""
    with torch_threads(len(os.sched_getaffinity(0))):
        if min(matrix.shape) <= max(_SMALL_SVD, rank + _OVERSAMPLED):
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            return left, values, right
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, transposed = torch.svd_lowrank(matrix, rank + _OVERSAMPLED, niter=_POWER_ITERATIONS)
            return left, values, transposed.T
