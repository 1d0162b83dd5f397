"""Saves a checkpoint as a training on several ranks leaves it: `python save_sharded.py RANKS FROM TO …`, with FSDP2
on gloo. TO gets `dcp` (the model alone), `trained` (with an optimizer and a step), `verl` (a shard a rank)
and `hsdp` (the same, of parts that two ranks each have)."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def module_of(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module whose parameters have these names."""
    root = torch.nn.Module()
    for name, tensor in weights.items():
        *above, last = name.split(".")
        place = root
        for part in above:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, torch.nn.Parameter(tensor.clone()))
    return root


def save(weights: dict[str, torch.Tensor], to: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{to}/meeting", rank=rank, world_size=ranks)
    module = module_of(weights)
    fully_shard(module, mesh=init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",)))
    dcp.save(get_model_state_dict(module), checkpoint_id=to / "dcp")
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    model, state = get_state_dict(module, optimizer)
    dcp.save({"model": model, "optim": state, "step": 7}, checkpoint_id=to / "trained")
    torch.save(module.state_dict(), to / "verl" / f"model_world_size_{ranks}_rank_{rank}.pt")
    copies = module_of(weights)  # each part twice
    twice = (2, ranks // 2) if ranks > 1 else (1, 1)
    fully_shard(copies, mesh=init_device_mesh("cpu", twice, mesh_dim_names=("ddp", "fsdp")))
    torch.save(copies.state_dict(), to / "hsdp" / f"model_world_size_{ranks}_rank_{rank}.pt")
    dist.destroy_process_group()


def main(source: Path, to: Path, ranks: int) -> None:
    for place in ("verl/huggingface", "hsdp/huggingface"):
        (to / place).mkdir(parents=True)
    weights = {
        name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    weights = {name: tensor for name, tensor in weights.items() if tensor.dim()}
    (to / "export").mkdir()
    save_file(weights, to / "export" / "model.safetensors", {"format": "pt"})
    children = []
    for rank in range(ranks):
        if not (child := os.fork()):
            try:
                save(weights, to, rank, ranks)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert not any(os.waitpid(child, 0)[1] for child in children)
    for file in source.iterdir():
        if file.suffix == ".json" and not file.name.endswith("index.json"):
            for place in ("dcp", "trained", "export", "verl/huggingface", "hsdp/huggingface"):
                shutil.copy(file, to / place / file.name)


if __name__ == "__main__":
    for source, to in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        main(Path(source), Path(to), int(sys.argv[1]))
