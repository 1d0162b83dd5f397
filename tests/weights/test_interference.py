"""What is sampled of vectors that are added, against all their elements: tensors here are smaller than a sample."""

import math

import pytest
import torch
from checkpoints import load_checkpoint, near, write_checkpoint

from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.interference import measure_interference


@pytest.fixture
def point(family, tmp_path):
    """Three vectors from one minus; the third is the first with a third of its elements turned, and half as long."""
    paths = {name: str(path) for name, path in family(torch.float32).items()}
    minus, plus = (load_checkpoint(tmp_path / name) for name in ("minus", "plus"))
    other = str(write_checkpoint(tmp_path / "other", near(minus, 7)))
    draw = torch.Generator().manual_seed(0)
    turned = {
        name: minus[name] + 0.5 * (plus[name] - minus[name]) * (1 - 2.0 * (torch.rand(t.shape, generator=draw) < 0.35))
        if t.is_floating_point() else t
        for name, t in plus.items()
    }  # fmt: skip
    half = str(write_checkpoint(tmp_path / "half", turned))
    vectors = [Vector(plus, paths["minus"]) for plus in (paths["plus"], other, half)]
    return WeightPoint(paths["target"], (Term(1.0, vectors[0]), Term(0.0, vectors[1]), Term(-2.0, vectors[2])))


def test_numbers_are_those_of_all_elements_of_matrices(point):
    found = measure_interference(point, {source: open_source(source) for source in point.sources()})
    (pair,) = found.pairs
    weights = {source: load_checkpoint(open_source(source).path) for source in point.sources()}
    matrices = [
        n for n, t in weights[point.base].items() if t.dim() > 1 and t.is_floating_point() and t.numel() <= 8192
    ]
    assert (pair.one, pair.other) == (0, 2) and len(matrices) > 3
    a, b = (
        torch.cat([(weights[t.vector.plus][n] - weights[t.vector.minus][n]).double().flatten() for n in matrices])
        for t in (point.terms[0], point.terms[2])
    )
    b = -2 * b
    cosine = float(a.dot(b) / a.norm() / b.norm())
    assert pair.overlap > 0.98 and pair.agreement == pytest.approx(0.35, abs=0.03)
    assert pair.cosine == pytest.approx(cosine, abs=0.05) and cosine < -0.2
    assert found.along[0] == pytest.approx(1 + float(a.dot(b) / a.dot(a)), abs=0.05) and 1 not in found.along
    assert "vectors[0] and vectors[2]: norms " in str(pair) and "cosine −0.3" in str(pair)


@pytest.mark.parametrize(
    ("alphas", "warns"),
    [((1.0, -0.8), "goes 0.20 of its way"), ((1.0, 1.0), "goes 2.00 of its way"), ((0.5, 0.5), ""), ((1.0, 0.3), "")],
)
def test_what_undoes_or_repeats_a_vector_is_warned_of(alphas, warns, family, tmp_path):
    paths = {name: str(path) for name, path in family().items()}
    twin = str(write_checkpoint(tmp_path / "twin", load_checkpoint(tmp_path / "plus")))
    terms = tuple(
        Term(alpha, Vector(p, paths["minus"])) for alpha, p in zip(alphas, (paths["plus"], twin), strict=True)
    )
    point = WeightPoint(paths["target"], terms)
    sources = {source: open_source(source) for source in point.sources()}
    said = measure_interference(point, sources).warnings()
    assert (
        any(sentence.startswith("vectors[0]: along it the sum ") and warns in sentence for sentence in said)
        if warns
        else not said
    )
    masked = WeightPoint(paths["target"], (terms[0], Term(alphas[1], terms[1].vector, Mask(include=("none",)))))
    apart = measure_interference(masked, sources)
    assert apart.along == {0: 1.0, 1: None} and not apart.warnings()
    assert str(apart.pairs[0]).endswith("one of them changes nothing of what was sampled")
    assert math.isclose(apart.pairs[0].norms[1], 0)
