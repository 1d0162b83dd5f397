"""The singular values of a matrix that is read by rows and never held.

Up to EXACT rows or columns (the smaller side s) they are the roots of the eigenvalues of the Gram matrix of that side,
summed in fp64: s² · 8 bytes, 128 MiB at most. Beyond it subspace iteration on AᵀA with a fixed seed finds the KEPT
largest (Halko, Martinsson, Tropp, arXiv 0909.4061, section 4.5; Rayleigh-Ritz values with their residuals). Besides
that: two panels of rows, 32 MiB each, or one row each where that is more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy.linalg import eigh, eigvalsh
from scipy.linalg.blas import dsyrk

from rvdist.weights.anatomy.findings import Spectrum
from rvdist.weights.anatomy.sums import Floats

EXACT = 4096  # rows or columns
KEPT, OVERSAMPLED, ITERATIONS = 128, 16, 4
_PANEL = 4 << 20  # elements
_SHOWN = 128  # values: all up to so many

Read = Callable[[int, Floats], None]  # fills a matrix with the rows from this one on


def spectrum(read: Read, shape: tuple[int, int], square: float, exact: int = EXACT) -> Spectrum:
    """Of the matrix A of this shape with ‖A‖² = `square`, which is not 0. `read` is called for every row several
    times; every call fills as many rows as it is given. Effective rank: Roy and Vetterli, EUSIPCO 2007, section 2."""
    size = min(shape)
    if size <= exact:
        gram = _of_columns(read, *shape) if shape[1] == size else _of_rows(read, *shape)
        squares = eigvalsh(gram, lower=True, overwrite_a=True, check_finite=False)[::-1]
        error = size * float(np.finfo(np.float64).eps)
        squares[squares < error * squares[0]] = 0.0  # what these sums cannot tell from 0
    else:
        squares, error = _largest(read, *shape)
    values = np.sqrt(squares)
    left, unseen = max(0.0, square - float(squares.sum())), size - len(values)
    ranks = _shown(len(values))
    return Spectrum(
        size=size,
        ranks=tuple(ranks),
        values=tuple(float(values[rank - 1]) for rank in ranks),
        stable_rank=square / float(squares[0]),
        effective_rank=_effective_ranks(values, left, unseen),
        error=error,
        captured=min(1.0, float(squares.sum()) / square),
    )


def _panels(read: Read, rows: int, columns: int, begin: int = 0) -> Iterator[tuple[int, Floats]]:
    """(first row, some rows) of the rows from `begin` on; valid until the next."""
    panel = np.empty((max(1, min(rows, _PANEL // columns)), columns))
    for first in range(begin, rows, len(panel)):
        part = panel[: rows - first]
        read(first, part)
        yield first, part


def _of_columns(read: Read, rows: int, columns: int) -> Floats:
    """The lower triangle of AᵀA."""
    gram = np.zeros((columns, columns), order="F")
    for _, panel in _panels(read, rows, columns):
        gram = dsyrk(1.0, panel.T, 1.0, gram, lower=True, overwrite_c=True)
    return gram


def _of_rows(read: Read, rows: int, columns: int) -> Floats:
    """The lower triangle of A·Aᵀ: every panel of rows by itself and those below it."""
    gram = np.zeros((rows, rows), order="F")
    for first, panel in _panels(read, rows, columns):
        across = slice(first, first + len(panel))
        gram[across, across] = panel @ panel.T
        for below, other in _panels(read, rows, columns, across.stop):
            gram[below : below + len(other), across] = other @ panel.T
    return gram


def _largest(read: Read, rows: int, columns: int) -> tuple[Floats, float]:
    """The KEPT largest eigenvalues of AᵀA, and the largest residual among them relative to the first: each is within
    its residual of an eigenvalue (Parlett, The Symmetric Eigenvalue Problem, theorem 4.5.1)."""
    image = np.random.default_rng(0).standard_normal((columns, KEPT + OVERSAMPLED))
    for _ in range(1 + ITERATIONS):
        basis, _ = np.linalg.qr(image)
        image = np.zeros_like(basis)
        for _, panel in _panels(read, rows, columns):
            image += panel.T @ (panel @ basis)
    squares, rotation = eigh(basis.T @ image)
    squares, rotation = squares[: -KEPT - 1 : -1], rotation[:, : -KEPT - 1 : -1]
    residuals = np.linalg.norm(image @ rotation - (basis @ rotation) * squares, axis=0)
    return np.maximum(squares, 0.0), float(residuals.max() / squares[0])


def _effective_ranks(values: Floats, left: float, unseen: int) -> tuple[float, float]:
    """e^H of these values and of `unseen` smaller ones whose squares sum to `left`: with these as few and as large as
    they can be, and all equal."""
    known = _entropy_rank(values, 0.0, 0)
    if not unseen or not left or not values[-1]:
        return known, known
    few = min(float(unseen), left / float(values[-1]) ** 2)
    return _entropy_rank(values, math.sqrt(left / few), few), _entropy_rank(values, math.sqrt(left / unseen), unseen)


def _entropy_rank(values: Floats, other: float, count: float) -> float:
    """e^H of `values` and of `count` times the value `other`."""
    positive = values[values > 0]
    total = float(positive.sum()) + count * other
    weighted = float((positive * np.log(positive)).sum()) + (count * other * math.log(other) if other else 0.0)
    return math.exp(math.log(total) - weighted / total)


def _shown(count: int) -> list[int]:
    """Places of values, from 1: dense at both scales, the logarithmic and the linear one."""
    if count <= _SHOWN:
        return list(range(1, count + 1))
    half = _SHOWN // 2
    return sorted({round(float(p)) for p in (*np.geomspace(1, count, half), *np.linspace(1, count, half))})
