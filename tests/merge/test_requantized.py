"""Quantised targets, written back as they are stored: by one worker, without Ray, against whole tensors."""

from __future__ import annotations

import json

import pytest
import torch
from alone import write
from checkpoints import launch, load_checkpoint, near, tensors, write_checkpoint
from fp8 import BLOCK, dequantized, digests, quantized, weights_of, write_fp8, write_mixed, written_back
from points import shifted
from safetensors.torch import load_file, save_file

from rvdist.core.point import WeightPoint
from rvdist.merge import plan as planning


def requantized(paths, name, alpha, power_of_two=False):
    """Codes and scales of a tensor of the target, whole, and how many blocks stay."""
    stored = load_checkpoint(paths["target"])
    target, plus, minus = (weights_of(path)[name].float() for path in paths.values())
    result = target + alpha * (plus - minus)
    return written_back(stored[name], stored[f"{name}_scale_inv"], result, target, BLOCK, power_of_two)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("in_fp8", [("target",), ("target", "plus", "minus")])
def test_fp8_is_written_back_and_blocks_that_stay_are_the_same_bytes(tmp_path, in_fp8, power_of_two):
    paths = write_mixed(tmp_path, *in_fp8)
    for role in ("plus", "minus"):  # donors that agree in some blocks
        if role not in in_fp8:
            weights = load_checkpoint(paths[role])
            other = load_checkpoint(paths["minus"])
            for name, tensor in weights.items():
                if "proj" in name:
                    tensor[:32, 20:40] = other[name][:32, 20:40]
            for file in paths[role].glob("*.safetensors"):
                mine = {name: weights[name] for name in load_file(file)}
                save_file(mine, file, {"format": "pt"})
    if power_of_two:
        config = json.loads((paths["target"] / "config.json").read_text())
        config["quantization_config"]["scale_fmt"] = "ue8m0"
        (paths["target"] / "config.json").write_text(json.dumps(config))
    write({tmp_path / "out": shifted(paths)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "UNIT_BYTES", 1000)
        write({tmp_path / "cut": shifted(paths)})
    assert digests(tmp_path / "cut") == digests(tmp_path / "out")
    found, stored, kept = load_checkpoint(tmp_path / "out"), load_checkpoint(paths["target"]), 0
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            codes, scales, untouched = requantized(paths, name, 0.7, power_of_two=power_of_two)
            assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8)), name
            assert torch.equal(found[f"{name}_scale_inv"], scales), name
            kept += untouched
    assert (kept > 0) == (len(in_fp8) == 1)


def test_an_fp8_target_that_nothing_touches_is_the_same_bytes(tmp_path):
    paths = write_mixed(tmp_path, "target")
    write({tmp_path / "out": WeightPoint(str(paths["target"]))})
    write({tmp_path / "still": shifted(paths | {"plus": paths["minus"]})})
    for out in ("out", "still"):
        for name, tensor in load_checkpoint(paths["target"]).items():
            found = load_checkpoint(tmp_path / out)[name]
            assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def test_scales_for_which_their_dtype_has_no_room_are_neither_zero_nor_infinite(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    weights = quantized(tensors(0), BLOCK)
    weights |= {each: tensor.half() for each, tensor in weights.items() if each.endswith("_scale_inv")}
    values = {each: tensor.float() for each, tensor in dequantized(weights, BLOCK).items()}
    rest = 1e-6 * torch.randn(values[name].shape, generator=torch.Generator().manual_seed(0))
    donors = {"plus": values, "minus": values | {name: rest}, "huge": values | {name: values[name] + 1e9}}
    paths = {role: write_checkpoint(tmp_path / role, one) for role, one in donors.items()}
    paths["target"] = write_fp8(tmp_path / "target", weights, BLOCK)
    write({tmp_path / "small": shifted(paths, -1.0)})
    found = dequantized(load_checkpoint(tmp_path / "small"), BLOCK)[name]
    assert float((found - rest).abs().max()) < 1e-8 + 0.07 * float(rest.abs().max())
    told = ["target=target", "vector.plus=plus", "vector.minus=huge", "compat.force=true", "output=out"]
    done = launch(*told, cwd=tmp_path)
    assert done.returncode and f"tensor {name} would be infinite" in done.stderr and not (tmp_path / "out").exists()


def tiny_llama(place, seed, base=None):
    """A Llama of two layers in bf16, saved by transformers; near `base` if there is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.load_state_dict(near(model.state_dict(), seed))
    model.save_pretrained(place)
    return place


@pytest.mark.heavy
def test_transformers_loads_what_is_written_and_sees_the_same_numbers(tmp_path):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    pytest.importorskip("accelerate", reason="accelerate, by which transformers loads fp8, is not installed")
    paths = {role: tiny_llama(tmp_path / role, seed) for seed, role in enumerate(("target", "plus", "minus"))}
    weights = load_checkpoint(paths["target"])
    config = json.loads((paths["target"] / "config.json").read_text())
    paths["target"] = write_fp8(tmp_path / "fp8", quantized(weights, (32, 32)), (32, 32))
    quantization = json.loads((paths["target"] / "config.json").read_text())["quantization_config"]
    (paths["target"] / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    write({tmp_path / "out": shifted(paths)})
    (tmp_path / "out/config.json").write_bytes((paths["target"] / "config.json").read_bytes())
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    loaded, ours = model.state_dict(), dequantized(load_checkpoint(tmp_path / "out"), (32, 32))
    assert ours.keys() <= loaded.keys()
    for name, tensor in ours.items():
        assert torch.equal(loaded[name], tensor.bfloat16()), name
    save_file({name: tensor.bfloat16() for name, tensor in ours.items()}, tmp_path / "target/model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.bfloat16)
    with torch.no_grad():
        tokens = torch.arange(48).view(3, 16)
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    before = dequantized(load_checkpoint(paths["target"]), (32, 32))
    moved = [name for name in ours if "proj" in name and not torch.equal(ours[name], before[name])]
    assert len(moved) == 14
