import json
import math

import numpy as np
import pytest
import torch

from rvdist.core.point import Mask, Term, Vector, WeightPoint, layer_of
from rvdist.core.vocabulary import Vocabulary

POINT = WeightPoint(
    "t", (Term(0.5, Vector("p", "m"), Mask(("a.*",), (r".*bias",), ((0, 3),))), Term(-1.0, Vector("q", "m")))
)


def test_layer_is_the_first_number_in_the_name():
    assert layer_of("model.layers.12.experts.3.w1") == 12
    assert layer_of("model.embed_tokens.weight") is None
    assert layer_of("h.0.attn2.c_attn") == 0


def test_mask_matches_whole_names_and_inclusive_layers():
    mask = Mask(include=(r".*proj.*",), exclude=(r".*up_proj.*",), layers=((1, 2),))
    assert mask.coefficient("layers.1.q_proj.weight", 4) == 1
    assert mask.coefficient("layers.2.q_proj.weight", 4) == 1
    assert mask.coefficient("layers.3.q_proj.weight", 4) == 0
    assert mask.coefficient("layers.1.up_proj.weight", 4) == 0
    assert mask.coefficient("proj", 4) == 0, "a tensor of no layer is outside every layer range"
    assert Mask(include=("embed",)).coefficient("model.embed", 4) == 0, "a pattern matches the whole name"
    assert Mask().coefficient("anything", 4) == 1


def test_a_list_over_depth_is_interpolated_from_the_first_layer_to_the_last():
    mask = Mask(depth=(0.0, 1.0, 0.5), exclude=("layers.3.*",))
    found = [mask.coefficient(f"layers.{layer}.w", 5) for layer in range(5)]
    assert found == [0.0, 0.5, 1.0, 0.0, 0.5]
    assert mask.coefficient("embed", 5) == 1, "a tensor of no layer is left alone"
    assert Mask(depth=(0.3,)).coefficient("layers.4.w", 5) == 0.3
    assert Mask(depth=(0.3, 1.0)).coefficient("layers.0.w", 1) == 0.3
    with pytest.raises(ValueError, match="nan"):
        Mask(depth=(float("nan"),))


@pytest.mark.parametrize("bad", [{"include": ("(",)}, {"layers": ((3, 1),)}, {"layers": ((-1, 1),)}])
def test_bad_masks_are_refused(bad):
    with pytest.raises(ValueError, match="mask"):
        Mask(**bad)


def test_alpha_may_be_a_scalar_of_another_library():
    for alpha in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        point = WeightPoint("b", (Term(alpha, Vector("p", "m")),))
        assert type(point.terms[0].alpha) is float
        assert point == WeightPoint.from_json(json.loads(json.dumps(point.to_json())))


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_must_be_finite(alpha):
    with pytest.raises(ValueError, match="finite"):
        Term(alpha, Vector("p", "m"))


def test_json_round_trip_and_sources():
    assert WeightPoint.from_json(POINT.to_json()) == POINT
    assert list(POINT.sources()) == ["t", "p", "m", "q"]
    moved = POINT.relocate({s: f"/x/{s}" for s in POINT.sources()})
    assert list(moved.sources()) == ["/x/t", "/x/p", "/x/m", "/x/q"]
    assert moved.terms[0].mask == POINT.terms[0].mask


def test_digest_follows_contents_not_paths():
    contents = {"t": "1", "p": "2", "m": "3", "q": "4"}
    moved = POINT.relocate({s: f"/x/{s}" for s in POINT.sources()})
    assert POINT.digest(contents) == moved.digest({f"/x/{s}": d for s, d in contents.items()})
    assert POINT.digest(contents) != POINT.digest(contents | {"q": "5"})
    reversed_terms = WeightPoint("t", POINT.terms[::-1])
    assert POINT.digest(contents) != reversed_terms.digest(contents), "terms are rounded in listed order"


def test_alpha_zero_is_the_base_itself():
    still = WeightPoint("t", (Term(0.0, Vector("p", "m")),))
    contents = {"t": "1", "p": "2", "m": "3"}
    assert still.digest(contents) == WeightPoint("t").digest(contents)


def test_a_density_stands_beside_each_term_of_the_recipe_even_where_a_coefficient_vanishes():
    """α·m may be 0 though neither is."""
    gone = Term(1e-200, Vector("a"), Mask(depth=(1e-200,)), density=(0.5,))
    kept = Term(1.0, Vector("b"), density=(0.25,))
    made = WeightPoint("base", (gone, kept))
    assert [vector.plus for _, vector in made.recipe("layers.0.x", 1, lambda source: True)] == ["b"]
    assert made.densities("layers.0.x", 1, lambda source: True) == (0.25,)


def test_a_vocabulary_s_own_words_are_no_models():
    """Though models may be called as they are."""
    models = {"base": "/a", "union": "/b"}
    for own in models:
        assert Vocabulary(own, tuple(models)).relocate(models) == Vocabulary(own, ("/a", "/b"))
    assert Vocabulary("other", ("base",)).relocate(models | {"other": "/c"}).source == "/c"
