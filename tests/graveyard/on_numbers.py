"""Situations of what tensors are stored as: dtypes side by side, buffers, fp8 and other quantisations, numbers that are
not finite; and of α."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fp8 import dequantized, quantize, written_back
from situations import (
    ALPHA,
    HIDDEN,
    ROLES,
    Asked,
    Refused,
    Right,
    Weights,
    ask,
    edit,
    llama,
    merged,
    siblings,
    situation,
    write,
    write_all,
)

from rvdist.core.config import MergeConfig
from rvdist.core.point import Term, Vector, WeightPoint

# --- dtypes and buffers


@situation(
    "buffers", "integer, boolean and empty buffers, and 0-dimensional tensors", "none found",
    right="the target's integers and booleans stay, floating-point scalars get the vector",
)  # fmt: skip
def buffers(place: Path) -> Asked:
    more = {
        "model.position_ids": torch.arange(64)[None],
        "model.bias_mask": torch.ones(4, 4).tril().bool(),
        "model.token_count": torch.tensor(17),
        "model.empty": torch.zeros(0, HIDDEN).bfloat16(),
        "model.logit_scale": torch.tensor(2.65).float(),
        "model.rotary_emb.inv_freq": 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8),
    }
    weights = siblings(llama() | more)
    weights["plus"]["model.position_ids"] = torch.arange(64)[None] + 1
    weights["minus"]["model.token_count"] = torch.tensor(3)
    write_all(place, weights)
    notes = [f"{name} is not floating-point" for name in ("model.position_ids", "model.bias_mask", "model.token_count")]
    return ask(place, Right(merged(weights), notes=notes), made_up=True)


@situation("dtypes", "fp64 throughout", "none found", right="fp64 arithmetic, to the bit")
def double_precision(place: Path) -> Asked:
    weights = siblings(llama(dtype=torch.float64))
    write_all(place, weights)
    return ask(place, Right(merged(weights)))


@situation("dtypes", "fp32 throughout", "arcee-ai/mergekit#214", right="fp64 arithmetic, rounded once, to the bit")
def single_precision(place: Path) -> Asked:
    weights = siblings(llama(dtype=torch.float32))
    write_all(place, weights)
    return ask(place, Right(merged(weights)))


@situation(
    "dtypes",
    "a bf16 target, fp32 and fp16 donors",
    "none found",
    right="each is widened exactly; one rounding, to bf16",
)
def mixed_dtypes(place: Path) -> Asked:
    weights = siblings(llama())
    weights["plus"] = {name: tensor.float() + 1e-5 for name, tensor in weights["plus"].items()}
    weights["minus"] = {name: tensor.half() for name, tensor in weights["minus"].items()}
    for role in ROLES:
        dtype = str(weights[role]["model.norm.weight"].dtype).removeprefix("torch.")
        write(place / role, weights[role], config={"torch_dtype": dtype})
    return ask(place, Right(merged(weights)))


@situation(
    "dtypes", "norms in fp32 among bf16 matrices", "none found", right="each tensor keeps the target's own dtype"
)
def norms_in_single_precision(place: Path) -> Asked:
    base = {name: tensor.float() if "norm" in name else tensor for name, tensor in llama().items()}
    weights = siblings(base)
    write_all(place, weights)
    return ask(place, Right(merged(weights)))


@situation("dtypes", "dtype=float16 of bf16 sources", "none found", right="one rounding, and config.json says float16")
def written_in_half_precision(place: Path) -> Asked:
    weights = siblings(llama())
    write_all(place, weights)
    wide = {role: {n: t.double() for n, t in own.items()} for role, own in weights.items()}
    out = {name: tensor.half() for name, tensor in merged(wide).items()}
    return ask(place, Right(out, config={"torch_dtype": "float16"}), dtype="float16")


@situation("dtypes", "complex numbers", "none found", right="the target's stay")
def complex_numbers(place: Path) -> Asked:
    freqs = {"model.freqs_cis": torch.polar(torch.ones(8), torch.arange(8).float())}
    base = llama()
    weights = {role: own | freqs for role, own in siblings(base).items()}
    write_all(place, weights)
    return ask(place, Right(merged(weights), notes=["model.freqs_cis is not floating-point"]), made_up=True)


# --- fp8 and other quantisations

BLOCK = (8, 8)
QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)
}  # fmt: skip


def in_fp8(weights: Weights, scales: bool = True) -> Weights:
    found = dict(weights)
    for name, tensor in weights.items():
        if "_proj" in name:
            found[name], scale = quantize(tensor, BLOCK)
            if scales:
                found[f"{name}_scale_inv"] = scale
    return found


@situation(
    "fp8", "raw fp8: F8_E4M3 without any scales", "kekzl/imp#1450", refused="names a tensor and the scales it lacks"
)
def fp8_without_scales(place: Path) -> Asked:
    weights = siblings(llama())
    weights["plus"] = in_fp8(weights["plus"], scales=False)
    write_all(place, weights)
    return ask(place, Refused([r"plus: stores tensor \S+_proj\S+ as F8_E4M3 without the block scales"]))


@situation(
    "fp8", "an fp8 target with block scales, as DeepSeek-V3's", "unslothai/unsloth#6978",
    right="dequantised; config.json says so no more",
)  # fmt: skip
def fp8_with_scales(place: Path) -> Asked:
    weights = siblings(llama())
    stored = in_fp8(weights["target"])
    write(place / "target", stored, config={"quantization_config": QUANTIZATION})
    for role in ("plus", "minus"):
        write(place / role, weights[role])
    read = {role: own if role != "target" else dequantized(stored, BLOCK) for role, own in weights.items()}
    wide = {role: {n: t.double() for n, t in own.items()} for role, own in read.items()}
    out = {name: tensor.bfloat16() for name, tensor in merged(wide).items()}
    return ask(place, Right(out, config={"quantization_config": ...}), dtype="bfloat16")


@situation("fp8", "the same without dtype=…", "none found", right="fp8 again; a block that stays is the same bytes")
def fp8_without_dtype(place: Path) -> Asked:
    weights = siblings(llama())
    stored = in_fp8(weights["target"])
    write(place / "target", stored, config={"quantization_config": QUANTIZATION})
    for role in ("plus", "minus"):
        write(place / role, weights[role])
    before, out = dequantized(stored, BLOCK), merged(weights)
    for name in [name for name in stored if f"{name}_scale_inv" in stored]:
        result = before[name] + ALPHA * (weights["plus"][name].float() - weights["minus"][name].float())
        scale = f"{name}_scale_inv"
        out[name], out[scale], _ = written_back(stored[name], stored[scale], result, before[name], BLOCK)
    return ask(place, Right(out))


@situation(
    "fp8", "config.json says quantised (fp8), and the weights are plain bf16", "vllm-project/vllm#37667",
    right="what is written is plain, and its config.json says so",
)  # fmt: skip
def config_quantised_weights_not(place: Path) -> Asked:
    weights = siblings(llama())
    write_all(place, weights, quantization_config=QUANTIZATION)
    return ask(place, Right(merged(weights), config={"quantization_config": ...}))


@situation(
    "fp8", "fp8 with one scale a tensor (weight_scale), as compressed-tensors stores it",
    "leejet/stable-diffusion.cpp#1898",
    refused="names a tensor and the block scales it lacks",
)  # fmt: skip
def fp8_with_one_scale(place: Path) -> Asked:
    weights = siblings(llama())
    for name in [name for name in weights["minus"] if "_proj" in name]:
        tensor = weights["minus"][name]
        scale = tensor.float().abs().max() / 448
        weights["minus"][name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        weights["minus"][f"{name}_scale"] = scale
    write_all(place, weights)
    return ask(place, Refused(["minus: ", "F8_E4M3 without the block scales"]))


@situation(
    "fp8", "scales of fp8 whose weights are bf16", "unslothai/unsloth#6200", refused="names a scale that scales nothing"
)
def scales_without_fp8(place: Path) -> Asked:
    weights = siblings(llama())
    scaled = in_fp8(weights["target"])
    weights["target"] |= {name: tensor for name, tensor in scaled.items() if name.endswith("_scale_inv")}
    write_all(place, weights)
    return ask(place, Refused(["target", "_scale_inv", "fp8"]))


@situation("fp8", "GPTQ: packed integers (qweight)", "arcee-ai/mergekit#75", refused="names a tensor, or the method")
def gptq(place: Path) -> Asked:
    weights = siblings(llama())
    at = "model.layers.0.self_attn.q_proj"
    weights["plus"] = {name: t for name, t in weights["plus"].items() if name != f"{at}.weight"} | {
        f"{at}.qweight": torch.zeros(2, HIDDEN, dtype=torch.int32), f"{at}.scales": torch.ones(1, HIDDEN).half()
    }  # fmt: skip
    write_all(place, weights)
    return ask(place, Refused(["plus: is quantised", "qweight|gptq"]))


@situation(
    "fp8", "bitsandbytes: 4-bit codes in U8 beside absmax and quant_map", "modelscope/ms-swift#3859",
    refused="names the method",
)  # fmt: skip
def bitsandbytes(place: Path) -> Asked:
    weights = siblings(llama())
    at = "model.layers.0.self_attn.q_proj.weight"
    packed = {
        at: torch.zeros(HIDDEN * HIDDEN // 2, 1, dtype=torch.uint8), f"{at}.absmax": torch.ones(4),
        f"{at}.quant_map": torch.linspace(-1, 1, 16),
    }  # fmt: skip
    weights["plus"] |= packed
    for role in ROLES:
        more = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}} if role == "plus" else {}
        write(place / role, weights[role], config=more)
    return ask(place, Refused(["plus: is quantised by bitsandbytes"]))


@situation(
    "fp8",
    "MXFP4 with 16 codes to a scale, where gpt-oss has 32",
    "vllm-project/vllm#51419",
    refused="names the method, a tensor and its shape",
)
def mxfp4(place: Path) -> Asked:
    weights = siblings(llama())
    at = "model.layers.0.mlp.experts.gate_up_proj"
    packed = {
        f"{at}_blocks": torch.zeros(4, 24, 1, 8, dtype=torch.uint8),
        f"{at}_scales": torch.zeros(4, 24, 1, dtype=torch.uint8),
    }
    for role in ROLES:
        write(place / role, weights[role] | packed, config={"quantization_config": {"quant_method": "mxfp4"}})
    return ask(place, Refused(["is quantised by mxfp4"]), made_up=True)


# --- numbers that are not finite


def alone(number: int) -> MergeConfig:
    """Settings of its own: what fails on the way is not merged together with others."""
    return MergeConfig(threads=1 + number)


def spoiled(place: Path, roles: tuple[str, ...], name: str, value: float) -> None:
    weights = siblings(llama())
    for role in roles:
        weights[role][name].view(-1)[3] = value
    write_all(place, weights)


UP = "model.layers.1.mlp.up_proj.weight"
SOURCE = "names the tensor and the source that holds it"


@situation("not finite", "a NaN in plus", "turboderp-org/exllamav2#623", refused=SOURCE)
def nan_in_plus(place: Path) -> Asked:
    spoiled(place, ("plus",), UP, float("nan"))
    return ask(place, Refused([UP, "plus"], underway=True), merge=alone(1))


@situation("not finite", "an infinity at one place of both donors", "turboderp-org/exllamav2#623", refused=SOURCE)
def infinity_in_both(place: Path) -> Asked:
    spoiled(place, ("plus", "minus"), UP, float("inf"))
    return ask(place, Refused([UP, "plus|minus"], underway=True), merge=alone(2))


@situation("not finite", "a NaN in the target", "huggingface/peft#1001", refused=SOURCE)
def nan_in_target(place: Path) -> Asked:
    spoiled(place, ("target",), UP, float("nan"))
    return ask(place, Refused([UP, "target"], underway=True), merge=alone(3))


@situation(
    "not finite", "finite weights, and an α that takes the result out of the dtype's range", "none found",
    refused="names a tensor, and advises a smaller α",
)  # fmt: skip
def alpha_too_large(place: Path) -> Asked:
    write_all(place, siblings(llama(dtype=torch.float16)), torch_dtype="float16")
    return ask(place, Refused([r"model\.\S+", "(?i)alpha|α"], underway=True), alpha=1e8, merge=alone(4))


# --- α


def zero_dimensional(place: Path, alpha: Any) -> Asked:
    weights = siblings(llama())
    write_all(place, weights)
    vector = Vector(str(place / "plus"), str(place / "minus"))
    asked = ask(place, Right(merged(weights)))
    return replace(asked, point=WeightPoint(str(place / "target"), (Term(alpha, vector),)))


@situation("alpha", "α as a 0-dimensional torch tensor, from Python", "none found", right="the number it holds")
def alpha_as_a_tensor(place: Path) -> Asked:
    return zero_dimensional(place, torch.tensor(ALPHA, dtype=torch.float64))


@situation("alpha", "α as a 0-dimensional NumPy array, from Python", "none found", right="the number it holds")
def alpha_as_a_numpy_scalar(place: Path) -> Asked:
    return zero_dimensional(place, np.array(ALPHA))


@situation("alpha", "α is negative", "none found", right="the vector is taken away")
def alpha_negative(place: Path) -> Asked:
    weights = siblings(llama())
    write_all(place, weights)
    return ask(place, Right(merged(weights, -1.0)), alpha=-1.0)


@situation("alpha", "α is 0", "none found", right="the target's own bytes")
def alpha_zero(place: Path) -> Asked:
    weights = siblings(llama())
    write_all(place, weights)
    return ask(place, Right(weights["target"]), alpha=0)


# --- configurations


def rope(place: Path, theta: float, spelled: str, *notes: str) -> Asked:
    weights = siblings(llama())
    new = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "bfloat16", "torch_dtype": ...}
    write(place / "target", weights["target"], config=new)
    old = {"rope_theta": theta, "rope_scaling": None}
    for role in ("plus", "minus"):
        own = old if spelled == "old" else new | {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
        write(place / role, weights[role], config=own)
    return ask(place, Right(merged(weights), notes=notes))


@situation(
    "configurations", "RoPE spelled by transformers 5 in the target (rope_parameters) and by 4 in the donors "
    "(rope_theta): equal", "vllm-project/vllm#28542", right="nothing is said",
)  # fmt: skip
def rope_equal(place: Path) -> Asked:
    return rope(place, 10000.0, "old")


@situation("configurations", "the same, unequal", "lyogavin/airllm#369", right="the difference is said")
def rope_unequal(place: Path) -> Asked:
    return rope(place, 500000.0, "old", "rope")


@situation("configurations", "unequal RoPE in one spelling", "lyogavin/airllm#369", right="the difference is said")
def rope_unequal_alike(place: Path) -> Asked:
    return rope(place, 500000.0, "new", "rope")


@situation(
    "configurations", "defaults left out of one config.json and written into another", "none found",
    right="nothing is said",
)  # fmt: skip
def defaults_left_out(place: Path) -> Asked:
    weights = siblings(llama())
    write_all(place, weights)
    edit(place / "target/config.json", attention_bias=False, mlp_bias=False, pretraining_tp=1, rope_theta=10000.0)
    edit(place / "plus/config.json", rope_theta=..., hidden_act=...)
    return ask(place, Right(merged(weights)))


@situation(
    "configurations",
    "no config.json in a donor",
    "arcee-ai/mergekit#197",
    right="applied; that nothing was compared is said",
)
def donor_without_a_config(place: Path) -> Asked:
    weights = siblings(llama())
    write_all(place, weights)
    (place / "minus/config.json").unlink()
    return ask(place, Right(merged(weights), notes=["minus has no config.json"]))
