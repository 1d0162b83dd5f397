"""fp8 with block scales, straightforwardly: stored as DeepSeek-V3 is, read as its `weight_dequant` does, and
written back a block at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from checkpoints import load_checkpoint, near, tensors, write_checkpoint

E4M3 = torch.float8_e4m3fn
BLOCK = (32, 20)


def quantize(matrix: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 and the scales of its blocks, amax / 448 each, which are not powers of two."""
    scale = spread(torch.zeros(1), matrix.shape, block)[..., :: block[0], :: block[1]].clone()
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            rows, columns = (slice(k * size, (k + 1) * size) for k, size in zip((i, j), block, strict=True))
            scale[..., i, j] = matrix[..., rows, columns].float().abs().amax((-2, -1)) / 448
    return (matrix.float() / spread(scale, matrix.shape, block)).to(E4M3), scale


def written_back(
    codes: torch.Tensor,
    scales: torch.Tensor,
    result: torch.Tensor,
    before: torch.Tensor,
    block: tuple[int, int],
    power_of_two: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A matrix in its own fp8, and how many blocks stay: where the result is as before, codes and scale are, too."""
    codes, scales, kept = codes.clone(), scales.clone(), 0
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = tuple(slice(k * size, (k + 1) * size) for k, size in zip((i, j), block, strict=True))
            if torch.equal(result[at], before[at]):
                kept += 1
                continue
            scale = result[at].abs().max() / 448
            scales[i, j] = 2 ** torch.ceil(torch.log2(scale.double())).float() if power_of_two else scale
            codes[at] = (result[at] / scales[i, j].float()).clamp(-448, 448).to(codes.dtype)
    return codes, scales, kept


def spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """The scale of every element."""
    if scale.dim() < 2:
        return scale.expand(shape)
    wide = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def dequantized(weights: Mapping[str, torch.Tensor], block: tuple[int, int]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in weights.items():
        if tensor.dtype == E4M3:
            tensor = tensor.float() * spread(weights[f"{name}_scale_inv"].float(), tensor.shape, block)
        if not name.endswith("_scale_inv"):
            found[name] = tensor
    return found


def quantized(weights: Mapping[str, torch.Tensor], block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """All projections in fp8, the rest as it is; the scales at the end, so that shards part them from their weights."""
    found, scales = dict(weights), {}
    for name, tensor in weights.items():
        if "proj" in name:
            found[name], scales[f"{name}_scale_inv"] = quantize(tensor, block)
    return found | scales


def write_fp8(
    path: Path, weights: Mapping[str, torch.Tensor], block: tuple[int, int] = (128, 128), shards: int = 1
) -> Path:
    write_checkpoint(path, weights, shards)
    config = json.loads((path / "config.json").read_text())
    quantization = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return path


def write_mixed(place: Path, *in_fp8: str) -> dict[str, Path]:
    """`write_mixed(place, "target")`: that one is in fp8, in blocks of `BLOCK`, and in five shards; others in bf16."""
    base = tensors(0)
    family = {"target": base, "plus": near(base, 1), "minus": near(base, 2)}
    return {
        name: write_fp8(place / name, quantized(weights, BLOCK), BLOCK, shards=5)
        if name in in_fp8
        else write_checkpoint(place / name, weights)
        for name, weights in family.items()
    }


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one of them, as numbers."""
    found = load_checkpoint(path)
    return dequantized(found, BLOCK) if "fp8" in (path / "config.json").read_text() else found


def digests(path: Path) -> dict[str, str]:
    """Of the weight files of a checkpoint."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("model*")}
