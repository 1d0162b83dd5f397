"""Spectra of matrices that are read by rows, against those of whole ones."""

import math

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from rvdist.weights.anatomy import spectrum as module
from rvdist.weights.anatomy.spectrum import spectrum


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine OpenBLAS's threads wait for each other, a hundred times as long as these matrices take."""
    with threadpool_limits(1):
        yield


def found(matrix, exact=module.EXACT):
    def read(first, rows):
        rows[:] = matrix[first : first + len(rows)]

    return spectrum(read, matrix.shape, float(np.square(matrix).sum()), exact)


def entropy_rank(values):
    p = values[values > 0] / values.sum()
    return math.exp(-(p * np.log(p)).sum())


def decaying(rows, columns, seed=0):
    draw = np.random.default_rng(seed)
    left, _ = np.linalg.qr(draw.standard_normal((rows, min(rows, columns))))
    right, _ = np.linalg.qr(draw.standard_normal((columns, min(rows, columns))))
    return (left * 0.97 ** np.arange(min(rows, columns))) @ right.T


@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (64, 64), (1, 50), (50, 1), (1, 1), (140, 129)])
@pytest.mark.parametrize("panel", [1, 700, 1 << 20])
def test_it_is_that_of_the_whole_matrix(shape, panel, monkeypatch):
    monkeypatch.setattr(module, "_PANEL", panel)
    matrix = np.random.default_rng(1).standard_normal(shape) * 1e-3
    values = np.linalg.svd(matrix, compute_uv=False)
    s = found(matrix)
    assert s.size == min(shape) and s.captured == pytest.approx(1)
    assert s.values == pytest.approx(values[np.array(s.ranks) - 1], rel=1e-9)
    assert s.stable_rank == pytest.approx(np.square(matrix).sum() / values[0] ** 2, rel=1e-12)
    assert s.effective_rank == (pytest.approx(entropy_rank(values), rel=1e-9),) * 2


def test_known_ranks():
    equal = found(np.eye(40, 70) * 3)
    assert equal.stable_rank == pytest.approx(40) and equal.effective_rank[0] == pytest.approx(40)
    draw = np.random.default_rng(2)
    one = found(np.outer(draw.standard_normal(300), draw.standard_normal(200)))
    assert one.stable_rank == pytest.approx(1) and one.effective_rank == (pytest.approx(1), pytest.approx(1))
    assert one.values[1:] == (0.0,) * (len(one.values) - 1)  # beneath what the sums can tell from 0


def test_small_values_are_within_the_error_that_is_stated():
    matrix = np.diag(10.0 ** -np.arange(12.0))
    s = found(matrix)
    off = np.abs(np.square(s.values) - np.square(np.diag(matrix)))
    assert s.error < 1e-14 and (off <= s.error).all()


@pytest.mark.parametrize("shape", [(310, 200), (200, 310)])
def test_the_sketch_states_its_error(shape, monkeypatch):
    monkeypatch.setattr(module, "_PANEL", 30_000)
    matrix = decaying(*shape)
    values = np.linalg.svd(matrix, compute_uv=False)
    s = found(matrix, exact=199)
    assert s.size == 200 and len(s.values) == module.KEPT
    off = np.abs(np.square(s.values) - np.square(values[: module.KEPT]))
    assert off.max() <= s.error * values[0] ** 2 and s.error < 1e-3
    assert s.values[:32] == pytest.approx(values[:32], rel=1e-6)
    assert s.stable_rank == pytest.approx(np.square(matrix).sum() / values[0] ** 2, rel=1e-9)
    low, high = s.effective_rank
    assert low <= entropy_rank(values) <= high and high < 3 * low
    assert s == found(matrix, exact=199), "its seed is fixed"


def test_the_sketch_of_noise_knows_how_little_it_knows():
    matrix = np.random.default_rng(3).standard_normal((300, 250))
    values = np.linalg.svd(matrix, compute_uv=False)
    s = found(matrix, exact=100)
    low, high = s.effective_rank
    assert s.captured < 0.9 and low < entropy_rank(values) < high <= 250
    assert s.values[0] <= values[0] * (1 + 1e-12)


def test_shown_values_are_all_of_few_and_some_of_many():
    few, many = found(np.eye(128)), found(np.eye(400))
    assert few.ranks == tuple(range(1, 129))
    assert many.ranks[:3] == (1, 2, 3) and many.ranks[-1] == 400 and 64 < len(many.ranks) <= 128
    assert max(b - a for a, b in zip(many.ranks, many.ranks[1:], strict=False)) <= 7
