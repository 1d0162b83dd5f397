import pytest
import torch

from rvdist.weights.arithmetic.linear import Linear
from rvdist.weights.arithmetic.method import combine as combine_by
from rvdist.weights.arithmetic.method import count_nonfinite


def combine(base, differences, out):
    return combine_by(Linear(), base, differences, out)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def operands(dtype, n=200_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=generator)
    minus = base + 0.01 * torch.randn(n, generator=generator)
    plus = minus + 0.003 * torch.randn(n, generator=generator)
    return base.to(dtype), plus.to(dtype), minus.to(dtype)


def units_off(one, other):
    """Distance in representable numbers (same-sign finite values)."""
    integer = {2: torch.int16, 4: torch.int32}[one.itemsize]
    return (one.view(integer).long() - other.view(integer).long()).abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1.0, 0.3, -1.0, 1.7])
def test_equals_fp64_rounded_once(dtype, alpha):
    base, plus, minus = operands(dtype)
    out = torch.empty_like(base)
    assert combine(base, [(alpha, plus, minus)], out) == 0
    exact = (base.double() + alpha * (plus.double() - minus.double())).to(dtype)
    off = out != exact
    if dtype == torch.float32:
        assert not off.any()
    else:
        assert off.sum() < base.numel() / 10_000
        assert (units_off(out[off], exact[off]) <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_in_order_and_chunks_do_not_matter(dtype):
    base, plus, minus = operands(dtype)
    _, other, _ = operands(dtype, seed=1)
    terms = [(0.7, plus, minus), (-0.2, other, minus)]
    whole = torch.empty_like(base)
    combine(base, terms, whole)
    for size in (1, 7, 4097, 65536):
        n = min(base.numel(), 20 * size)
        pieces = torch.empty_like(base[:n])
        for start in range(0, n, size):
            cut = slice(start, min(start + size, n))
            combine(base[cut], [(a, p[cut], m[cut]) for a, p, m in terms], pieces[cut])
        assert torch.equal(pieces, whole[:n]), size


def test_mixed_dtypes_are_widened_exactly_and_rounded_to_the_output():
    base, plus, minus = operands(torch.bfloat16)
    plus = plus.float() + 1e-4
    out = torch.empty(base.numel(), dtype=torch.float16)
    combine(base, [(0.5, plus, minus)], out)
    assert torch.equal(out, (base.double() + 0.5 * (plus.double() - minus.double())).half())


def test_no_terms_is_a_copy():
    base = torch.tensor([1.0, -0.0, 3.0]).bfloat16()
    out = torch.empty_like(base)
    combine(base, [], out)
    assert torch.equal(out.view(torch.int16), base.view(torch.int16))


def test_nonfinite_results_are_counted():
    base = torch.tensor([60000.0, 1.0, 2.0]).half()
    plus, minus = torch.tensor([60000.0, 1.0, 1.0]).half(), torch.tensor([0.0, 1.0, 1.0]).half()
    out = torch.empty_like(base)
    assert combine(base, [(1.0, plus, minus)], out) == 1, "the sum overflows fp16, not the arithmetic"
    assert count_nonfinite(torch.tensor([float("nan"), float("inf"), 1.0])) == 2
    assert count_nonfinite(torch.empty(0)) == 0
