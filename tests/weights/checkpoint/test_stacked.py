"""Layers of several checkpoints as one: which tensors, which configuration, and what names it."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import launch, load_checkpoint, near, tensors, write_checkpoint

from rvdist.core.config import OutputFormat
from rvdist.core.errors import BadInput
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge.plan import build_plan
from rvdist.weights import compat
from rvdist.weights.checkpoint.digest import checkpoint_digest
from rvdist.weights.checkpoint.elements import hold_the_same
from rvdist.weights.checkpoint.source import open_source

KINDS = ["full", "sliding", "full"]


@pytest.fixture
def stack(tmp_path):
    """`stack(slices, **changes)`: the path of a recipe of layers of `one` and `other`; `changes` to other's config."""

    def make(*slices, name="stack.yml", base=None, **changes):
        config = {"model_type": "qwen2", "hidden_size": 48, "num_hidden_layers": 3, "layer_types": KINDS}
        for model, own in (("one", config), ("other", config | changes)):
            if not (tmp_path / model).exists():
                weights = tensors(0) if model == "one" else near(tensors(0), 5)
                write_checkpoint(tmp_path / model, weights, shards=2, config=own)
        listed = [{"sources": [{"model": str(tmp_path / model), "layer_range": list(span)}]} for model, *span in slices]
        recipe = {"merge_method": "passthrough", "slices": listed}
        (tmp_path / name).write_text(json.dumps(recipe | ({"base_model": str(tmp_path / base)} if base else {})))
        return tmp_path / name

    return make


def test_layers_are_renumbered_and_what_is_outside_comes_from_the_ends(stack, tmp_path):
    opened = open_source(str(stack(("one", 0, 2), ("other", 1, 3), ("one", 2, 3))))
    one, other = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "other")
    found = dict(read(opened))
    up = "model.layers.{}.mlp.up_proj.weight"
    layers = [(one, 0), (one, 1), (other, 1), (other, 2), (one, 2)]
    assert sum(up.partition("{}")[2] in name for name in found) == len(layers)
    assert all(torch.equal(found[up.format(k)], whole[up.format(layer)]) for k, (whole, layer) in enumerate(layers))
    first = dict(read(open_source(str(stack(("one", 0, 1), ("other", 0, 1), name="ends.yml")))))
    assert torch.equal(first["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(first["model.norm.weight"], other["model.norm.weight"])
    assert opened.config["num_hidden_layers"] == 5
    assert opened.config["layer_types"] == ["full", "sliding", "sliding", "full", "full"]


def read(checkpoint):
    from rvdist.weights.reader import PointReader

    reader = PointReader([WeightPoint("s")], {"s": checkpoint})
    for name, spec in checkpoint.tensors.items():
        parts = [chunk.clone() for _, (chunk,) in reader.chunks(name, 0, spec.numel)]
        yield name, torch.cat(parts).view(spec.shape)
    reader.close()


def test_the_order_of_layers_is_part_of_what_names_it(stack, tmp_path):
    """Two stacks of the same files have other digests, other plans, and are not taken for the same."""
    one, other = (
        open_source(str(stack(*spans, name=name)))
        for name, spans in (("a.yml", [("one", 0, 3)]), ("b.yml", [("one", 2, 3), ("one", 1, 2), ("one", 0, 1)]))
    )
    assert sorted(one.files) == sorted(other.files) and one.config == other.config
    assert checkpoint_digest(one) != checkpoint_digest(other)
    assert not hold_the_same(one, other) and hold_the_same(one, one)
    plans = [
        build_plan({tmp_path / "out": WeightPoint("s")}, {"s": source}, OutputFormat()).digests
        for source in (one, other)
    ]
    assert plans[0] != plans[1]


def test_a_vector_applies_to_a_stack(stack, tmp_path):
    """What the layers beyond the vector's own are is said."""
    point = WeightPoint("s", (Term(1.0, Vector("p", "m")),))
    opened = open_source(str(stack(("one", 0, 3), ("other", 0, 3))))
    donors = {"p": open_source(str(tmp_path / "other")), "m": open_source(str(tmp_path / "one"))}
    report = compat.check(point, {"s": opened} | donors, force=True)
    assert any(
        said.startswith("stack.yml stacks layers 0 to 2 of one, then 0 to 2 of other") for said in report.exceptions
    )
    assert any("the vector lacks" in said for said in report.exceptions)


def test_what_does_not_fit_together_is_refused(stack, tmp_path):
    path = stack(("one", 0, 2), ("other", 1, 3), hidden_size=50)
    opened = open_source(str(path))
    with pytest.raises(BadInput, match="other: its config has hidden_size=50 where the target has"):
        compat.check(WeightPoint("s"), {"s": opened})
    with pytest.raises(BadInput, match=r"stack.yml: layer_range \[1, 4\] is wanted of .*other, which has 3 layers"):
        open_source(str(stack(("one", 0, 2), ("other", 1, 4))))
    recipe = json.loads(path.read_text())
    recipe["slices"][0]["sources"][0]["model"] = str(path)
    path.write_text(json.dumps(recipe))
    with pytest.raises(BadInput, match="stacks layers of .*stack.yml, a recipe itself"):
        open_source(str(path))
    (tmp_path / "linear.yml").write_text(json.dumps({"merge_method": "linear", "models": []}))
    with pytest.raises(
        BadInput, match="linear.yml: merge_method is linear, and only a recipe of passthrough is a check"
    ):
        open_source(str(tmp_path / "linear.yml"))


def test_a_configuration_that_does_not_count_its_layers_is_refused(stack, tmp_path):
    path = stack(("one", 0, 2), ("other", 1, 3), base="other", num_hidden_layers=7)
    with pytest.raises(BadInput, match=r"other/config.json: counts no 3 layers under num_hidden_layers"):
        open_source(str(path))


def test_what_is_stacked_is_not_overwritten(stack, tmp_path):
    from rvdist.core.config import Config
    from rvdist.stages.prepare import require_no_source

    opened = open_source(str(stack(("one", 0, 2), ("other", 1, 3))))
    with pytest.raises(BadInput, match="other is or holds the source"):
        require_no_source(Config(overwrite=True), [Path(tmp_path / "other")], {"s": opened})


@pytest.mark.heavy
def test_the_card_of_a_stack_says_the_licences_of_its_models(stack, tmp_path):
    recipe = stack(("one", 0, 2), ("other", 1, 3))
    for model, licence in (("one", "mit"), ("other", "apache-2.0")):
        (tmp_path / model / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    done = launch(f"recipe={recipe}", "output=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: other\n" in card
    assert "| one | in stack.yml |  | mit |" in card
    assert "| other | in stack.yml |  | apache-2.0 |" in card
    assert str(tmp_path) not in card
