"""Tiny real checkpoints for every test: safetensors files in the Hugging Face layout, made here; and the command."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import forked
import torch
from safetensors.torch import load_file, save_file

# A command that scores a little, on one engine.
SCORING = ("benchmarks=pocket", "benchmarks.limit=16", "engine.count=1", "engine.kv_cache_gib=0.125", "cache.dir=cache")
POCKET = Path(__file__).resolve().parent.parent / "rvdist" / "pocket"


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 0.02) -> dict[str, torch.Tensor]:
    """A small transformer's worth of names; sizes that do not divide evenly into anything."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (301, 48), "model.norm.weight": (48,), "scalar": ()}
    for layer in range(3):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (48, 48)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (131, 48)
    return {name: (torch.randn(s, generator=generator) * scale).to(dtype) for name, s in shapes.items()}


def near(base: Mapping[str, torch.Tensor], seed: int, scale: float = 0.004) -> dict[str, torch.Tensor]:
    """A sibling: `base` plus small noise, so that it counts as of the same initialisation."""
    generator = torch.Generator().manual_seed(seed)
    return {k: (v.double() + scale * torch.randn(v.shape, generator=generator)).to(v.dtype) for k, v in base.items()}


def write_checkpoint(
    path: Path, weights: Mapping[str, torch.Tensor], shards: int = 1, config: Mapping[str, object] | None = None
) -> Path:
    path.mkdir(parents=True)
    names = list(weights)
    if shards == 1:
        save_file(dict(weights), path / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for k in range(shards):
            file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
            mine = names[k::shards]
            save_file({n: weights[n] for n in mine}, path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(mine, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    tied = "lm_head.weight" not in weights
    default = {"model_type": "tiny", "hidden_size": 48, "tie_word_embeddings": tied, "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config or default))
    (path / "generation_config.json").write_text("{}")
    (path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<eos>"}]})
    )
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def write_family(place: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> dict[str, Path]:
    """Target, plus and minus, siblings of one initialisation."""
    base = tensors(0, dtype)
    return {
        "target": write_checkpoint(place / "target", base, shards),
        "plus": write_checkpoint(place / "plus", near(base, 1)),
        "minus": write_checkpoint(place / "minus", near(base, 2), 2),
    }


def load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def launch(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    return forked.run("rvdist.launch", arguments, cwd, {**os.environ, **environment}, timeout=600)
