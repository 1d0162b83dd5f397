"""DARE by chunks against whole tensors, and against what chance should do."""

import math

import pytest
import torch
from whole_tensors import dare

from rvdist.weights.arithmetic.dare import Dare
from rvdist.weights.arithmetic.method import Place, combine

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def by_chunks(base, terms, density, seed=0, chunk=4096, tensor="w"):
    out = torch.empty_like(base)
    for start in range(0, base.numel(), chunk):
        cut = slice(start, start + chunk)
        pieces = [(alpha, plus[cut], minus[cut]) for alpha, plus, minus in terms]
        combine(Dare(density, seed), base[cut], pieces, out[cut], place=Place(tensor, base.numel(), start))
    return out


def operands(dtype, alphas, n=20_001):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, generator=generator).to(dtype)
    noisy = [(base + 0.01 * torch.randn(n, generator=generator)).to(dtype) for _ in range(2 * len(alphas))]
    return base, list(zip(alphas, noisy[::2], noisy[1::2], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("alphas", [(1.0,), (0.7, -0.3, 1.9)])
def test_equals_whole_tensors(dtype, density, alphas):
    base, terms = operands(dtype, alphas)
    assert torch.equal(by_chunks(base, terms, density, 5), dare(base, terms, density, 5))


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 9, 1001, 20_001])
def test_chunks_do_not_matter(chunk):
    base, terms = operands(torch.bfloat16, (0.7, -0.3))
    base, terms = base[: 100 * chunk], [(a, p[: 100 * chunk], m[: 100 * chunk]) for a, p, m in terms]
    assert torch.equal(by_chunks(base, terms, 0.3, chunk=chunk), by_chunks(base, terms, 0.3))


def test_seed_vector_and_tensor_each_choose_others():
    zero, one = torch.zeros(64), torch.ones(64)
    found = [
        by_chunks(zero, [(1.0, one, zero)], 0.5, 0),
        by_chunks(zero, [(1.0, one, zero)], 0.5, 1),
        by_chunks(zero, [(1.0, one, zero)], 0.5, 0, tensor="v"),
        by_chunks(zero, [(1.0, zero, zero), (1.0, one, zero)], 0.5, 0),
    ]
    assert len({tuple(choice.tolist()) for choice in found}) == 4


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9])
def test_the_share_that_stays_and_the_mean(density):
    n = 1_000_000
    zero, one = torch.zeros(n), torch.ones(n)
    change = by_chunks(zero, [(2.0, one, zero)], density, chunk=131072)
    five_sigma = 5 * math.sqrt(density * (1 - density) / n)
    kept = change != 0
    assert abs(kept.float().mean().item() - density) < five_sigma
    assert abs(change.double().mean().item() - 2) < five_sigma * 2 / density
    assert torch.equal(change[kept], torch.full_like(change[kept], 2 / density))
    pairs = (kept[1:] & kept[:-1]).float().mean().item()  # neighbours are independent
    assert abs(pairs - density**2) < 5 * math.sqrt(3 * density**2 / n)


def test_without_dropping_it_is_linear():
    base, terms = operands(torch.float32, (0.3, 0.5))
    exact = base.double()
    for alpha, plus, minus in terms:
        exact = exact + alpha * (plus.double() - minus.double())
    assert torch.equal(by_chunks(base, terms, 1.0), exact.float())
