"""A mixture's experts in each layout that checkpoints have them in, made and taken apart here."""

from __future__ import annotations

import torch
from fp8 import quantize

E, HIDDEN, INNER = 3, 10, 7
PLAIN = ("gate_proj", "w1", "fused")
BIASED = ("gate_proj", "interleaved")
CALLED = {
    "w1": {"gate": "w1", "up": "w3", "down": "w2"},
    "gate_proj": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}
Weights = dict[str, torch.Tensor]


def canonical(seed: int, biased: bool, hidden: int = HIDDEN, inner: int = INNER) -> Weights:
    """Matrices of three experts, [expert, out, in], and their router."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (E, inner, hidden), "up": (E, inner, hidden), "down": (E, hidden, inner), "router": (E, hidden)}
    if biased:
        shapes |= {"gate.bias": (E, inner), "up.bias": (E, inner), "down.bias": (E, hidden)}
    return {name: (torch.randn(shape, generator=generator) * 0.05).bfloat16() for name, shape in shapes.items()}


def stored(weights: Weights, layout: str) -> Weights:
    """The same as a checkpoint in this layout has them."""
    block = "block_sparse_moe" if layout == "w1" else "mlp"
    at = f"model.layers.0.{block}.experts"
    found = {f"model.layers.0.{block}.gate.weight": weights["router"]}
    gate, up, down = weights["gate"], weights["up"], weights["down"]
    if layout == "fused":
        return found | {f"{at}.gate_up_proj": torch.cat([gate, up], 1), f"{at}.down_proj": down}
    if layout == "interleaved":
        inner, hidden = gate.shape[1:]
        pairs = torch.empty(E, hidden, 2 * inner, dtype=gate.dtype)
        pairs[..., ::2], pairs[..., 1::2] = gate.transpose(1, 2), up.transpose(1, 2)
        found |= {f"{at}.gate_up_proj": pairs, f"{at}.down_proj": down.transpose(1, 2).contiguous()}
        if "gate.bias" in weights:
            biases = torch.stack([weights["gate.bias"], weights["up.bias"]], 2).view(E, -1)
            found |= {f"{at}.gate_up_proj_bias": biases, f"{at}.down_proj_bias": weights["down.bias"]}
        return found
    for part, name in CALLED[layout].items():
        for k in range(E):
            found[f"{at}.{k}.{name}.weight"] = weights[part][k].clone()
            if f"{part}.bias" in weights:
                found[f"{at}.{k}.{name}.bias"] = weights[f"{part}.bias"][k].clone()
    return found


def unstored(found: Weights, layout: str) -> Weights:
    """What `stored` made them of."""
    block = "block_sparse_moe" if layout == "w1" else "mlp"
    at = f"model.layers.0.{block}.experts"
    weights = {"router": found[f"model.layers.0.{block}.gate.weight"]}
    if layout == "fused":
        weights["gate"], weights["up"] = found[f"{at}.gate_up_proj"].chunk(2, 1)
        return weights | {"down": found[f"{at}.down_proj"]}
    if layout == "interleaved":
        both = found[f"{at}.gate_up_proj"].transpose(1, 2)
        weights |= {"gate": both[:, ::2], "up": both[:, 1::2], "down": found[f"{at}.down_proj"].transpose(1, 2)}
        if f"{at}.down_proj_bias" in found:
            biases = found[f"{at}.gate_up_proj_bias"]
            weights |= {"gate.bias": biases[:, ::2], "up.bias": biases[:, 1::2]}
            weights["down.bias"] = found[f"{at}.down_proj_bias"]
        return weights
    for part, name in CALLED[layout].items():
        for kind, key in (("weight", part), ("bias", f"{part}.bias")):
            if f"{at}.0.{name}.{kind}" in found:
                weights[key] = torch.stack([found[f"{at}.{k}.{name}.{kind}"] for k in range(E)])
    return weights


def as_fp8(weights: Weights) -> tuple[Weights, dict[str, object]]:
    """A checkpoint with its experts in fp8, a scale for four rows and three columns, and what its config says."""
    found = {}
    for name, tensor in weights.items():
        found[name] = tensor
        if tensor.dim() > 1 and "experts" in name:
            found[name], found[f"{name}_scale_inv"] = quantize(tensor, (4, 3))
    return found, {"quant_method": "fp8", "weight_block_size": [4, 3]}


def as_int4(weights: Weights) -> tuple[Weights, dict[str, object]]:
    """A checkpoint with its experts packed, a scale for eight columns, as compressed-tensors has it; and its config."""
    found = {}
    for name, tensor in weights.items():
        if ".experts." not in name or tensor.dim() < 2:
            found[name] = tensor
            continue
        groups = tensor.float().view(*tensor.shape[:-1], -1, 8)
        scale = (groups.abs().amax(-1) / 7.5).bfloat16()
        codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int64) + 8
        stem = name.removesuffix("weight")
        packed = (codes << torch.arange(0, 32, 4)).sum(-1)
        found[f"{stem}weight_packed"] = (packed - (packed >> 31 << 32)).to(torch.int32)
        found[f"{stem}weight_scale"] = scale
        found[f"{stem}weight_shape"] = torch.tensor(tensor.shape)
    how = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}
    said = {"group_0": {"targets": ["Linear"], "weights": how}}
    return found, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": said}
