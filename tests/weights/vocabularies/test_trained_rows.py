"""Adapters that bring rows of new tokens, under tokenizer=union: what peft made of them, recorded, is what a merge
writes, to the bit; and the recording is what peft makes, where that is installed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from adapters import write_adapter
from alone import planned, write
from checkpoints import load_checkpoint
from points import read_point
from safetensors.torch import load_file, save_file
from trained_rows import EMBEDDING, HEAD, KINDS, RECORDED, train, write_base, write_tokenizer

from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.core.vocabulary import Vocabulary
from rvdist.weights import compat

WHOLE = json.loads(RECORDED.read_text())
REFUSED = {
    "whole, a copy of what is tied": "adapts lm_head, which .* ties to its embedding",
    "other rows of both, tied": "adapts lm_head, which .* ties to its embedding",
    "rows alone, untied": f"has a row of {EMBEDDING} for token '<new>', and neither .* has one of {HEAD}; save it",
    "the last new row alone": f"has row 14 of {EMBEDDING}, and neither it nor .*base has row 13; save it again",
    "rows beside factors of the head": f"is an adapter that has no whole rows of {HEAD}, .*merge_and_unload",
}


def recorded(kind, place):
    """The base and the adapter of the recording; and the point of both with the tokens of both."""
    write_base(place / "base", kind)
    (place / "adapter").mkdir()
    stored = {name: torch.tensor(values) for name, values in WHOLE[kind]["stored"].items()}
    save_file(stored, place / "adapter/adapter_model.safetensors", {"format": "pt"})
    (place / "adapter/adapter_config.json").write_text(json.dumps(WHOLE[kind]["config"]))
    write_tokenizer(place / "base", place / "adapter")
    names = (str(place / "base"), str(place / "adapter"))
    return WeightPoint(names[0], (Term(1.0, Vector(names[1])),), vocabulary=Vocabulary("union", names))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in REFUSED])
def test_what_is_written_is_what_peft_merged(tmp_path, kind):
    point = recorded(kind, tmp_path)
    write({tmp_path / "out": point})
    found = load_checkpoint(tmp_path / "out")
    merged = {name: torch.tensor(values) for name, values in WHOLE[kind]["merged"].items()}
    assert found.keys() == merged.keys() and (HEAD in found) != KINDS[kind].tied
    for name, tensor in merged.items():
        expected = tensor[:15] if name in (EMBEDDING, HEAD) else tensor
        assert found[name].dtype == torch.float32 and torch.equal(found[name], expected), name
    assert all(torch.equal(found[name], tensor) for name, tensor in read_point(point))
    before = load_checkpoint(tmp_path / "base")
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    _, sources = planned({tmp_path / "again": point})
    assert not any("skipped" in said for said in compat.check(point, sources).exceptions)


@pytest.mark.parametrize("alpha", [-1.0, 0.5])
@pytest.mark.parametrize("kind", ["whole, untied", "whole, tied as one", "a new row and an old one", "rows, padded"])
def test_rows_that_both_have_go_a_part_of_the_way_and_new_ones_are_the_adapter_s(tmp_path, kind, alpha):
    point = recorded(kind, tmp_path)
    write(
        {tmp_path / "out": WeightPoint(point.base, (Term(alpha, point.terms[0].vector),), vocabulary=point.vocabulary)}
    )
    found, before = load_checkpoint(tmp_path / "out")[EMBEDDING], load_checkpoint(tmp_path / "base")[EMBEDDING]
    trained = torch.tensor(WHOLE[kind]["merged"][EMBEDDING])
    assert torch.equal(found, torch.cat([before + alpha * (trained[:13] - before), trained[13:15]]))


@pytest.mark.parametrize("kind", ["rows, tied", "rows, untied", "rows of both"])
def test_a_base_that_was_resized_gets_them_without_another_vocabulary(tmp_path, kind):
    """Where the target has the rows already, and its tokenizer the tokens."""
    point = recorded(kind, tmp_path)
    stored = load_file(tmp_path / "base/model.safetensors")
    for name in {EMBEDDING, HEAD} & stored.keys():
        stored[name] = torch.cat([stored[name], torch.full((2, 4), 9.0)])
    save_file(stored, tmp_path / "base/model.safetensors")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"vocab_size": 15}))
    write_tokenizer(tmp_path / "base", tmp_path / "base")
    write({tmp_path / "out": WeightPoint(point.base, point.terms)})
    found = load_checkpoint(tmp_path / "out")
    assert all(torch.equal(found[name], torch.tensor(own)) for name, own in WHOLE[kind]["merged"].items())


@pytest.mark.parametrize("kind", ["rows that a base has to spare", "rows alone, tied"])
def test_what_it_was_trained_on_may_be_another_than_the_target(tmp_path, kind):
    """Rows that were not trained are no difference from minus, whatever the target has there."""
    point = recorded(kind, tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "target")
    stored = load_file(tmp_path / "base/model.safetensors")
    save_file({name: tensor + 1 for name, tensor in stored.items()}, tmp_path / "target/model.safetensors")
    names = str(tmp_path / "target"), point.terms[0].vector.plus, point.base
    vector = Vector(names[1], names[2])
    write({tmp_path / "out": WeightPoint(names[0], (Term(1.0, vector),), vocabulary=Vocabulary("union", names))})
    found = load_checkpoint(tmp_path / "out")[EMBEDDING]
    trained = torch.tensor(WHOLE[kind]["merged"][EMBEDDING])[:15]
    assert torch.equal(found, torch.cat([trained[:13] + 1, trained[13:]]))


def test_of_two_adapters_with_the_same_new_tokens_each_moves_them_to_its_own(tmp_path):
    """The row that both start from is the mean of theirs."""
    point = recorded("rows, tied", tmp_path)
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    file = tmp_path / "other/adapter_model.safetensors"
    save_file({n: t + 2 * n.endswith("_delta") for n, t in load_file(file).items()}, file)
    names = (*point.sources(), str(tmp_path / "other"))
    terms = (Term(0.5, Vector(names[1])), Term(0.25, Vector(names[2])))
    write({tmp_path / "out": WeightPoint(names[0], terms, vocabulary=Vocabulary("union", names))})
    trained = torch.tensor(WHOLE["rows, tied"]["merged"][EMBEDDING])
    expected = torch.cat([trained[:13], trained[13:] + 1 - 0.5 + 0.25])
    assert torch.equal(load_checkpoint(tmp_path / "out")[EMBEDDING], expected)


def test_an_adapter_that_needs_its_base_and_has_no_rows_is_added_as_without_the_key(tmp_path):
    """DoRA of a layer, beside a donor that brings tokens."""
    recorded("rows, tied", tmp_path)
    factors = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(6, 2) / 4}
    factors["lora_magnitude_vector"] = torch.arange(1.0, 7)
    dora = tmp_path / "dora"
    dora.mkdir()
    prefix = "base_model.model.model.layers.0.mlp.up_proj."
    save_file({prefix + name: tensor for name, tensor in factors.items()}, dora / "adapter_model.safetensors")
    (dora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": true}')
    names = str(tmp_path / "base"), str(tmp_path / "adapter"), str(dora)
    terms = Term(0.0, Vector(names[1])), Term(1.0, Vector(names[2]))
    write({tmp_path / "out": WeightPoint(names[0], terms, vocabulary=Vocabulary("union", names))})
    write({tmp_path / "plain": WeightPoint(names[0], terms[1:])})
    found, plain = load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "plain")
    assert found[EMBEDDING].shape[0] == 15
    assert {name for name in plain if not torch.equal(found[name], plain[name])} == {EMBEDDING}
    assert not torch.equal(plain[up := "model.layers.0.mlp.up_proj.weight"], load_checkpoint(tmp_path / "base")[up])


def spare_rows(place, config, tensors):
    """A base with three rows to spare, and an adapter whose tokenizer has tokens for two of them."""
    kind = "rows that a base has to spare"
    write_base(place / "base", kind)
    prefix = "base_model.model."
    write_adapter(place / "adapter", {prefix + name: tensor for name, tensor in tensors.items()}, r=2, **config)
    write_tokenizer(place / "base", place / "adapter")
    names = (str(place / "base"), str(place / "adapter"))
    return WeightPoint(names[0], (Term(1.0, Vector(names[1])),)), Vocabulary("union", names)


UP = {
    "model.layers.0.mlp.up_proj.lora_A.weight": torch.eye(2, 4),
    "model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(6, 2),
}
ADAPTS_EMBEDDING = {
    "model.embed_tokens.lora_embedding_A": torch.ones(2, 16), "model.embed_tokens.lora_embedding_B": torch.ones(4, 2)
}  # fmt: skip
TWO_ROWS = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 4)}
SPARE = {
    "rows": ({"trainable_token_indices": [3, 13]}, TWO_ROWS),
    "the whole": ({"modules_to_save": ["embed_tokens"]}, {EMBEDDING: torch.ones(16, 4)}),
    "factors": ({}, ADAPTS_EMBEDDING),
}


@pytest.mark.parametrize("kind", SPARE)
def test_rows_of_tokens_that_the_target_lacks_are_refused_with_a_way_out_that_works(tmp_path, kind):
    """Its tokenizer would make other ids of a prompt that has these tokens, and the rows were trained for nothing."""
    config, tensors = SPARE[kind]
    point, union = spare_rows(tmp_path, config, tensors | UP)
    new = "'<new>'" if kind == "rows" else "'<more>', '<new>'"
    said = rf"adapter: changes rows of {EMBEDDING} for tokens that the target's tokenizer lacks \({new}\).*union"
    with pytest.raises(BadInput, match=said) as refused:
        planned({tmp_path / "out": point})
    assert ("merge_and_unload" in str(refused.value)) == (kind == "factors")
    masked = WeightPoint(point.base, (Term(1.0, point.terms[0].vector, Mask(exclude=(EMBEDDING,))),))
    _, sources = planned({tmp_path / "out": masked})
    assert any("has 2 tokens that the target's lacks" in said for said in compat.check(masked, sources).exceptions)
    if kind != "factors":
        write({tmp_path / "out": replace(point, vocabulary=union)})
        assert load_checkpoint(tmp_path / "out")[EMBEDDING][13].tolist() == [1.0] * 4


def test_tokens_that_an_adapter_has_no_rows_for_are_a_note_and_others_ids_a_refusal(tmp_path):
    point, _ = spare_rows(tmp_path, {}, UP)
    _, sources = planned({tmp_path / "out": point})
    notes = compat.check(point, sources).exceptions
    assert any("beside adapter has 2 tokens that the target's lacks ('<more>', '<new>')" in said for said in notes)
    shutil.copy(tmp_path / "base/tokenizer.json", tmp_path / "adapter/tokenizer.json")
    assert not any("that the target" in said for said in compat.check(point, sources).exceptions)
    file = tmp_path / "adapter/tokenizer.json"
    file.write_text(file.read_text().replace('"<s>"', '"<t>"'))
    with pytest.raises(BadInput, match="adapter: its tokenizer differs from the target's .*compat.force=true"):
        compat.check(point, sources)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_says_why(tmp_path, kind):
    point = recorded(kind, tmp_path)
    with pytest.raises(BadInput, match=REFUSED[kind]):
        planned({tmp_path / "out": point})


@pytest.mark.parametrize(("kept", "said"), [("base", "stored as I8; store it as bf16"), ("adapter", "is stored as I8")])
def test_rows_that_are_no_floats_are_refused(tmp_path, kept, said):
    point = recorded("whole, untied", tmp_path)
    (file,) = (tmp_path / kept).glob("*.safetensors")
    own = EMBEDDING if kept == "base" else f"base_model.model.{EMBEDDING}"
    save_file({name: t.to(torch.int8) if name == own else t for name, t in load_file(file).items()}, file)
    with pytest.raises(BadInput, match=said):
        planned({tmp_path / "out": point})


@pytest.mark.parametrize("kind", KINDS)
def test_the_recording_is_what_peft_makes(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="peft, whose own merge is what is right here, cannot be imported")
    found = json.loads(json.dumps(train(kind, tmp_path)))
    assert found["merged"] == WHOLE[kind]["merged"] and found["stored"] == WHOLE[kind]["stored"]
    assert peft.__version__ != WHOLE[kind]["config"]["peft_version"] or found["config"] == WHOLE[kind]["config"]
