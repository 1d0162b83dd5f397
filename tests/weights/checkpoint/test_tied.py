import json

import pytest
import torch
from checkpoints import near, tensors, write_checkpoint
from points import read_point

from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights import compat
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.tied import is_tied

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_head(weights, head=None):
    return weights | {HEAD: (weights[EMBEDDING] if head is None else head).clone()}


def family(place, heads=(), config=None, head=None):
    """target, plus and minus, of which those in `heads` have a head in their files."""
    base = tensors(0)
    weights = {"target": base, "plus": near(base, 1), "minus": near(base, 2)}
    for name, own in weights.items():
        config = config or {"model_type": "tiny", "tie_word_embeddings": True}
        write_checkpoint(place / name, with_head(own, head) if name in heads else own, config=config)
    return WeightPoint(
        str(place / "target"), (Term(1.0, Vector(str(place / "plus"), str(place / "minus"))),)
    )  # fmt: skip


def check(point, **options):
    return compat.check(point, {source: open_source(source) for source in point.sources()}, **options)


@pytest.mark.parametrize("heads", [("target",), ("plus",), ("minus",), ("target", "plus", "minus")])
def test_an_equal_head_is_the_embedding(tmp_path, heads):
    point = family(tmp_path / "with", heads)
    plain = dict(read_point(family(tmp_path / "without")))
    found = dict(read_point(point))
    assert check(point).level == "identical"
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("differs", ["in the last element", "in its dtype", "in its shape"])
def test_another_head_under_a_tied_config_is_refused(tmp_path, differs):
    head = tensors(0)[EMBEDDING].clone()
    if differs == "in the last element":
        head[-1, -1] += 1
    head = {"in its dtype": head.float(), "in its shape": head[:-1].clone()}.get(differs, head)
    point = family(tmp_path / differs, ["target"], head=head)
    with pytest.raises(BadInput, match=rf"target: .*tie_word_embeddings=true, and {HEAD} differs .*set .* to false"):
        check(point)
    with pytest.raises(BadInput, match="target"):
        check(WeightPoint(point.base))


def test_an_untied_head_stays_a_tensor_of_its_own(tmp_path):
    point = family(tmp_path, ["target", "plus", "minus"], {"model_type": "tiny", "tie_word_embeddings": False})
    assert HEAD in open_source(point.base).tensors and HEAD in dict(read_point(point))


def test_levels_that_disagree_are_named(tmp_path):
    config = {"model_type": "tiny", "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}
    point = family(tmp_path, ["target"], config)
    with pytest.raises(BadInput, match="target: .*true in the top level and false in text_config.*make them agree"):
        check(point)
    said = check(family(tmp_path / "without", [], config)).exceptions
    assert any("true in the top level and false in text_config" in sentence for sentence in said)


def test_what_the_mask_leaves_out_need_not_be_in_both_donors_or_have_one_shape(tmp_path):
    base = tensors(0)
    plus = near(base, 1) | {"scalar": torch.ones(3).bfloat16()}
    minus = {name: tensor for name, tensor in near(base, 2).items() if name != "model.norm.weight"}
    for name, own in {"target": base, "plus": plus, "minus": minus}.items():
        write_checkpoint(tmp_path / name, own)
    vector = Vector(str(tmp_path / "plus"), str(tmp_path / "minus"))
    point = WeightPoint(str(tmp_path / "target"), (Term(1.0, vector, Mask(exclude=("scalar", "model.norm.weight"))),))
    check(point)
    found = dict(read_point(point))
    for name, tensor in base.items():
        if name in ("scalar", "model.norm.weight"):
            assert torch.equal(found[name], tensor)
        else:
            exact = tensor.double() + (plus[name].double() - minus[name].double())
            assert torch.allclose(found[name].double(), exact, atol=1e-3, rtol=8e-3)
    with pytest.raises(BadInput, match=r"minus: lacks tensor model.norm.weight.*vector.mask.exclude"):
        check(WeightPoint(point.base, (Term(1.0, vector),)))


def test_a_stored_vector_and_a_renamed_donor_have_no_second_head(tmp_path):
    from rvdist.weights.store import Storage, save

    point = family(tmp_path, ["plus", "minus"])
    (term,) = point.terms
    sources = {source: open_source(source) for source in term.vector.sources()}
    save(term.vector, sources, tmp_path / "v", Storage(), say=lambda text: None)
    assert HEAD not in open_source(str(tmp_path / "v")).tensors
    renamed = open_source(str(tmp_path / "plus"), [("^model", "language_model")])
    assert "language_model.embed_tokens.weight" in renamed.tensors and HEAD not in renamed.tensors


def test_a_shard_of_nothing_but_the_head_is_not_written(tmp_path):
    from rvdist.merge.plan import build_plan

    base = with_head(tensors(0))
    names = [HEAD, *(name for name in base if name != HEAD)]
    ordered = {name: base[name] for name in names}
    write_checkpoint(tmp_path / "target", ordered, shards=len(ordered), config={"tie_word_embeddings": True})
    source = open_source(str(tmp_path / "target"))
    plan = build_plan({tmp_path / "out": WeightPoint("target")}, {"target": source})
    (layout,) = plan.layouts
    assert HEAD not in layout.tensors and len(layout.files) == len(source.files) - 1


def saved(config, **changes):
    """What transformers writes of a configuration, less what `changes` leave out (...)."""
    said = json.loads(config.to_json_string()) | changes
    return {key: value for key, value in said.items() if value is not ...}


def test_real_configurations_tie_as_transformers_says():
    from transformers import Gemma3Config, LlamaConfig, Qwen2Config, Qwen2VLConfig

    gemma = saved(Gemma3Config())
    gemma.pop("tie_word_embeddings", None)
    gemma["text_config"].pop("tie_word_embeddings", None)
    assert is_tied(gemma) is True
    assert is_tied(saved(LlamaConfig(tie_word_embeddings=True))) is True
    assert is_tied(saved(LlamaConfig(), tie_word_embeddings=...)) is False
    assert is_tied(saved(Qwen2Config(tie_word_embeddings=True))) is True
    assert is_tied(saved(Qwen2VLConfig(tie_word_embeddings=True))) is True
    assert is_tied({"model_type": "gpt2"}) is True
    assert is_tied({"model_type": "nobody_knows"}) is False and is_tied({"model_type": ["llama"]}) is False


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_of_several_embeddings_it_is_the_one_that_is_called_alike(tmp_path, prefix):
    base = {f"{prefix}{name}": tensor for name, tensor in tensors(0).items()}
    more = {"audio.embed_tokens.weight": torch.ones(301, 48).bfloat16()}
    config = {"model_type": "tiny", "tie_word_embeddings": True}
    head = f"{prefix}{HEAD}"
    write_checkpoint(tmp_path / "m", more | base | {head: base[prefix + EMBEDDING].clone()}, config=config)
    assert head not in open_source(str(tmp_path / "m")).tensors
