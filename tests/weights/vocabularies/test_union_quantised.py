"""Bases that are quantised or layers of several models, under tokenizer=union: rows by token as a plain base's, all
else as without it, to the byte."""

import json

import pairs
import pytest
import torch
from alone import write
from checkpoints import launch, load_checkpoint
from fp8 import quantize
from safetensors.torch import load_file, save_file

from rvdist.core.errors import BadInput
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.core.vocabulary import Vocabulary
from rvdist.merge import plan as planning
from rvdist.weights.checkpoint.digest import checkpoint_digest
from rvdist.weights.checkpoint.remapped import Remapped
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.vocabulary import remap

BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def in_blocks(name, tensor):
    codes, scale = quantize(tensor, (2, 2))
    return {name: codes, f"{name}_scale_inv": scale}


def by_matrix(name, tensor):
    codes, scale = quantize(tensor, tuple(tensor.shape))
    stem = name.removesuffix("weight")
    return {name: codes, f"{name}_scale_inv": scale.reshape(()), f"{stem}activation_scale": torch.rand(())}


def by_row(name, tensor):
    scale = tensor.abs().amax(1, keepdim=True) / 127.5
    return {name: (tensor / scale).round().clamp(-128, 127).to(torch.int8), f"{name}_scale": scale}


def as_gpt_oss(name, tensor):
    if "proj" in name and name != EXPERTS:
        return {name: tensor}
    chance = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 256, (2, 4, 1, 16), dtype=torch.uint8, generator=chance)
    return {f"{name}_blocks": codes, f"{name}_scales": torch.full((2, 4, 1), 119, dtype=torch.uint8)}


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
FORMATS = {
    "fp8 in blocks": (in_blocks, {"quant_method": "fp8", "weight_block_size": [2, 2]}),
    "fp8 by matrix": (by_matrix, {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}),
    "int8 by row": (
        by_row,
        {
            "quant_method": "compressed-tensors", "format": "int-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT8}},
        },
    ),
    "mxfp4": (as_gpt_oss, {"quant_method": "mxfp4"}),
}  # fmt: skip


def family(where, form):
    """base and other, whose tokens differ, with experts, and weights by chance; quantised: the base so, in shards."""
    pairs.write("bpe", where)
    chance = torch.Generator().manual_seed(0)
    for model in ("base", "other"):
        weights = load_file(where / model / "model.safetensors") | {EXPERTS: torch.zeros(2, 32, 4)}
        for name, tensor in weights.items():
            if "proj" in name:
                weights[name] = torch.randn(tensor.shape, generator=chance) * 0.01
                if model == "base":
                    weights[name] += torch.arange(tensor.numel()).view(tensor.shape) % 3
        save_file(weights, where / model / "model.safetensors")
    quantised = where / "quantised"
    quantised.mkdir()
    for file in (where / "base").iterdir():
        (quantised / file.name).write_bytes(file.read_bytes())
    quantizer, said = FORMATS[form]
    stored = {}
    for name, tensor in load_file(where / "base/model.safetensors").items():
        of_stack = name == EXPERTS and form != "mxfp4"
        stored |= quantizer(name, tensor) if "proj" in name and not of_stack else {name: tensor}
    names = [*stored]
    (quantised / "model.safetensors").unlink()
    for k, own in enumerate((names[::2], names[1::2])):
        save_file({n: stored[n] for n in own}, quantised / f"model-0000{k + 1}-of-00002.safetensors", {"format": "pt"})
    said = json.loads((quantised / "config.json").read_text()) | {"quantization_config": said}
    (quantised / "config.json").write_text(json.dumps(said))
    index = {name: f"model-0000{k + 1}-of-00002.safetensors" for k in range(2) for name in names[k::2]}
    (quantised / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def point(base, plus, minus, source="union"):
    models = tuple(map(str, (base, plus, minus)))
    vocabulary = Vocabulary(source, models) if source else None
    return WeightPoint(models[0], (Term(0.5, Vector(*models[1:])),), vocabulary=vocabulary)


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [None, "BF16"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_quantised_base_has_the_rows_of_a_plain_one_and_all_else_as_without(tmp_path, monkeypatch, form, dtype):
    family(tmp_path, form)
    base, other, plain = (tmp_path / name for name in ("quantised", "other", "base"))
    write({tmp_path / "out": point(base, other, plain)}, dtype)
    write({tmp_path / "rows": point(plain, other, plain)}, dtype)
    whole = load_file(other / "model.safetensors")  # the same donor, with the tokens of the base
    (tmp_path / "alike").mkdir()
    for file in plain.iterdir():
        (tmp_path / "alike" / file.name).write_bytes(file.read_bytes())
    own = {name: tensor for name, tensor in load_file(plain / "model.safetensors").items() if name in BY_TOKEN}
    save_file(whole | own, tmp_path / "alike/model.safetensors")
    write({tmp_path / "rest": point(base, tmp_path / "alike", plain, source=None)}, dtype)
    found, rows, rest = (load_checkpoint(tmp_path / name) for name in ("out", "rows", "rest"))
    assert found.keys() == rest.keys() and (len(found) > len(rows)) == (dtype is None)
    for name, tensor in found.items():
        expected = (rows if name in BY_TOKEN else rest)[name]
        assert tensor.dtype == expected.dtype and torch.equal(raw(tensor), raw(expected)), name
    assert len(found[BY_TOKEN[0]]) > len(load_checkpoint(base)[BY_TOKEN[0]])
    monkeypatch.setattr(planning, "UNIT_BYTES", 100)
    write({tmp_path / "cut": point(base, other, plain)}, dtype)
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()


def test_the_command_writes_it_with_its_config_and_goes_on_where_it_was(tmp_path):
    family(tmp_path, "fp8 by matrix")
    given = ("target=quantised", "vector.plus=other", "vector.minus=base", "tokenizer=union", "compat.force=true")
    done = launch(*given, "output=out", "cache.dir=c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config, before = (json.loads((tmp_path / at / "config.json").read_text()) for at in ("out", "quantised"))
    rows = len(load_checkpoint(tmp_path / "out")[BY_TOKEN[0]])
    assert config == before | {"vocab_size": rows}
    assert "already complete" in launch(*given, "output=out", "cache.dir=c", cwd=tmp_path).stdout


def test_it_is_scored_as_bf16_alone_and_nothing_is_written_otherwise(tmp_path):
    family(tmp_path, "fp8 by matrix")
    for model in ("quantised", "other", "base"):
        (tmp_path / model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    given = ("target=quantised", "vector.plus=other", "vector.minus=base", "tokenizer=union", "compat.force=true")
    done = launch(*given, "cache.dir=c", "benchmarks=pocket", cwd=tmp_path)
    assert (
        done.returncode == 2 and "is quantised, and engines serve plain weights; set dtype=bfloat16" in done.stderr
    ), done.stderr
    assert not (tmp_path / "c/bases").exists()


def test_a_quantised_embedding_is_refused_with_the_way_out(tmp_path):
    family(tmp_path, "fp8 in blocks")
    weights = load_checkpoint(tmp_path / "quantised")
    for file in (tmp_path / "quantised").glob("model*"):
        file.unlink()
    weights |= in_blocks(BY_TOKEN[0], weights[BY_TOKEN[0]])
    save_file(weights, tmp_path / "quantised/model.safetensors", {"format": "pt"})
    asked = point(tmp_path / "quantised", tmp_path / "other", tmp_path / "base")
    with pytest.raises(
        BadInput, match="embed_tokens.weight is quantised, and its rows are asked for; store it as bf16"
    ):
        remap(asked, {name: open_source(name) for name in asked.sources()}, open_source)


STACK = """
merge_method: passthrough
base_model: {base}
slices:
  - sources: [{{model: {base}, layer_range: [0, 1]}}]
  - sources: [{{model: {second}, layer_range: [0, 1]}}]
"""


def stack(where, second):
    """The recipe of a layer of base and one of `second`; twin is base with other weights."""
    if not (where / "twin").exists():
        pairs.write("bpe", where)
        (where / "twin").mkdir()
        for file in (where / "base").iterdir():
            (where / "twin" / file.name).write_bytes(file.read_bytes())
        weights = load_file(where / "base/model.safetensors")
        save_file({n: t + 1 if "proj" in n else t for n, t in weights.items()}, where / "twin/model.safetensors")
    (where / f"{second}.yml").write_text(STACK.format(base=where / "base", second=where / second))
    return where / f"{second}.yml"


def test_layers_of_several_models_have_the_rows_of_the_whole_that_they_make(tmp_path):
    stack(tmp_path, "twin")
    plain = ("vector.plus=base", "vector.minus=base", "alpha=0")
    union = ("vector.plus=other", "vector.minus=base", "tokenizer=union")
    for target, output, more in (("twin.yml", "whole", plain), ("twin.yml", "out", union), ("whole", "again", union)):
        given = (f"target={target}", f"output={output}", "cache.dir=c", "compat.force=true")
        done = launch(*given, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("stacks layers 0 to 0 of base, then 0 to 0 of twin" in done.stdout) == target.endswith("yml")
    found, again, whole = (load_checkpoint(tmp_path / name) for name in ("out", "again", "whole"))
    assert found.keys() == again.keys() == whole.keys() and any(".layers.1." in name for name in found)
    for name, tensor in again.items():
        assert torch.equal(raw(found[name]), raw(tensor)), name
    assert len(found[BY_TOKEN[0]]) > len(whole[BY_TOKEN[0]])
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "again" / file).read_text()


def test_which_layers_are_stacked_decides_the_digest(tmp_path):
    digests = set()
    for second in ("twin", "base"):
        asked = point(stack(tmp_path, second), tmp_path / "other", tmp_path / "base")
        sources = {name: open_source(name) for name in asked.sources()}
        remapped = remap(asked, sources, open_source)[asked.base]
        assert isinstance(remapped, Remapped)
        digests |= {checkpoint_digest(remapped), checkpoint_digest(sources[asked.base])}
    assert len(digests) == 4
