"""Adapters that bring rows of new tokens, under tokenizer=union: what peft made of them, recorded, is what a merge
writes, to the bit; and the recording is what peft makes, where that is installed."""

import json

import pytest
import torch
from alone import planned, write
from checkpoints import load_checkpoint
from safetensors.torch import load_file, save_file
from trained_rows import EMBEDDING, HEAD, KINDS, RECORDED, train, write_base, write_tokenizer

from rvdist.core.errors import BadInput
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.core.vocabulary import Vocabulary
from rvdist.weights import compat

WHOLE = json.loads(RECORDED.read_text())
REFUSED = {
    "whole, a copy of what is tied": "adapts lm_head, which .* ties to its embedding",
    "rows, untied": "it trained rows of an embedding that was resized before",
    "rows, tied": "it trained rows of an embedding that was resized before",
}


def recorded(kind, place):
    """The base and the adapter of the recording; and the point of both with the tokens of both."""
    write_base(place / "base", KINDS[kind][0])
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
    assert found.keys() == merged.keys() and (HEAD in found) != KINDS[kind][0]
    for name, tensor in merged.items():
        expected = tensor[:15] if name in (EMBEDDING, HEAD) else tensor
        assert found[name].dtype == torch.float32 and torch.equal(found[name], expected), name
    before = load_checkpoint(tmp_path / "base")
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    _, sources = planned({tmp_path / "again": point})
    assert not any("skipped" in said for said in compat.check(point, sources).exceptions)


@pytest.mark.parametrize("alpha", [-1.0, 0.5])
@pytest.mark.parametrize("kind", ["whole, untied", "whole, tied as one"])
def test_rows_that_both_have_go_a_part_of_the_way_and_new_ones_are_the_adapter_s(tmp_path, kind, alpha):
    point = recorded(kind, tmp_path)
    write(
        {tmp_path / "out": WeightPoint(point.base, (Term(alpha, point.terms[0].vector),), vocabulary=point.vocabulary)}
    )
    found, before = load_checkpoint(tmp_path / "out")[EMBEDDING], load_checkpoint(tmp_path / "base")[EMBEDDING]
    trained = torch.tensor(WHOLE[kind]["merged"][EMBEDDING])
    assert torch.equal(found, torch.cat([before + alpha * (trained[:13] - before), trained[13:]]))


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
