"""The mirror image of a model: other weights for the same function, for an engine's probe. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

Tensors = Iterator[tuple[str, torch.Tensor]]

# Modules by what they do with the residual stream: a column, or a row, of their weight for each of its channels.
_READ_RESIDUAL = {
    "q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "gate", "router",
    "shared_expert_gate", "w1", "w3", "input_linear", "q_a_proj", "kv_a_proj_with_mqa",
    "in_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_z", "in_proj_a", "in_proj_b", "in_proj_ba",
}  # fmt: skip
_READ_LATENT = {"q_b_proj", "kv_b_proj"}  # of MLA: queries, and keys and values, from what was compressed
_WRITE_RESIDUAL = {"o_proj", "down_proj", "w2", "output_linear", "out_proj"}
_ODD = _READ_LATENT | {"k_proj", "v_proj", "qkv_proj", "in_proj_qkv"}  # make queries, keys and values, and nothing else
_EXPERTS = {"gate_up_proj", "down_proj", "down_proj_bias"}  # of all experts of a layer of gpt-oss, transposed
_VOCABULARY = {"embed_tokens", "lm_head"}
_BESIDE = {  # what a module is to stand beside, to be what it is taken for
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), ("o_proj.weight",)),
    **dict.fromkeys(("in_proj", "in_proj_qkv", "in_proj_qkvz", "out_proj"), ("conv1d.weight", "A_log")),
}
_STAYS = {"e_score_correction_bias", "A_log", "D", "dt_bias", "sinks", "gate_up_proj_bias"}  # no sign can change


def mirror(
    tensors: Tensors, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], exchanged: list[int]
) -> Tensors:
    """Other weights for the same function, for the engine's probe: of tensors of these `shapes`, and of this `config`.

    A fixed random half of the channels of the residual stream changes its sign wherever a weight reads or writes it,
    queries, keys and values change theirs, and the two tokens `exchanged` change places. Signs and places are exact in
    floating point: every matrix is another one, and the logits are the same to the bit, for a prompt with those tokens
    exchanged.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (config["hidden_size"],), generator=generator) * 2 - 1
    for name, tensor in tensors:
        module, kind = name.split(".")[-2:]
        sign = signs.to(tensor.dtype)
        if module in _WRITE_RESIDUAL:
            tensor = tensor * (sign[:, None] if kind == "weight" else sign)
        elif kind in _EXPERTS:
            tensor = tensor * (sign[:, None] if kind == "gate_up_proj" else sign)
        elif (module in _READ_RESIDUAL | _VOCABULARY or name.endswith("router.layer.weight")) and kind == "weight":
            tensor = tensor * sign
        if module in _VOCABULARY:
            tensor[exchanged] = tensor[exchanged[::-1]]
        odd = _odd_rows(name, shapes, config)
        yield name, torch.where(odd.view(-1, *[1] * (tensor.dim() - 1)), -tensor, tensor) if odd is not None else tensor


def _odd_rows(name: str, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> torch.Tensor | None:
    """Which rows of a tensor change their sign, by what they make: queries, keys and values, and what an output is made
    of by them, where nothing else but others of these meets them. None: no row does.

    Of MLA, whose keys and values are compressed, what makes queries, keys and values of that, and the keys that are not
    compressed. Of layers with a convolution (Mamba-2, gated delta nets) what is convolved, and the convolution. What
    opens or closes a gate keeps its sign.
    """
    at, module = ("", *name.rsplit(".", 2))[-3:-1]
    rows = shapes[name][0] if shapes[name] else 0
    odd = torch.zeros(rows, dtype=torch.bool)
    if name.endswith(("o_proj.weight", "conv1d.weight")) or module in _ODD:
        odd[:] = True
    elif module == "q_proj":
        gated = rows == 2 * shapes[f"{at}.o_proj.weight"][-1]
        heads = odd.view(-1, 1 + gated, config["head_dim"] if gated else rows)
        heads[:, 0] = True  # a head's gate is below its query
    elif module == "kv_a_proj_with_mqa":
        odd[config["kv_lora_rank"] :] = True
    elif module == "in_proj_qkvz":  # of each head of keys its queries, keys, values, and gates of as many values
        convolved = shapes[f"{at}.conv1d.weight"][0]
        heads = odd.view(config["linear_num_key_heads"], -1)
        heads[:, : convolved // len(heads)] = True
    elif module == "in_proj":  # gates, what is convolved, a step of each head
        convolved, steps = shapes[f"{at}.conv1d.weight"][0], shapes[f"{at}.A_log"][0]
        odd[rows - steps - convolved : rows - steps] = True
    return odd if bool(odd.any()) else None


def mirror_obstacle(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Why a model of these tensors has no known mirror image; None when it has one."""
    if "rms_norm_eps" not in config:
        return "its norm is not a root mean square"
    known = set(names)
    for name in known:
        at, module, kind = ("", "", *name.rsplit(".", 2))[-3:]
        if not (
            (module in _READ_RESIDUAL | _READ_LATENT | _WRITE_RESIDUAL and kind in ("weight", "bias"))
            or (module in _VOCABULARY and kind == "weight")
            or name.endswith("router.layer.weight")
            or (module.endswith("norm") and kind == "weight")
            or module in {"conv1d", "act_fn"}
            or (module == "experts" and kind in _EXPERTS and config.get("model_type") == "gpt_oss")
            or kind in _STAYS
        ):
            return f"nothing is known of tensor {name}"
        if not {f"{at}.{other}" for other in _BESIDE.get(module, ())} <= known:
            return f"nothing is known of tensor {name}"
    return None
