"""Whether a directory is what a situation says is right. Knows nothing of who wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from checkpoints import load_checkpoint

WRITTEN_BY_US = {"README.md", "rvdist.json", "model.safetensors.index.json"}


def ulps(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many representable numbers lie between, of 16-bit floating point."""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)

    return (ordered(found) - ordered(wanted)).abs()


def differing(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong with these tensors, one sentence each. Equal to the bit, but for 16-bit results one unit in the
    last place in one of a thousand elements."""
    wrong, off, total = [], 0, 0
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            wrong.append(f"{name} is {'missing' if name in wanted else 'too many'}")
            continue
        ours, exact = found[name], wanted[name]
        if ours.dtype != exact.dtype or ours.shape != exact.shape:
            wrong.append(f"{name} is {ours.dtype} {list(ours.shape)}, not {exact.dtype} {list(exact.shape)}")
        elif not torch.equal(ours, exact):
            if exact.dtype not in (torch.bfloat16, torch.float16) or bool((ulps(ours, exact) > 1).any()):
                wrong.append(f"{name} has other numbers")
            off += int((ours != exact).sum())
        total += exact.numel()
    if off > 1 + total / 1000:
        wrong.append(f"{off} of {total} elements are off")
    return wrong


def companions(directory: Path) -> dict[str, bytes]:
    """What stands beside the weights, by its path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".safetensors" and path.name not in WRITTEN_BY_US
    }


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(directory)


def index_errors(directory: Path) -> list[str]:
    """What is wrong with the index of an output: it lists each file's tensors, and their bytes."""
    index, files = directory / "model.safetensors.index.json", sorted(directory.glob("*.safetensors"))
    if not index.exists():
        return [] if [file.name for file in files] == ["model.safetensors"] else ["there is no index"]
    said = json.loads(index.read_text())
    held = weights_of(directory)
    wrong = []
    if said["weight_map"].keys() != held.keys() or set(said["weight_map"].values()) != {file.name for file in files}:
        wrong.append("the index lists other tensors or files")
    if said["metadata"]["total_size"] != sum(tensor.nbytes for tensor in held.values()):
        wrong.append("the index has another total")
    return wrong
