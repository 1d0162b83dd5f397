"""Tiny LoRA adapters in the files peft writes, made here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK, ALPHA = 4, 10
MODULES = {  # of the checkpoints that tests/checkpoints.py makes: (rows, columns)
    "model.layers.0.self_attn.q_proj": (48, 48),
    "model.layers.2.mlp.up_proj": (131, 48),
}
EMBEDDING = "model.embed_tokens"

CONFIG = {  # what peft 0.21 writes, less what is null there
    "peft_type": "LORA", "peft_version": "0.21.2", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base",
    "r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "use_dora": False, "use_qalora": False, "lora_bias": False,
    "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "target_modules": ["q_proj", "up_proj"], "loftq_config": {}, "inference_mode": True,
}  # fmt: skip


def factors(seed: int = 0, rank: int = RANK, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """lora_A and lora_B of MODULES and of the embedding, under peft's names."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, (rows, columns) in MODULES.items():
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.05
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.05
    found[f"base_model.model.{EMBEDDING}.lora_embedding_A"] = torch.randn(rank, 301, generator=generator) * 0.05
    found[f"base_model.model.{EMBEDDING}.lora_embedding_B"] = torch.randn(48, rank, generator=generator) * 0.05
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def differences(tensors: Mapping[str, torch.Tensor], scale: float = ALPHA / RANK) -> dict[str, torch.Tensor]:
    """Δ of every module, computed from whole tensors in fp64."""
    found = {}
    for name, a in tensors.items():
        module = name.removeprefix("base_model.model.")
        if module.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            found[module.removesuffix(".lora_A.weight") + ".weight"] = scale * (b.double() @ a.double())
        elif module.endswith(".lora_embedding_A"):
            b = tensors[name.replace("embedding_A", "embedding_B")]
            found[module.removesuffix(".lora_embedding_A") + ".weight"] = scale * (b.double() @ a.double()).T
    return found


def write_adapter(path: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    path.mkdir(parents=True)
    save_file(dict(tensors), path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return path


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether every element is within fp32's rounding of sums and products in fp64."""
    return bool(((found.double() - exact).abs() <= math.ldexp(1.0, -24) * exact.abs() + 1e-14).all())
