"""How much of a vector is applied: counted, estimated, refused when it is little, and explained."""

import pytest
import torch
from checkpoints import near, tensors, write_checkpoint

from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights import compat
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.coverage import fitting_rename, measure_coverage


def write(place, **weights):
    for name, own in weights.items():
        write_checkpoint(place / name, own, config={"model_type": "tiny", "tie_word_embeddings": False})
    return {name: open_source(str(place / name)) for name in weights}


def check(place, sources, mask=None, rename=(), **options):
    vector = Vector(str(place / "plus"), str(place / "minus"), tuple(rename))
    point = WeightPoint(str(place / "target"), (Term(1.0, vector, mask or Mask()),))
    return compat.check(point, {name: open_source(name, by) for name, by in point.renames()}, **options)


def renamed(weights):
    """As a vision-language model calls its language model."""
    return {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in weights.items()}


def test_all_of_it_is_not_worth_a_word(tmp_path):
    base = tensors(0)
    sources = write(tmp_path, target=base, plus=near(base, 1), minus=near(base, 2))
    assert measure_coverage(*sources.values(), lambda name: 1.0) is None
    assert check(tmp_path, sources).exceptions == ()


def test_the_share_of_the_size_is_near_the_true_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (300, 70), "b": (9,), "c": (40, 1000), "d": (3, 5, 7)}
    plus = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    minus = {name: tensor - torch.randn(tensor.shape, generator=generator) for name, tensor in plus.items()}
    sources = write(tmp_path, target={name: plus[name] for name in "ab"}, plus=plus, minus=minus)
    found = measure_coverage(*sources.values(), lambda name: 2.0 if name == "a" else 1.0)
    squares = {name: float((plus[name] - minus[name]).double().square().sum()) for name in plus}
    squares["a"] *= 4
    exact = ((squares["a"] + squares["b"]) / sum(squares.values())) ** 0.5
    assert (found.tensors, found.of_tensors, found.elements, found.of_elements) == (2, 4, 21009, 61114)
    assert found.size == pytest.approx(exact, rel=0.02)


def test_little_is_refused_with_the_renaming_that_fits_and_that_applies_all(tmp_path):
    base = tensors(0)
    same = {"model.visual.w": torch.ones(64, 64)}
    sources = write(tmp_path, target=renamed(base) | same, plus=near(base, 1) | same, minus=near(base, 2) | same)
    with pytest.raises(BadInput, match=r"1% of its size .*vector.rename=.*; compat.force=true") as refused:
        check(tmp_path, sources)
    forced = check(tmp_path, sources, force=True)
    assert forced.level == "refused" and any("of its size" in sentence for sentence in forced.exceptions)
    left = {name: spec for name, spec in sources["plus"].tensors.items() if name not in sources["target"].tensors}
    pattern, replacement = fitting_rename(sources["target"], left)
    assert f'[["{pattern}","{replacement}"]]' in str(refused.value)
    said = check(tmp_path, sources, rename=[(pattern, replacement)]).exceptions
    assert not any("of its size" in sentence for sentence in said), said


def test_what_the_mask_leaves_out_is_no_part_of_the_vector(tmp_path):
    base = tensors(0)
    more = {"value_head": torch.ones(4000)}
    sources = write(
        tmp_path, target=base, plus=near(base, 1) | more, minus=near(base, 2) | {"value_head": -more["value_head"]}
    )
    with pytest.raises(BadInput, match="little of it fits"):
        check(tmp_path, sources)
    assert check(tmp_path, sources, Mask(exclude=("value_head",))).refusals == ()


def test_unrelated_names_have_no_renaming(tmp_path):
    base = tensors(0)
    other = {f"x{k}": torch.ones(3, 3) for k in range(5)}
    sources = write(tmp_path, target=base, plus=other)
    assert fitting_rename(sources["target"], sources["plus"].tensors) is None
