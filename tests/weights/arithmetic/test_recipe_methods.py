"""mergekit's methods by chunks against whole tensors, in fp64."""

from dataclasses import replace

import pytest
import torch
import whole_tensors as whole
from peaks import peak_while

from rvdist.core.method import MethodSpec
from rvdist.weights.arithmetic.method import Place, combine
from rvdist.weights.arithmetic.registry import build


def by_chunks(spec, base, vectors, alphas, chunk=1000, place=None):
    method, place = build(spec), place or Place("w", base.numel())
    cuts = [slice(start, start + chunk) for start in range(0, base.numel(), chunk)]
    first = [base] * method.surveys_base
    if spec.facts.whole_tensors:
        method.survey(place, lambda: ([t[cut].clone() for t in (*first, *vectors)] for cut in cuts))
    out = torch.empty_like(base)
    for cut in cuts:
        terms = [(alpha, vector[cut], None) for alpha, vector in zip(alphas, vectors, strict=True)]
        at = replace(place, start=cut.start)
        assert combine(method, base[cut], terms, out[cut], place=at) == 0
    return out


def operands(count, n=6001, seed=0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=generator, dtype=torch.float64)
    common = torch.randn(n, generator=generator, dtype=torch.float64)
    return base, [noise * (common + torch.randn(n, generator=generator, dtype=torch.float64)) for _ in range(count)]


BASE, VECTORS = operands(3)
A, B, C = VECTORS
WEIGHTS = (0.5, 0.3, 0.9)
CASES = {
    "breadcrumbs": (
        MethodSpec("breadcrumbs", 0.4, options=(("gamma", 0.05),)), VECTORS, WEIGHTS,
        whole.breadcrumbs(BASE, VECTORS, WEIGHTS, 0.4, 0.05),
    ),
    "breadcrumbs: fewer outliers than gamma": (
        MethodSpec("breadcrumbs", 0.97, options=(("gamma", 0.05),)), VECTORS, WEIGHTS,
        whole.breadcrumbs(BASE, VECTORS, WEIGHTS, 0.97, 0.05),
    ),
    "breadcrumbs: all": (MethodSpec("breadcrumbs"), VECTORS, WEIGHTS, BASE + 0.5 * A + 0.3 * B + 0.9 * C),
    "breadcrumbs: none": (MethodSpec("breadcrumbs", 1e-5), VECTORS, WEIGHTS, BASE),
    "sce": (MethodSpec("sce", 0.3), VECTORS, (1, 1, 1), whole.sce(BASE, VECTORS, 0.3)),
    "sce: all": (MethodSpec("sce"), VECTORS, (1, 1, 1), whole.sce(BASE, VECTORS, 1.0)),
    "sce: tiny vectors weigh alike": (
        MethodSpec("sce", 0.5), [v * 1e-5 for v in VECTORS], (1, 1, 1),
        whole.sce(BASE, [v * 1e-5 for v in VECTORS], 0.5),
    ),
    "sce: one vector does not vary": (MethodSpec("sce", 0.5), [A], (1,), BASE),
    "model_stock": (MethodSpec("model_stock"), VECTORS, (1, 1, 1), whole.model_stock(BASE, VECTORS)),
    "model_stock: one says nothing": (MethodSpec("model_stock"), [A], (1,), BASE),
    "nuslerp": (MethodSpec("nuslerp"), [A, B], (0.2, 0.6), BASE + whole.slerp(A, B, 0.75)),
    "nuslerp: no weight": (MethodSpec("nuslerp"), [A, B], (0.5, -0.5), BASE + whole.slerp(A, B, 0.5)),
    "nuslerp: one line": (MethodSpec("nuslerp"), [A, 3 * A], (0.75, 0.25), BASE + 1.5 * A),
    "nuslerp: one vector": (MethodSpec("nuslerp"), [A], (0.2,), BASE + A),
    "nuslerp_models": (MethodSpec("nuslerp_models"), [A], (0.3,), whole.slerp(BASE, BASE + A, 0.3)),
    "multislerp": (MethodSpec("multislerp"), VECTORS, WEIGHTS, BASE + whole.mean_direction(VECTORS, WEIGHTS)),
    "multislerp: they cancel out": (MethodSpec("multislerp"), [A, -A], (0.5, 0.5), BASE),
    "multislerp_models": (
        MethodSpec("multislerp_models"), [A, B], (0.5, 0.2),
        whole.mean_direction([BASE, BASE + A, BASE + B], (0.3, 0.5, 0.2)),
    ),
    "karcher": (
        MethodSpec("karcher", options=(("max_iter", 100), ("tol", 1e-12))), VECTORS, (1, 1, 1),
        whole.karcher([BASE, *(BASE + v for v in VECTORS)]),
    ),
    "karcher: no length": (MethodSpec("karcher"), [-BASE], (1,), 0.5 * BASE),
    "nearswap": (MethodSpec("nearswap"), [A], (0.1,), whole.nearswap(BASE, BASE + A, 0.1)),
    "ram": (MethodSpec("ram", options=(("epsilon", 0.2),)), VECTORS, (1, 1, 1), whole.ram(BASE, VECTORS, 0.2)),
    "ram: one alone": (MethodSpec("ram"), [A], (1,), BASE + A),
    "ramplus_tl": (
        MethodSpec("ramplus_tl", options=(("epsilon", 0.2), ("r", 0.5), ("alpha", 3.0))), VECTORS, (1, 1, 1),
        whole.ram(BASE, VECTORS, 0.2, 0.5, 3.0),
    ),
    "ramplus_tl: nothing alone": (
        MethodSpec("ramplus_tl", options=(("epsilon", 0.0),)), [A, B], (1, 1), BASE + (A + B) / 2
    ),
    "nearswap: not below 0": (MethodSpec("nearswap"), [A], (-0.1,), BASE),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_whole_tensors(case):
    spec, vectors, alphas, wanted = CASES[case]
    found = by_chunks(spec, BASE, vectors, alphas)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)  # numbers from angles are rounded to fp32
    assert torch.equal(by_chunks(spec, BASE, vectors, alphas, 6001), found), "chunks do not matter"


def test_breadcrumbs_elect_as_ties_does():
    """Without outliers, and all kept, the two are one."""
    spec = MethodSpec("breadcrumbs_ties", options=(("gamma", 0.0), ("normalize", 1.0)))
    same = by_chunks(MethodSpec("ties_mean"), BASE, VECTORS, WEIGHTS)
    assert torch.equal(by_chunks(spec, BASE, VECTORS, WEIGHTS), same)
    doubled = MethodSpec("breadcrumbs_ties", options=(("normalize", 1.0), ("factor", 2.0)))
    torch.testing.assert_close(by_chunks(doubled, BASE, VECTORS, WEIGHTS) - BASE, 2 * (same - BASE))


ROWS, WIDTH = 40, 150  # of the same 6,000 elements
BY_ROWS = {
    "arcee_fusion": (MethodSpec("arcee_fusion"), 1, (1,), lambda b, v: whole.arcee_fusion(b, v[0], WIDTH)),
    "arcee_fusion: one row": (MethodSpec("arcee_fusion"), 1, (1,), lambda b, v: whole.arcee_fusion(b, v[0], 6000)),
    "della_linear": (
        MethodSpec("della_linear", 0.4, 5, (("epsilon", 0.3),)), 3, WEIGHTS,
        lambda b, v: whole.della(b, v, WEIGHTS, 0.4, 0.3, 5, WIDTH),
    ),
    "della_linear: all": (
        MethodSpec("della_linear"), 2, (0.5, 0.3), lambda b, v: b + 0.5 * v[0] + 0.3 * v[1]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_ROWS)
def test_equals_whole_tensors_by_rows(case):
    spec, count, alphas, wanted = BY_ROWS[case]
    base, vectors = BASE[: ROWS * WIDTH], [vector[: ROWS * WIDTH] for vector in VECTORS[:count]]
    place = Place("w", base.numel(), shape=(base.numel(),) if "one row" in case else (ROWS, WIDTH))
    found = by_chunks(spec, base, vectors, alphas, 6000, place)
    torch.testing.assert_close(found, wanted(base, vectors), rtol=0, atol=2e-6)
    if len(place.shape) > 1:
        assert torch.equal(by_chunks(spec, base, vectors, alphas, 7 * WIDTH, place), found), "chunks do not matter"


def test_della_elects_as_ties_does():
    """All kept, the two are one; without `rescale` what stays is as it was."""
    same = by_chunks(MethodSpec("ties_mean"), BASE, VECTORS, WEIGHTS)
    assert torch.equal(by_chunks(MethodSpec("della"), BASE, VECTORS, WEIGHTS), same)
    plain = MethodSpec("della_linear", 0.5, 1, (("epsilon", 0.2), ("rescale", 0.0)))
    change = by_chunks(plain, torch.zeros_like(A), [A], (1,), 6001)
    assert set(change.div(A).unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="make no probabilities"):
        by_chunks(MethodSpec("della", 0.9), BASE, VECTORS, WEIGHTS)


def test_each_vector_of_della_has_its_own_density():
    place = Place("w", 6000, densities=(0.3, 1.0), shape=(ROWS, WIDTH))
    base, vectors = torch.zeros(6000, dtype=torch.float64), [A[:6000], B[:6000]]
    spec = MethodSpec("della_linear", 0.5, 5, (("epsilon", 0.1), ("rescale", 0.0)))
    only = by_chunks(spec, base, vectors, (1, 1), 6000, place) - vectors[1]
    assert (only.abs() > 1e-9).double().mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("name", ["nuslerp", "nuslerp_models", "nearswap", "arcee_fusion"])
def test_too_many_vectors_are_refused(name):
    with pytest.raises(ValueError, match="not|unpack"):
        by_chunks(MethodSpec(name), BASE, VECTORS, WEIGHTS)


@pytest.mark.parametrize("name", ["ties", "arcee_fusion"])
def test_a_survey_leaves_nothing_of_a_stack(name):
    """Of 64 MiB, in 128 chunks: nor holes in memory, which small pieces would leave that outlive a chunk."""
    method, place = build(MethodSpec(name, 0.5)), Place("w", 1 << 24, shape=(32, 512, 1024))
    part = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0))

    def chunks():
        for k in range(128):
            yield [part * scale for scale in (1 + k / 128, 0.01)[1 - method.surveys_base :]]

    method.survey(
        replace(place, numel=1 << 17, shape=(128, 1024)), lambda: iter([[part, part][: 1 + method.surveys_base]])
    )
    assert peak_while(lambda: method.survey(place, chunks)) < 32 << 20
