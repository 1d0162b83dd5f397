"""Targets that compressed-tensors quantised, with its own code, and what is written in their format: against whole
tensors, a scale at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from alone import write, write_and_cut
from checkpoints import load_checkpoint, near, write_checkpoint
from points import shifted
from safetensors.torch import save_file

from rvdist.core.config import OutputFormat
from rvdist.core.errors import BadInput
from rvdist.core.point import WeightPoint
from rvdist.merge.plan import build_plan
from rvdist.weights.checkpoint.source import open_source

pytestmark = pytest.mark.heavy
SCHEMES = {  # format, bits, type, strategy, more
    "fp8, a scale a tensor": ("float-quantized", 8, "float", "tensor", {}),
    "fp8, a scale a row": ("float-quantized", 8, "float", "channel", {}),
    "fp8, a scale a block": ("float-quantized", 8, "float", "block", {"block_structure": [16, 32]}),
    "int8, a scale a row": ("int-quantized", 8, "int", "channel", {}),
    "int4 packed, a scale a group": ("pack-quantized", 4, "int", "group", {"group_size": 32}),
    "int4 packed, a scale a row": ("pack-quantized", 4, "int", "channel", {}),
    "int8 packed, a scale a group": ("pack-quantized", 8, "int", "group", {"group_size": 16}),
}
ALPHA = 0.7


def plain(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (40, 64), "model.norm.weight": (64,)}
    shapes |= {"model.layers.0.self_attn.q_proj.weight": (72, 64), "model.layers.0.mlp.down_proj.weight": (64, 96)}
    return {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in shapes.items()}


def grid(shape: torch.Size, strategy: str, more: dict) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if strategy == "block":
        return tuple(more["block_structure"])
    return {"tensor": tuple(shape), "channel": (1, shape[1]), "group": (1, more.get("group_size", 0))}[strategy]


def blocks(shape: torch.Size, block: tuple[int, int]):
    for i in range(-(-shape[0] // block[0])):
        for j in range(-(-shape[1] // block[1])):
            yield i, j, tuple(slice(k * size, (k + 1) * size) for k, size in zip((i, j), block, strict=True))


def scales_of(matrix: torch.Tensor, block: tuple[int, int], half: float) -> torch.Tensor:
    rows, columns = (-(-n // size) for n, size in zip(matrix.shape, block, strict=True))
    scales = torch.zeros(rows, columns)
    for i, j, at in blocks(matrix.shape, block):
        scales[i, j] = matrix[at].float().abs().max() / half
    return scales.bfloat16()


def write_compressed(path: Path, weights: dict[str, torch.Tensor], scheme: tuple) -> Path:
    """The projections as the package stores them."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    form, bits, kind, strategy, more = scheme
    said = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    compressor = BaseCompressor.get_value_from_registry(form)
    found = {}
    for name, tensor in weights.items():
        if "proj" not in name:
            found[name] = tensor
            continue
        scales = scales_of(tensor, grid(tensor.shape, strategy, more), half(kind, bits))
        scales = scales.reshape(1) if strategy == "tensor" else scales
        state = {"weight": tensor, "weight_scale": scales}
        given = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**said))
        stem = name.removesuffix("weight")
        found |= {f"{stem}{key}": value for key, value in compressor.compress(state, given).items()}
    write_checkpoint(path, {name: tensor.contiguous() for name, tensor in found.items()}, shards=2)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": said}},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def half(kind: str, bits: int) -> float:
    return 448.0 if kind == "float" else (2**bits - 1) / 2


def codes_of(weights: dict[str, torch.Tensor], stem: str, bits: int) -> torch.Tensor:
    """As numbers, by the package."""
    if f"{stem}weight" in weights:
        return weights[f"{stem}weight"].float()
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(weights[f"{stem}weight_shape"].tolist())
    return unpack_from_int32(weights[f"{stem}weight_packed"], bits, shape).float()


def family(place: Path, scheme: tuple) -> dict[str, Path]:
    base = plain(0)
    plus, minus = near(base, 1), near(base, 2)
    for name in base:
        if "proj" in name:  # donors agree in some rows and columns
            plus[name][:16] = minus[name][:16]
            plus[name][:, 32:64] = minus[name][:, 32:64]
    return {
        "target": write_compressed(place / "target", base, scheme),
        "plus": write_checkpoint(place / "plus", plus),
        "minus": write_checkpoint(place / "minus", minus),
    }


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_is_the_whole_tensors_result_in_the_targets_format(tmp_path, monkeypatch, name):
    form, bits, kind, strategy, more = scheme = SCHEMES[name]
    paths = family(tmp_path, scheme)
    write({tmp_path / "bf16": shifted(paths)}, dtype="BF16")
    write_and_cut(tmp_path, shifted(paths), monkeypatch)
    stored, found, wide = (load_checkpoint(path) for path in (paths["target"], tmp_path / "out", tmp_path / "bf16"))
    plus, minus = (load_checkpoint(paths[role]) for role in ("plus", "minus"))
    assert found.keys() == stored.keys() and wide.keys() == plus.keys()
    kept = 0
    for tensor in [tensor for tensor in plus if "proj" in tensor]:
        stem, block = tensor.removesuffix("weight"), grid(plus[tensor].shape, strategy, more)
        scales, codes = stored[f"{stem}weight_scale"].clone(), codes_of(stored, stem, bits)
        shaped = scales.view(-1, -(-codes.shape[1] // block[1]))
        wider = shaped.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        before = codes * wider[: codes.shape[0], : codes.shape[1]]
        result = before + ALPHA * (plus[tensor].float() - minus[tensor].float())
        assert torch.equal(wide[tensor], result.bfloat16())
        for i, j, at in blocks(codes.shape, block):
            if torch.equal(result[at], before[at]):
                kept += 1
                continue
            shaped[i, j] = result[at].abs().max() / half(kind, bits)
            scaled = result[at] / shaped[i, j].float()
            if kind == "float":
                codes[at] = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float()
            else:
                codes[at] = scaled.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.equal(codes_of(found, stem, bits), codes), tensor
        assert torch.equal(found[f"{stem}weight_scale"], scales), tensor
        if bits == 4 or form == "pack-quantized":
            assert torch.equal(found[f"{stem}weight_shape"], stored[f"{stem}weight_shape"])
    assert (kept > 0) == (strategy != "tensor")
    for tensor in ("model.embed_tokens.weight", "model.norm.weight"):
        assert found[tensor].dtype == torch.bfloat16 and not torch.equal(found[tensor], stored[tensor])


@pytest.mark.parametrize("name", SCHEMES)
def test_what_nothing_touches_is_the_same_bytes(tmp_path, name):
    paths = family(tmp_path, SCHEMES[name])
    still = shifted(paths | {"plus": paths["minus"]})
    write({tmp_path / "still": still})
    write({tmp_path / "out": WeightPoint(still.base)})
    for out in ("still", "out"):
        stored, found = load_checkpoint(paths["target"]), load_checkpoint(tmp_path / out)
        assert found.keys() == stored.keys()
        for tensor, value in stored.items():
            assert torch.equal(found[tensor].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), tensor


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"symmetric": False}, "asymmetric"),
        ({"num_bits": 3}, "3 bits"),
        ({"strategy": "tensor_group"}, "tensor_group"),
        ({"actorder": "group"}, "pack-quantized"),
        ({"group_size": 16}, "no scales for"),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path, change, said):
    path = write_compressed(tmp_path / "target", plain(0), SCHEMES["int4 packed, a scale a group"])
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=said) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value) and "convert it to bfloat16" in str(caught.value)


@pytest.mark.parametrize("key", ["transform_config", "sparsity_config"])
def test_weights_that_are_turned_or_thinned_beside_their_codes_are_refused(tmp_path, key):
    path = write_compressed(tmp_path / "target", plain(0), SCHEMES["int4 packed, a scale a group"])
    config = json.loads((path / "config.json").read_text())
    dense = {"format": "dense", "global_sparsity": 0.14, "ignore": [], "sparsity_structure": "unstructured"}
    for said in ({}, None, dense if key == "sparsity_config" else {}):
        (path / "config.json").write_text(with_said(config, {key: said}))
        open_source(str(path))
    for said in ({"config_groups": {"u": {"type": "hadamard"}}}, {"format": "sparse-24-bitmask"}):
        (path / "config.json").write_text(with_said(config, {key: said}))
        with pytest.raises(BadInput, match=key):
            open_source(str(path))


def with_said(config: dict, more: dict) -> str:
    return json.dumps(config | {"quantization_config": config["quantization_config"] | more})


def test_scales_of_activations_stay_with_the_codes_whatever_donors_have(tmp_path):
    own = {f"model.layers.0.self_attn.{name}": torch.tensor([0.0371]) for name in ("k_scale", "v_scale", "input_scale")}
    base, paths = plain(0), {}
    for k, role in enumerate(("target", "plus", "minus")):
        weights = near(base, k) | {name: value + k for name, value in own.items()}
        paths[role] = write_compressed(tmp_path / role, weights, SCHEMES["fp8, a scale a row"])
    write({tmp_path / "out": shifted(paths)})
    write({tmp_path / "bf16": shifted(paths)}, dtype="BF16")
    found, wide = load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "bf16")
    assert all(torch.equal(found[name], value) for name, value in own.items())
    assert wide.keys() == base.keys()


def test_integers_with_scales_that_no_config_explains_are_refused(tmp_path):
    path = write_compressed(tmp_path / "target", plain(0), SCHEMES["int8, a scale a row"])
    config = json.loads((path / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="weight_scale"):
        open_source(str(path))


def test_another_block_is_another_plan(tmp_path):
    paths = family(tmp_path, SCHEMES["fp8, a scale a row"])
    sources = {name: open_source(name) for name in shifted(paths).sources()}
    plans = [build_plan({tmp_path / "o": shifted(paths)}, sources, OutputFormat(dtype)) for dtype in (None, "BF16")]
    assert plans[0].digests != plans[1].digests


@pytest.mark.parametrize("name", SCHEMES)
def test_a_quantised_donor_of_a_plain_target(tmp_path, name):
    paths = family(tmp_path, SCHEMES[name])
    paths = {"target": paths["plus"], "plus": paths["target"], "minus": paths["minus"]}
    write({tmp_path / "out": shifted(paths)})
    write({tmp_path / "bf16": WeightPoint(str(paths["plus"]))}, dtype="F32")
    found, donor, target, minus = (
        load_checkpoint(path) for path in (tmp_path / "out", tmp_path / "bf16", paths["target"], paths["minus"])
    )
    for tensor, value in target.items():
        result = value.float() + ALPHA * (donor[tensor] - minus[tensor].float())
        assert torch.equal(found[tensor], result.bfloat16()), tensor


@pytest.mark.parametrize("dequantize", [True, False], ids=["made whole", "left compressed"])
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_loads_what_is_written_and_answers_as_the_dequantised_model(tmp_path, name, dequantize):
    """By the package itself: its logits are those of the same numbers in bf16, to the bit."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

    form, bits, _, strategy, more = scheme = SCHEMES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    base = load_checkpoint(tmp_path / "plain")
    paths = {role: write_checkpoint(tmp_path / role, near(base, k)) for k, role in enumerate(("plus", "minus"), 1)}
    paths["target"] = write_compressed(tmp_path / "target", base, scheme)
    write({tmp_path / "out": shifted(paths)})
    said = json.loads((tmp_path / "target/config.json").read_text())["quantization_config"]
    said["quantization_status"] = "compressed"
    said["config_groups"]["group_0"]["format"] = form  # where it is not what the package would choose itself
    whole = json.loads((tmp_path / "plain/config.json").read_text()) | {"quantization_config": said}
    (tmp_path / "out/config.json").write_text(json.dumps(whole))
    shutil.copy(tmp_path / "target/model.safetensors.index.json", tmp_path / "out")
    stored, numbers = load_checkpoint(tmp_path / "out"), {}
    for tensor, before in base.items():
        if "proj" not in tensor:
            numbers[tensor] = stored[tensor]
            continue
        stem, block = tensor.removesuffix("weight"), grid(before.shape, strategy, more)
        codes = codes_of(stored, stem, bits)
        scales = stored[f"{stem}weight_scale"].view(-1, -(-codes.shape[1] // block[1])).float()
        wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        numbers[tensor] = (codes * wide[: codes.shape[0], : codes.shape[1]]).bfloat16()
        assert not torch.equal(numbers[tensor], before)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=dequantize), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    save_file(numbers, tmp_path / "plain/model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    tokens = torch.arange(48).view(3, 16)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
