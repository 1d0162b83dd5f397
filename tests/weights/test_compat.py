import json
import re

import pytest
import torch
from checkpoints import load_checkpoint, near, tensors, write_checkpoint

from rvdist.core.config import Config
from rvdist.core.errors import BadInput
from rvdist.core.method import MethodSpec
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.stages.prepare import Known
from rvdist.weights import compat, rows
from rvdist.weights.checkpoint.directory import open_checkpoint
from rvdist.weights.checkpoint.source import open_source


def check(paths, mask=None, **options):
    sources = {name: open_checkpoint(path) for name, path in paths.items()}
    return compat.check(
        WeightPoint("target", (Term(1.0, Vector("plus", "minus"), mask or Mask()),)), sources, **options
    )


def rewrite(path, change):
    weights = load_checkpoint(path)
    change(weights)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    write_checkpoint(path, weights)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_siblings_are_identical_in_structure_and_near(family):
    report = check(family())
    assert report.level == "identical" and report.exceptions == ()
    (distance,) = report.distances.values()
    assert 0.05 < distance < 0.5


def test_another_shape_in_one_donor(family):
    paths = family()
    rewrite(paths["plus"], lambda w: w.update({"model.norm.weight": torch.zeros(49).bfloat16()}))
    with pytest.raises(BadInput, match=r"tensor model.norm.weight has shape \[48\].*\[49\]"):
        check(paths)


@pytest.mark.parametrize("model", ["plus", "minus"])
def test_one_donor_under_the_names_of_a_compiled_model(family, model):
    """The rename that is named makes them one."""
    paths = family()

    def wrap(weights):
        for name in list(weights):
            weights[f"_orig_mod.{name}"] = weights.pop(name)

    rewrite(paths[model], wrap)
    with pytest.raises(BadInput, match="differ by a prefix: set vector.rename=") as refused:
        check(paths)
    pair = re.findall('"([^"]*)"', str(refused.value).partition("vector.rename=")[2])
    sources = {"target": open_checkpoint(paths["target"])}
    sources |= {name: open_source(str(paths[name]), [(pair[0], pair[1])]) for name in ("plus", "minus")}
    mask = Mask(exclude=(".*scalar",))  # which no prefix has before a dot
    report = compat.check(WeightPoint("target", (Term(1.0, Vector("plus", "minus"), mask),)), sources)
    assert not report.refusals
    assert all("scalar" in one for one in report.exceptions if "lacks" in one or "skipped" in one)


def test_a_donor_with_an_adapter_that_is_not_merged(family):
    """As verl saves what it trains by LoRA."""
    paths = family()

    def adapt(weights):
        for name in [name for name in weights if name.endswith("q_proj.weight")]:
            module = name.removesuffix(".weight")
            weights[f"{module}.base_layer.weight"] = weights.pop(name)
            weights[f"{module}.lora_A.default.weight"] = torch.zeros(2, 48)

    rewrite(paths["plus"], adapt)
    with pytest.raises(
        BadInput, match="lacks tensor .*; an adapter stands there beside what it adapts, .*lora_adapter"
    ):
        check(paths)


@pytest.mark.parametrize("model", ["target", "plus", "minus"])
def test_a_tensor_that_was_not_gathered(family, model):
    paths = family()
    rewrite(paths[model], lambda w: w.update({"model.norm.weight": torch.zeros(0).bfloat16()}))
    with pytest.raises(BadInput, match=rf"{model}: tensor model.norm.weight has no elements, .* zero_to_fp32.py"):
        check(paths)


def test_another_shape_in_the_target(family):
    paths = family()
    rewrite(paths["target"], lambda w: w.update({"model.norm.weight": torch.zeros(49).bfloat16()}))
    with pytest.raises(BadInput, match=r"target: tensor model.norm.weight has shape \[49\]"):
        check(paths)


def test_rows_that_a_method_cannot_see_whole(family, monkeypatch):
    paths = family()
    sources = {name: open_checkpoint(path) for name, path in paths.items()}
    fused = WeightPoint("target", (Term(1.0, Vector("plus", "target")),), MethodSpec("arcee_fusion"))
    assert compat.check(fused, sources).level == "identical"
    monkeypatch.setattr(rows, "LONGEST", 47)
    with pytest.raises(BadInput, match=r"target: tensor .* has rows of 48 elements, and arcee_fusion needs whole"):
        compat.check(fused, sources)
    with pytest.raises(BadInput, match="arcee_fusion needs whole"):
        Known().check(Config(), sources, fused)  # as the command asks
    rewrite(paths["plus"], lambda w: w.update({"model.norm.weight": torch.zeros(40).bfloat16()}))
    shorter = sources | {"plus": open_checkpoint(paths["plus"])}
    monkeypatch.setattr(rows, "LONGEST", 48)
    with pytest.raises(BadInput, match=r"tensor model.norm.weight has 40 elements where .* has 48, and arcee_fusion"):
        compat.check(fused, shorter, extra_rows=True)


def test_a_tensor_missing_from_one_donor(family):
    paths = family()
    rewrite(paths["minus"], lambda w: w.pop("scalar"))
    with pytest.raises(BadInput, match="minus: lacks tensor scalar, which .*plus has"):
        check(paths)


def test_a_vector_may_cover_a_part_and_says_what_it_skipped(family):
    paths = family()
    rewrite(paths["target"], lambda w: w.update({"visual.proj.weight": torch.ones(4, 4).bfloat16()}))
    for donor in ("plus", "minus"):
        rewrite(paths[donor], lambda w: w.update({"lm_head.weight": torch.ones(4, 4).bfloat16()}))
    report = check(paths)
    assert report.level == "applies with exceptions"
    assert any("lacks 1 of the target's tensors" in e and "visual.proj.weight" in e for e in report.exceptions)
    assert any("were skipped: lm_head.weight" in e for e in report.exceptions)


def test_nothing_in_common_and_an_empty_mask(family, tmp_path):
    paths = family()
    with pytest.raises(BadInput, match="leaves no tensor"):
        check(paths, Mask(include=("nothing",)))
    paths["target"] = write_checkpoint(tmp_path / "alien", {"other": torch.ones(3)})
    with pytest.raises(BadInput, match="no tensor in common"):
        check(paths)


def test_a_different_tokenizer_is_refused_and_force_overrides(family):
    paths = family()
    edit(paths["plus"] / "tokenizer.json", model={"vocab": {"a": 1, "b": 0}})
    with pytest.raises(BadInput, match=r"plus: its tokenizer differs.*token 'a' has id 1.*compat.force=true"):
        check(paths)
    assert check(paths, force=True).level == "refused"
    edit(paths["plus"] / "tokenizer.json", model={"vocab": {"a": 0, "c": 1}})
    with pytest.raises(BadInput, match="id 1 is token 'c' where the target has 'b'"):
        check(paths)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer.json", {"model": []}, "has no vocab"),
        ("tokenizer.json", {"model": {"vocab": [1, ["a", 0.0]]}}, "has an entry that is no"),
        ("tokenizer.json", {"model": {"vocab": {"a": [0]}}}, r"token 'a' has id \[0\], which is no row"),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": {"a": 1}}, "its added_tokens are no list"),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"content": []}]}, "an entry without content"),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"content": "a"}]}, "token 'a' has id None"),
        ("vocab.json", {"a": "b"}, "token 'a' has id 'b'"),
    ],
)
def test_a_damaged_tokenizer_is_one_sentence(family, file, content, reason):
    paths = family()
    (paths["plus"] / "tokenizer.json").unlink()
    (paths["plus"] / file).write_text(json.dumps(content))
    with pytest.raises(BadInput, match=f"plus/{file}: .*{reason}"):
        check(paths)


def test_added_tokens_and_missing_tokenizers_are_noted(family):
    paths = family()
    edit(paths["plus"] / "tokenizer.json", added_tokens=[{"id": 2, "content": "<eos>"}, {"id": 3, "content": "<x>"}])
    (paths["minus"] / "tokenizer.json").unlink()
    report = check(paths)
    more = (
        "plus has 1 tokens that the target lacks ('<x>'), and so does the output's tokenizer; tokenizer=union gives it"
    )
    assert any(more in e for e in report.exceptions)
    assert any("minus has no tokenizer.json" in e for e in report.exceptions)


def test_config_fields_that_change_the_forward_pass(family):
    paths = family()
    edit(paths["plus"] / "config.json", rope_theta=1e6)
    edit(paths["target"] / "config.json", rope_theta=1e4)
    assert any("rope_theta is 10000.0 in the target" in e for e in check(paths).exceptions)
    edit(paths["plus"] / "config.json", model_type="other")
    with pytest.raises(BadInput, match="model_type=other where the target has tiny"):
        check(paths)


def test_a_vector_of_another_pre_training_is_refused_with_a_number(family, tmp_path):
    paths = family()
    stranger = tensors(77)
    paths["plus"] = write_checkpoint(tmp_path / "p2", near(stranger, 1))
    paths["minus"] = write_checkpoint(tmp_path / "m2", near(stranger, 2))
    with pytest.raises(BadInput, match=r"not from the same pre-training.*distance is 1\.4"):
        check(paths)
