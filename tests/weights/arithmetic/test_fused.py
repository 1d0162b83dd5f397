import pytest
import torch

from rvdist.weights.arithmetic import fused
from rvdist.weights.arithmetic.linear import Linear
from rvdist.weights.arithmetic.method import combine

EVERY = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)  # every bf16 there is


def operations_one_by_one(base, differences, out):
    """torch's own operations, which round each time."""
    total = base.float()
    for alpha, plus, minus in differences:
        total = total + alpha * (plus.float() - minus.float())
    out.copy_(total)
    return int((~out.isfinite()).sum())


@pytest.mark.parametrize("alpha", [1.0, 0.3, -1.7, 1e30])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_one_operation_at_a_time_for_every_bit_pattern(alpha, count):
    generator = torch.Generator().manual_seed(count)
    shuffled = [EVERY[torch.randperm(1 << 16, generator=generator)] for _ in range(2 * count + 1)]
    base, *others = [torch.cat([t, t[:1234]]) for t in shuffled]
    differences = [(alpha / (k + 1), others[2 * k], others[2 * k + 1]) for k in range(count)]
    found, expected = torch.empty_like(base), torch.empty_like(base)
    assert fused.applies([base, *others, found])
    nonfinite = fused.linear(base, differences, found)
    assert nonfinite == operations_one_by_one(base, differences, expected) > 0
    both = found.isnan() & expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(torch.int16)[~both], expected.view(torch.int16)[~both])


@pytest.mark.parametrize("alpha", [1.0, 0.3, -1.7, 1e30])
@pytest.mark.parametrize("count", [1, 2])
def test_stored_differences_are_added_one_operation_at_a_time(alpha, count):
    generator = torch.Generator().manual_seed(count)
    base = torch.cat([EVERY, EVERY[:1234]])
    odd = torch.randint(-(2**31), 2**31, (count, len(base)), generator=generator, dtype=torch.int32).view(torch.float32)
    vectors = [(alpha / (k + 1), v, None) for k, v in enumerate(odd)]
    total = base.float()
    for share, v, _ in vectors:
        total = total + share * v
    expected, found = total.bfloat16(), torch.empty_like(base)
    assert combine(Linear(), base, vectors, found) == int((~expected.isfinite()).sum()) > 0
    both = found.isnan() & expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(torch.int16)[~both], expected.view(torch.int16)[~both])


def test_rows_that_another_precision_is_asked_for_are_computed_in_it():
    """Where only some rows have a vector in fp64, the others are computed as they are."""
    generator = torch.Generator().manual_seed(0)
    base, plus, minus = (torch.randn(10_000, generator=generator).bfloat16() for _ in range(3))
    found = torch.empty_like(base)
    combine(Linear(), base, [(0.3, plus, minus)], found, work=torch.float64)
    assert torch.equal(found, (base.double() + 0.3 * (plus.double() - minus.double())).bfloat16())


def test_lengths_that_are_no_multiple_of_anything():
    for n in (0, 1, 3, 4095, 4096, 4097, 10_001):
        base, plus, minus = (torch.randn(n).bfloat16() for _ in range(3))
        found, expected = torch.full((n,), 9.0).bfloat16(), torch.empty(n).bfloat16()
        combine(Linear(), base, [(0.5, plus, minus)], found)
        operations_one_by_one(base, [(0.5, plus, minus)], expected)
        assert torch.equal(found, expected)
