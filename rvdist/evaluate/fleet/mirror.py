"""The mirror image of a model: other weights for the same function, for an engine's probe. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

Tensors = Iterator[tuple[str, torch.Tensor]]

# Modules by what they do with the residual stream: a column, or a row, of their weight for each of its channels.
_READ_RESIDUAL = {
    "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate", "shared_expert_gate",
    "q_a_proj", "kv_a_proj_with_mqa",
}  # fmt: skip
_READ_LATENT = {"q_b_proj", "kv_b_proj"}  # of MLA: queries, and keys and values, from what was compressed
_WRITE_RESIDUAL = {"o_proj", "down_proj"}
_VOCABULARY = {"embed_tokens", "lm_head"}


def mirror(tensors: Tensors, hidden: int, exchanged: list[int], latent: int = 0) -> Tensors:
    """Other weights for the same function, for the engine's probe.

    A fixed random half of the `hidden` channels of the residual stream changes its sign wherever a weight
    reads or writes it, queries, keys and values change theirs, and the two tokens `exchanged` change places.
    Signs and places are exact in floating point: every matrix is another one, and the logits are the same to
    the bit, for a prompt with those tokens exchanged. Of MLA, whose keys and values are compressed to `latent`
    channels, what makes queries, keys and values of them changes its sign, and so do the keys that are not compressed.
    """
    signs = torch.randint(0, 2, (hidden,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, tensor in tensors:
        module, kind = name.split(".")[-2:]
        sign = signs.to(tensor.dtype)
        if module in _WRITE_RESIDUAL:
            tensor = tensor * (sign[:, None] if kind == "weight" else sign)
        elif module in _READ_RESIDUAL | _VOCABULARY and kind == "weight":
            tensor = tensor * sign
        if module == "kv_a_proj_with_mqa":
            tensor[latent:] = -tensor[latent:]
        if module in {"q_proj", "k_proj", "v_proj"} | _READ_LATENT or name.endswith("o_proj.weight"):
            tensor = -tensor
        if module in _VOCABULARY:
            tensor[exchanged] = tensor[exchanged[::-1]]
        yield name, tensor


def mirror_obstacle(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Why a model of these tensors has no known mirror image; None when it has one."""
    if "rms_norm_eps" not in config:
        return "its norm is not a root mean square"
    for name in names:
        module, kind = ("", *name.split("."))[-2:]
        known = (
            (module in _READ_RESIDUAL | _READ_LATENT | _WRITE_RESIDUAL and kind in ("weight", "bias"))
            or (module in _VOCABULARY and kind == "weight")
            or (module.endswith("norm") and kind == "weight")
            or (module, kind) == ("gate", "e_score_correction_bias")
        )
        if not known:
            return f"nothing is known of tensor {name}"
    return None
