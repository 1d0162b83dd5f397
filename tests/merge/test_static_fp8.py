"""fp8 with a scale for each matrix, as Mistral 3 and AutoFP8 store it: against whole tensors, by one worker without
Ray; and what transformers makes of what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from alone import write, write_and_cut
from checkpoints import load_checkpoint, near, write_checkpoint
from fp8 import E4M3, quantize
from points import shifted
from safetensors.torch import save_file

from rvdist.core.errors import BadInput
from rvdist.core.point import WeightPoint
from rvdist.weights.checkpoint.source import open_source

ALPHA = 0.7
STILL = "model.layers.0.self_attn.o_proj.weight"  # in which donors agree
STACK = "model.layers.0.mlp.experts.gate_up_proj"
STYLES = {  # what follows a weight's name: its scale, and that of its activations; and what config.json says
    "mistral": ("_scale_inv", "activation_scale", {"activation_scheme": "static", "weight_block_size": None}),
    "autofp8, static": ("_scale", "input_scale", {"activation_scheme": "static", "ignored_layers": ["lm_head"]}),
    "autofp8, dynamic": ("_scale", None, {"activation_scheme": "dynamic"}),
}
BESIDE = {"model.layers.0.self_attn.k_scale": torch.tensor([0.25])}  # of the KV cache


def plain(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (40, 64), "model.norm.weight": (64,), STILL: (64, 48), STACK: (3, 40, 64)}
    shapes |= {"model.layers.0.self_attn.q_proj.weight": (72, 64), "model.layers.0.mlp.down_proj.weight": (64, 96)}
    return {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in shapes.items()}


def scaled(weights: dict[str, torch.Tensor], style: str) -> dict[str, torch.Tensor]:
    """All projections in fp8, in the style; scales of some dtypes and of the shapes that scalars are stored in."""
    suffix, activations, _ = STYLES[style]
    found = dict(weights)
    for k, (name, tensor) in enumerate(weights.items()):
        if "proj" not in name:
            continue
        found[name], scale = quantize(tensor, tuple(tensor.shape[-2:]))
        scale = scale.bfloat16() if k % 2 else scale
        found[name + suffix] = scale if tensor.dim() > 2 else scale.reshape([(), (1,), (1, 1)][k % 3])
        if activations:
            of_stack = f"{name}_{activations}", torch.rand(len(tensor))
            own = of_stack if tensor.dim() > 2 else (f"{name.removesuffix('weight')}{activations}", torch.rand(()))
            found[own[0]] = own[1]
    return found | BESIDE


def write_scaled(path: Path, weights: dict[str, torch.Tensor], style: str) -> Path:
    write_checkpoint(path, scaled(weights, style), shards=3)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", **STYLES[style][2]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def family(place: Path, style: str, *in_fp8: str) -> dict[str, Path]:
    base = plain(0)
    weights = {"target": base, "plus": near(base, 1), "minus": near(base, 2)}
    weights["plus"][STILL] = weights["minus"][STILL]
    weights["plus"][STACK][1] = weights["minus"][STACK][1]
    return {
        role: write_scaled(place / role, own, style) if role in in_fp8 else write_checkpoint(place / role, own)
        for role, own in weights.items()
    }


def numbers(path: Path, style: str) -> dict[str, torch.Tensor]:
    """The weights of one of them, in fp32."""
    stored, suffix = load_checkpoint(path), STYLES[style][0]
    found = {name: tensor for name, tensor in stored.items() if name in plain(0)}
    return {
        name: tensor.float() * of_matrices(stored[name + suffix]).float() if tensor.dtype == E4M3 else tensor.float()
        for name, tensor in found.items()
    }


def of_matrices(scale: torch.Tensor) -> torch.Tensor:
    return scale if scale.dim() > 2 else scale.reshape(())


def merged(paths: dict[str, Path], style: str) -> dict[str, torch.Tensor]:
    target, plus, minus = (numbers(path, style) for path in paths.values())
    return {name: target[name] + ALPHA * (plus[name] - minus[name]) for name in target}


@pytest.mark.parametrize("in_fp8", [("target",), ("target", "plus", "minus")])
@pytest.mark.parametrize("style", STYLES)
def test_a_scale_for_each_matrix_is_written_back(tmp_path, monkeypatch, style, in_fp8):
    paths = family(tmp_path, style, *in_fp8)
    write_and_cut(tmp_path, shifted(paths), monkeypatch)
    stored, found = load_checkpoint(paths["target"]), load_checkpoint(tmp_path / "out")
    assert found.keys() == stored.keys()
    before, expected, suffix, kept = numbers(paths["target"], style), dict(stored), STYLES[style][0], []
    for name, result in merged(paths, style).items():
        if stored[name].dtype != E4M3:
            expected[name] = result.bfloat16()
            continue
        scales = stored[name + suffix].clone()
        codes, several = stored[name].clone(), result.reshape(-1, *result.shape[-2:])
        for k, matrix in enumerate(several):
            at = k if result.dim() > 2 else ...
            if torch.equal(matrix, before[name][at]):
                kept.append((name, k))
                continue
            scales[at] = matrix.abs().max() / 448
            codes[at] = (matrix / of_matrices(scales[at]).float()).clamp(-448, 448).to(E4M3)
        expected[name], expected[name + suffix] = codes, scales
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
    assert sorted(kept) == [(STACK, 1), (STILL, 0)]


@pytest.mark.parametrize("style", STYLES)
def test_written_plain_it_has_neither_scales_nor_those_of_activations(tmp_path, style):
    paths = family(tmp_path, style, "target")
    write({tmp_path / "bf16": shifted(paths)}, dtype="BF16")
    found, expected = load_checkpoint(tmp_path / "bf16"), merged(paths, style)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.bfloat16()), name


@pytest.mark.parametrize("style", STYLES)
def test_no_vector_has_what_scales_activations(tmp_path, style):
    paths = family(tmp_path, style, "plus", "minus")
    write({tmp_path / "out": shifted(paths)})
    found, expected = load_checkpoint(tmp_path / "out"), merged(paths, style)
    assert found.keys() == expected.keys() == open_source(str(paths["plus"])).tensors.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.bfloat16()), name


@pytest.mark.parametrize("style", STYLES)
def test_what_no_vector_touches_is_the_same_bytes(tmp_path, style):
    paths = family(tmp_path, style, "target")
    still = shifted(paths | {"plus": paths["minus"]})
    for out, point in {"still": still, "alone": WeightPoint(still.base)}.items():
        write({tmp_path / out: point})
        stored, found = load_checkpoint(paths["target"]), load_checkpoint(tmp_path / out)
        assert found.keys() == stored.keys()
        for name, tensor in stored.items():
            assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
CODES = torch.ones(4, 4).to(E4M3)


@pytest.mark.parametrize(
    ("weights", "said", "reasons"),
    [
        ({"w": CODES}, STATIC, ["tensor w as F8_E4M3 without the tensor scales w_scale_inv"]),
        ({"w": CODES, "w_scale": torch.ones(4, 1)}, STATIC, ["w_scale of shape [4, 1]", "no weight_block_size"]),
        ({"w": CODES, "w_scale": torch.ones(2, 2)}, STATIC, ["w_scale of shape [2, 2]", "no weight_block_size"]),
        ({"w": CODES, "w_scale": torch.ones((), dtype=torch.int32)}, STATIC, ["dtype I32"]),
        ({"w": CODES, "w_scale": torch.ones(()), "w_scale_inv": torch.ones(())}, STATIC, ["both w_scale_inv and"]),
        ({"w": CODES[0].clone(), "w_scale": torch.ones(())}, STATIC, ["no scales for the whole matrices"]),
        ({"w": CODES.view(2, 2, 4), "w_scale": torch.ones(())}, STATIC, ["shape []", "[2, 2, 4]"]),
        ({"w": CODES.view(2, 2, 4), "w_scale_inv": torch.ones(2, 2, 1)}, STATIC, ["shape [2, 2, 1]"]),
        ({"w": CODES.to(torch.float8_e5m2), "w_scale": torch.ones(())}, STATIC, ["tensor w as F8_E5M2"]),
        ({"w": torch.ones(4, 4), "w_scale": torch.ones(())}, STATIC, ["has the scales w_scale, and w is F32"]),
        ({"w": CODES, "w_scale": torch.ones(())}, {"weight_block_size": None}, ["without the block scales"]),
        ({"w": CODES, "w_scale": torch.ones(())}, STATIC | {"quant_method": "modelopt"}, ["quantised by modelopt"]),
    ],
)
def test_what_is_scaled_otherwise_is_refused_by_name(tmp_path, weights, said, reasons):
    path = write_checkpoint(tmp_path / "m", weights, config={"quantization_config": said})
    with pytest.raises(BadInput) as error:
        open_source(str(path))
    sentence = str(error.value)
    assert "\n" not in sentence and "convert it to bfloat16" in sentence
    assert all(reason in sentence for reason in (str(path), *reasons)), sentence


def test_what_only_sounds_like_a_scale_of_activations_is_a_weight(tmp_path):
    """A vector of q_scale's, and an input_scale of what is not in fp8."""
    weights = plain(0) | {"model.q_scale": torch.rand(8), "model.router.input_scale": torch.rand(())}
    paths = {"target": write_scaled(tmp_path / "target", weights, "mistral")}
    paths |= {role: write_checkpoint(tmp_path / role, near(weights, k + 1)) for k, role in enumerate(("plus", "minus"))}
    write({tmp_path / "out": shifted(paths)}, dtype="BF16")
    found = load_checkpoint(tmp_path / "out")
    plus, minus = load_checkpoint(paths["plus"]), load_checkpoint(paths["minus"])
    for name in ("model.q_scale", "model.router.input_scale"):
        result = weights[name].double() + ALPHA * (plus[name].double() - minus[name].double())
        assert torch.equal(found[name], result.bfloat16()), name


@pytest.mark.heavy
def test_transformers_loads_mistral_3_as_it_is_written(tmp_path):
    """Where there is no card it makes bf16 of fp8: the same numbers as ours, and the same logits."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Ministral3Config, Ministral3ForCausalLM

    pytest.importorskip("accelerate", reason="accelerate, by which transformers loads fp8, is not installed")
    torch.manual_seed(0)
    config = Ministral3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model, paths = Ministral3ForCausalLM(config).bfloat16(), {}
    base = model.state_dict()
    for seed, role in enumerate(("target", "plus", "minus")):
        model.load_state_dict(near(base, seed))
        model.save_pretrained(tmp_path / role)
        paths[role] = tmp_path / role
    said = json.loads((paths["target"] / "config.json").read_text())
    said["quantization_config"] = STATIC | {"modules_to_not_convert": ["lm_head"]}
    weights = scaled(load_checkpoint(paths["target"]), "mistral")
    paths["target"] = write_checkpoint(tmp_path / "fp8", {k: v for k, v in weights.items() if k not in BESIDE})
    (paths["target"] / "config.json").write_text(json.dumps(said))
    write({tmp_path / "out": shifted(paths)})
    (tmp_path / "out/config.json").write_text(json.dumps(said))
    stored, ours = load_checkpoint(tmp_path / "out"), {}
    for name, tensor in stored.items():
        if tensor.dtype == E4M3:
            ours[name] = (tensor.float() * stored[f"{name}_scale_inv"].float()).bfloat16()
            assert not torch.equal(stored[name].view(torch.uint8), weights[name].view(torch.uint8))
        elif not name.endswith("_scale_inv") and not name.endswith("activation_scale"):
            ours[name] = tensor
    assert len(stored) == len(ours) + 2 * 14
    options = {"quantization_config": FineGrainedFP8Config(weight_block_size=None, dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, **options)
    for name, tensor in ours.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    save_file(ours, tmp_path / "target/model.safetensors", {"format": "pt"})
    expected, tokens = Ministral3ForCausalLM.from_pretrained(tmp_path / "target"), torch.arange(48).view(3, 16)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("block", [None, [32, 32]])
def test_what_is_not_finite_spoils_no_other_element(tmp_path, block):
    base = {"model.layers.0.self_attn.q_proj.weight": plain(0)["model.layers.0.self_attn.q_proj.weight"]}
    (name,) = base
    codes, scale = quantize(base[name], tuple(block or (72, 64)))
    before = codes.float() * (scale.repeat_interleave(32, 0)[:72].repeat_interleave(32, 1) if block else scale)
    codes.view(torch.uint8)[3, 5] = 127
    target = {name: codes, f"{name}_scale_inv": scale if block else scale.reshape(())}
    paths = {"target": tmp_path / "target", "plus": tmp_path / "plus", "minus": tmp_path / "minus"}
    write_checkpoint(paths["target"], target)
    config = json.loads((paths["target"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    (paths["target"] / "config.json").write_text(json.dumps(config))
    write_checkpoint(paths["plus"], {name: base[name] * 8})
    write_checkpoint(paths["minus"], base)
    write({tmp_path / "out": shifted(paths)}, allow_nonfinite=True)
    found = load_checkpoint(tmp_path / "out")
    scales = found[f"{name}_scale_inv"]
    result = found[name].float() * (scales.repeat_interleave(32, 0)[:72].repeat_interleave(32, 1) if block else scales)
    assert result.isnan().nonzero().tolist() == [[3, 5]]
    expected = before + ALPHA * ((base[name] * 8).float() - base[name].float())
    expected[3, 5] = result[3, 5] = 0
    assert (result - expected).abs().max() < 0.05 * expected.abs().max()
