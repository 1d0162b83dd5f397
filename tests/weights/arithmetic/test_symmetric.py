"""Eigenvalues by LAPACK's dsyevr, called by its address: against numpy's, on spectra that are hard for it."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from peaks import peak_while

from rvdist.weights.arithmetic.symmetric import eigh, one_thread_of_blas

SPECTRA = {
    "random": np.random.default_rng(0).standard_normal(200),
    "all alike": np.ones(200),
    "none": np.zeros(200),
    "two of a hundred each": np.repeat([0.0, 2.0], 100),
    "low rank and rounding": np.r_[np.ones(8), 1e-17 * np.random.default_rng(1).standard_normal(192)],
    "over sixteen orders": np.logspace(0, -16, 200),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_values_and_vectors_are_numpys(spectrum):
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((200, 200)))[0]
    exact = (turn * SPECTRA[spectrum]) @ turn.T
    given = torch.from_numpy(np.tril(exact) + np.triu(np.full_like(exact, np.nan), 1))
    values, vectors = (found.numpy() for found in eigh(given))
    assert abs(values - np.linalg.eigvalsh(exact)).max() < 1e-13
    assert abs(vectors.T @ vectors - np.eye(200)).max() < 1e-11
    assert abs(exact @ vectors - vectors * values).max() < 1e-12
    assert np.isnan(given.numpy()[np.triu_indices(200, 1)]).all(), "the other triangle stays what it was"


def test_lapack_is_found_without_what_compiles():
    """numba takes 20 MiB, and what it compiled before as much again: a worker that sums no elements does without."""
    found = (
        "import sys, rvdist.weights.arithmetic.symmetric as s; sys.exit(s._dsyevr() is None or 'numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", found]).returncode == 0


@pytest.mark.parametrize("side", [1, 2])
def test_small_ones(side):
    values, vectors = eigh(3.0 * torch.eye(side, dtype=torch.float64))
    assert values.tolist() == [3.0] * side and vectors.shape == (side, side)


def test_takes_one_more_of_its_size():
    eigh(torch.eye(50, dtype=torch.float64))
    matrix = torch.randn(1500, 1500, dtype=torch.float64)
    assert peak_while(lambda: eigh(matrix)) < 1.3 * matrix.nbytes, "torch.linalg.eigh takes two in place"


def test_other_threads_run_meanwhile_and_the_bits_stay():
    matrix = torch.randn(700, 700, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(eigh(matrix.clone())))
    with one_thread_of_blas():
        alone, ticks = eigh(matrix.clone()), 0
        thread.start()
        while thread.is_alive():
            time.sleep(0.001)
            ticks += 1
    assert ticks > 5
    assert all(torch.equal(one, other) for one, other in zip(alone, found, strict=True))
