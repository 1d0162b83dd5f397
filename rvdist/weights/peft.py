"""A vector as a LoRA adapter that peft and vLLM load: what of it one holds, what its tensors are called, its config.

Source: peft's tuners/lora/layer.py (Δ = scale · B · A) and utils/save_and_load.py (names). The scale is 1 everywhere,
also for a reader that knows no patterns. Knows names and numbers; `rvdist.weights.store` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.weights.anatomy.kind import in_order, kind_of
from rvdist.weights.checkpoint.adapter import PREFIX
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.private_transformers import renames_in_memory

LEFT_OUT = "left_out"  # the form of a tensor that is not held, or is 0
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "ctrl")  # whose matrices are Conv1D's
# Of mixtures: parameters of their own.
_NO_LINEAR = re.compile(r"(?:.*\.)?(?:experts\..*|(?:gate|router|router\.layer)\.weight)")


def is_held(name: str, shape: tuple[int, ...]) -> bool:
    """Whether LoRA holds a tensor: the weight of a linear layer, whose output is what B · A changes."""
    linear = name.endswith(".weight") and len(shape) == 2 and 0 not in shape
    return linear and kind_of(name) not in ("embedding", "norm") and not _NO_LINEAR.fullmatch(name)


def factor_names(name: str) -> tuple[str, str]:
    """What the left factor, B, and the right one, A, of a tensor are called."""
    module = PREFIX + name.removesuffix(".weight")
    return f"{module}.lora_B.weight", f"{module}.lora_A.weight"


def require_linear(donor: Checkpoint) -> None:
    """Raises BadInput for a model whose files have matrices the other way round than LoRA's factors make them, or under
    other names than its modules have, by which peft and vLLM look for factors."""
    if (kind := donor.config.get("model_type")) in _TRANSPOSED:
        raise BadInput(
            f"{donor.path}: is a {kind}, which stores its matrices transposed, and vector.format=peft knows linear "
            "layers only; store the vector without it"
        )
    names = [name for name, spec in donor.tensors.items() if is_held(name, spec.shape)]
    needed = []
    for pattern, replacement in renames_in_memory(donor.config):
        renamed = [re.sub(pattern, replacement, name) for name in names]
        needed += [f'["{pattern}","{replacement}"]'] * (renamed != names)
        names = renamed
    if needed:
        raise BadInput(
            f"{donor.path}: is a {kind}, whose modules are called otherwise than the tensors of its files, by which "
            f"peft would not find them; set vector.rename='[{','.join(needed)}]'"
        )


def config_of(ranks: Mapping[str, int], trained_on: str | None, causal: bool) -> dict[str, Any]:
    """adapter_config.json of an adapter with factors of these `ranks`, by the name of the tensor."""
    modules = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    rank = max(modules.values())
    others = {module: own for module, own in sorted(modules.items(), key=lambda one: -len(one[0])) if own != rank}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if causal else None, "base_model_name_or_path": trained_on,
        "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "target_modules": list(modules), "inference_mode": True,
    }  # fmt: skip


def left_out(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What of the measured tensors an adapter does not hold, by kind: how many, and their share of ‖v‖; the error of
    what it does hold, relative to that."""
    outside = {name: entry for name, entry in entries.items() if entry["form"] == LEFT_OUT and entry["norm"]}
    norm = math.hypot(*(entry["norm"] for entry in entries.values()))
    of_kind = {kind: [e["norm"] for n, e in outside.items() if _what(n) == kind] for kind in map(_what, outside)}
    held = [entry for name, entry in entries.items() if name not in outside]
    error = math.hypot(*(entry["relative_error"] * entry["norm"] for entry in held))
    whole = math.hypot(*(entry["norm"] for entry in held))
    return {
        "held_relative_error": error / whole if whole else 0.0,
        "left_out_share": math.hypot(*(entry["norm"] for entry in outside.values())) / norm if norm else 0.0,
        "left_out": {
            kind: {"tensors": len(norms), "share": math.hypot(*norms) / norm}
            for kind, norms in ((kind, of_kind[kind]) for kind in in_order(of_kind))
        },
    }


def tell(measured: Mapping[str, Any], rank: int) -> str:
    """What was measured, in words."""
    said = f"a LoRA adapter of rank {rank}, relative error {measured['relative_error']:.2g}"
    if not measured["left_out"]:
        return said
    each = ", ".join(f"{kind} {one['share']:.2%}" for kind, one in measured["left_out"].items())
    return (
        f"{said} ({measured['held_relative_error']:.2g} of what it holds); {measured['left_out_share']:.2%} of the "
        f"vector's norm is in what LoRA does not hold and is left out: {each}"
    )


def _what(name: str) -> str:
    return f"{kind_of(name)}.bias" if name.endswith("bias") else kind_of(name)
