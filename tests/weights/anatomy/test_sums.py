import math

import numpy as np
import pytest

from rvdist.weights.anatomy.sums import BLOCK, Dot


def dot(a, b, size):
    found = Dot()
    for begin in range(0, len(a), size):
        found.add(a[begin : begin + size], b[begin : begin + size], np.empty(size))
    return found.value


@pytest.mark.parametrize("numel", [0, 1, BLOCK - 1, BLOCK, 7 * BLOCK + 12345])
def test_the_bits_do_not_depend_on_where_chunks_end(numel):
    draw = np.random.default_rng(numel)
    a, b = draw.standard_normal((2, numel)) * 10.0 ** draw.integers(-8, 8, numel)
    exact = math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    found = {dot(a, b, blocks * BLOCK) for blocks in (1, 2, 3, 100)}
    assert len(found) == 1
    assert abs(found.pop() - exact) <= 1e-14 * math.fsum(np.abs(a * b))


def test_what_an_addition_loses_is_not_lost():
    a = np.zeros(3 * BLOCK)
    a[0], a[BLOCK], a[2 * BLOCK] = 1e17, 1.0, -1e17
    assert dot(a, np.ones_like(a), BLOCK) == 1.0


def test_infinities_show():
    assert not math.isfinite(dot(np.array([1.0, np.inf]), np.ones(2), BLOCK))
    assert not math.isfinite(dot(np.array([1.0, np.nan]), np.ones(2), BLOCK))
