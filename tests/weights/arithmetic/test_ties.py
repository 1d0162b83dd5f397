"""TIES by chunks against whole tensors."""

import pytest
import torch
from whole_tensors import ties

from rvdist.weights.arithmetic.method import Place, combine
from rvdist.weights.arithmetic.ties import Ties, kth_largest

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def by_chunks(base, terms, density, chunk):
    method, out = Ties(density), torch.empty_like(base)
    work = torch.float64 if base.dtype == torch.float32 else torch.float32
    cuts = [slice(start, start + chunk) for start in range(0, base.numel(), chunk)]
    method.survey(
        Place("w", base.numel()),
        lambda: ([plus[cut].to(work) - minus[cut].to(work) for _, plus, minus in terms] for cut in cuts),
    )
    nonfinite = 0
    for cut in cuts:
        pieces = [(alpha, plus[cut], minus[cut]) for alpha, plus, minus in terms]
        nonfinite += combine(method, base[cut], pieces, out[cut], place=Place("w", base.numel(), cut.start))
    return out, nonfinite


def operands(dtype, alphas, n=20_001, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=generator).to(dtype)
    noisy = [(base + 0.01 * torch.randn(n, generator=generator)).to(dtype) for _ in range(2 * len(alphas))]
    return base, list(zip(alphas, noisy[::2], noisy[1::2], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [1e-9, 0.2, 0.777, 1.0])
@pytest.mark.parametrize("alphas", [(1.0,), (1.0, 1.0, 1.0), (0.7, -0.3, 1.9, 0.5)])
def test_equals_whole_tensors(dtype, density, alphas):
    base, terms = operands(dtype, alphas)
    found, nonfinite = by_chunks(base, terms, density, 4096)
    assert torch.equal(found, ties(base, terms, density)) and nonfinite == 0
    assert not torch.equal(found, base)


@pytest.mark.parametrize("chunk", [1000, 4095, 20_001])
def test_chunks_do_not_matter(chunk):
    base, terms = operands(torch.bfloat16, (0.7, -0.3, 1.9))
    assert torch.equal(by_chunks(base, terms, 0.3, chunk)[0], by_chunks(base, terms, 0.3, 20_000)[0])


def test_one_vector_untrimmed_is_its_sum():
    base, terms = operands(torch.float32, (0.3,))
    ((alpha, plus, minus),) = terms
    assert torch.equal(by_chunks(base, terms, 1.0, 4096)[0], (base + alpha * (plus.double() - minus.double())).float())


def test_equal_alphas_scale_the_disjoint_mean():
    d = torch.tensor([[1.0, 1.0, 0.0, 2.0], [3.0, -2.0, 0.0, -2.0], [0.0, -4.0, 5.0, 0.0]])
    zero = torch.zeros(4)
    found, _ = by_chunks(zero, [(0.5, one, zero) for one in d], 1.0, 4)
    assert found.tolist() == [0.5 * 2, 0.5 * -3, 0.5 * 5, 0]  # the last election is a draw


def test_equal_magnitudes_at_the_threshold_all_stay():
    d, zero = torch.tensor([1.0, -2.0, 2.0, 0.5, 2.0, 3.0]), torch.zeros(6)
    assert by_chunks(zero, [(1.0, d, zero)], 2 / 6, 4)[0].tolist() == [0, -2, 2, 0, 2, 3]


def test_zeros_and_empty_tensors():
    zero = torch.zeros(10).bfloat16()
    assert torch.equal(by_chunks(zero, [(1.0, zero, zero)], 0.5, 4)[0], zero)
    one = zero.clone()
    one[7] = 1
    assert torch.equal(by_chunks(zero, [(1.0, one, zero), (1.0, zero, zero)], 0.5, 4)[0], one)
    assert by_chunks(zero[:0], [(1.0, zero[:0], zero[:0])], 0.5, 4)[0].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_largest_magnitude_whatever_the_exponents(dtype):
    """Denormals, infinities, both zeros and many equal numbers, against a sort."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5000, generator=generator, dtype=dtype) * torch.exp(
        80 * torch.randn(5000, generator=generator, dtype=dtype)
    )
    tiny = torch.finfo(dtype).smallest_normal / 8
    numbers = torch.cat([numbers, numbers[:700].neg(), torch.tensor([0.0, -0.0, tiny, -tiny, 1, 1, -1], dtype=dtype)])
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    ordered = numbers.abs().sort(descending=True).values
    half = ordered / 2
    for kth in (1, 2, 700, 2500, 5706, 5707):
        found = kth_largest(lambda: ([part, part / 2] for part in numbers.split(999)), kth)
        assert found == [ordered.view(integer)[kth - 1].item(), half.view(integer)[kth - 1].item()], kth


def test_what_is_not_finite_is_counted_not_voted_away():
    base, one = torch.zeros(4), torch.ones(4)
    broken = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    for density in (0.25, 0.5, 1.0):
        assert by_chunks(base, [(1.0, one, base), (1.0, broken, base), (1.0, one, base)], density, 4)[1] == 3
    assert by_chunks(base, [(1.0, broken, base), (-1.0, broken, base)], 1.0, 4)[1] == 3
