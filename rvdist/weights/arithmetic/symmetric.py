"""The eigenvalues and eigenvectors of a symmetric matrix, in the memory of two such matrices: LAPACK's dsyevr.

torch and numpy call dsyevd, which takes three in place. scipy calls dsyevr, and lets no other thread of Python run
meanwhile; so it is called here by its address, which scipy publishes for Cython.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import Any

import numpy as np
import torch


def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eigenvalues of a matrix (n, n) with n > 0, smallest first, and its eigenvectors as columns (n, n): fp64. It
    looks at the matrix's lower triangle and diagonal alone, which it may overwrite; the matrix is contiguous and
    finite. Raises LinAlgError where LAPACK finds none."""
    give_back()
    side, dsyevr = len(matrix), _dsyevr()
    if dsyevr is None:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    values, rows = torch.empty(side, dtype=torch.float64), torch.empty(side, side, dtype=torch.float64)
    found, support, failed = ctypes.c_int(), torch.empty(2 * side, dtype=torch.int32), ctypes.c_int()

    def call(work: torch.Tensor, whole: torch.Tensor, sizes: tuple[int, int]) -> None:
        order, none, length, other = (ctypes.c_int(n) for n in (side, 0, *sizes))
        exact = ctypes.c_double(0.0)  # as can be; of all eigenvalues, for which other ends mean nothing
        dsyevr(
            b"V", b"A", b"U", _at(order), _at(matrix), _at(order), _at(exact), _at(exact), _at(none), _at(none),
            _at(exact), _at(found), _at(values), _at(rows), _at(order), _at(support), _at(work), _at(length),
            _at(whole), _at(other), _at(failed),
        )  # fmt: skip

    asked = torch.empty(1, dtype=torch.float64), torch.empty(1, dtype=torch.int32)
    call(*asked, (-1, -1))
    sizes = int(asked[0]), int(asked[1])
    call(torch.empty(sizes[0], dtype=torch.float64), torch.empty(sizes[1], dtype=torch.int32), sizes)
    if failed.value or found.value != side:
        raise np.linalg.LinAlgError(
            f"LAPACK finds no eigenvalues of a matrix of {side} × {side} (dsyevr says {failed.value})"
        )
    return values, rows.T  # LAPACK has columns where torch has rows


def give_back() -> None:
    """Gives what is free of this process's memory back to the system, where the C library can: of what was used by
    megabytes it keeps some that stands in the way of larger pieces."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def one_thread_of_blas() -> AbstractContextManager[object]:
    """scipy's LAPACK, which torch does not know of, takes one thread."""
    return nullcontext() if _dsyevr() is None else _blas().limit(limits=1)


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


@cache
def _dsyevr() -> Callable[..., None] | None:
    """None where there is no scipy, as where a rented card is tried: torch's own takes two such matrices more."""
    try:
        from scipy.linalg import cython_lapack
    except ImportError:
        return None
    capsule, python = cython_lapack.__pyx_capi__["dsyevr"], ctypes.pythonapi
    name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", python))(capsule)
    point = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", python))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_char_p] * 3, *[ctypes.c_void_p] * 18)(point(capsule, name))


def _at(one: torch.Tensor | ctypes.c_int | ctypes.c_double) -> int:
    return one.data_ptr() if isinstance(one, torch.Tensor) else ctypes.addressof(one)
