"""Targets in MXFP4, as gpt-oss is stored: read as transformers reads them, written back against whole tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from alone import write, write_and_cut
from checkpoints import load_checkpoint, near, write_checkpoint
from points import shifted
from safetensors.torch import load_file

from rvdist.core.errors import BadInput
from rvdist.core.point import WeightPoint
from rvdist.weights.checkpoint.source import open_source

pytestmark = pytest.mark.heavy
X = "model.layers.0.mlp.experts.gate_up_proj"
Y = "model.layers.0.mlp.experts.down_proj"
SHAPES = {X: (3, 96, 20), Y: (3, 64, 96), f"{X}_bias": (3, 20), "model.norm.weight": (96,)}
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def plain(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.05).bfloat16() for name, shape in SHAPES.items()}


def nearest(value: float) -> int:
    """The code of a scaled value: the nearest, the even of two."""
    distance = (VALUES.double() - abs(value)).abs()
    close = (distance == distance.min()).nonzero().view(-1).tolist()
    return next(code for code in close if len(close) == 1 or code % 2 == 0) | (8 if value < 0 else 0)


def quantized(matrix: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, keep: torch.Tensor | None) -> int:
    """Fills blocks and exponents of [E, inner, outer], a block at a time, but for those that are as `keep`."""
    kept = 0
    experts, inner, outer = matrix.shape
    for e in range(experts):
        for o in range(outer):
            for g in range(inner // 32):
                values = matrix[e, g * 32 : (g + 1) * 32, o]
                if keep is not None and torch.equal(values, keep[e, g * 32 : (g + 1) * 32, o]):
                    kept += 1
                    continue
                exponent = int(torch.ceil(torch.log2(values.abs().max().double() / 6)))
                codes = [nearest(float(value) / 2.0**exponent) for value in values.double()]
                scales[e, o, g] = exponent + 127
                blocks[e, o, g] = torch.tensor([codes[k] | codes[k + 1] << 4 for k in range(0, 32, 2)])
    return kept


def empty(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    experts, inner, outer = matrix.shape
    blocks = torch.zeros(experts, outer, inner // 32, 16, dtype=torch.uint8)
    return blocks, torch.zeros(experts, outer, inner // 32, dtype=torch.uint8)


def family(place: Path) -> dict[str, Path]:
    base = plain(0)
    plus, minus = near(base, 1), near(base, 2)
    for name in (X, Y):
        plus[name][1] = minus[name][1]
        plus[name][0, 32:64, 3:9] = minus[name][0, 32:64, 3:9]
    stored = {name: tensor for name, tensor in base.items() if name not in (X, Y)}
    for name in (X, Y):
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = empty(base[name])
        quantized(base[name].float(), stored[f"{name}_blocks"], stored[f"{name}_scales"], None)
    paths = {
        "target": write_checkpoint(place / "target", stored, shards=2),
        "plus": write_checkpoint(place / "plus", plus),
        "minus": write_checkpoint(place / "minus", minus),
    }
    config = json.loads((paths["target"] / "config.json").read_text())
    (paths["target"] / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    return paths


def by_transformers(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(weights[f"{name}_blocks"], weights[f"{name}_scales"])


def test_mxfp4_is_read_as_transformers_reads_it_and_written_back(tmp_path, monkeypatch):
    paths = family(tmp_path)
    write({tmp_path / "bf16": shifted(paths)}, dtype="BF16")
    write({tmp_path / "same": WeightPoint(str(paths["target"]))})
    for file in (tmp_path / "same").glob("*.safetensors"):
        same, own = load_file(file), load_file(paths["target"] / file.name)
        assert same.keys() == own.keys() and all(torch.equal(same[name], tensor) for name, tensor in own.items())
    write_and_cut(tmp_path, shifted(paths), monkeypatch)
    stored, found, wide = (load_checkpoint(path) for path in (paths["target"], tmp_path / "out", tmp_path / "bf16"))
    plus, minus = (load_checkpoint(paths[role]) for role in ("plus", "minus"))
    assert found.keys() == stored.keys() and wide.keys() == plus.keys()
    for name in (X, Y):
        before = by_transformers(stored, name).float()
        assert before.shape == plus[name].shape
        result = before + 0.7 * (plus[name].float() - minus[name].float())
        assert torch.equal(wide[name], result.bfloat16())
        blocks, scales = stored[f"{name}_blocks"].clone(), stored[f"{name}_scales"].clone()
        kept = quantized(result, blocks, scales, before)
        assert kept > before[1].numel() // 32
        assert torch.equal(found[f"{name}_blocks"], blocks) and torch.equal(found[f"{name}_scales"], scales)
        assert torch.equal(found[f"{name}_blocks"][1], stored[f"{name}_blocks"][1])
        assert (by_transformers(found, name).float() - result).abs().max() <= 2.0 ** (int(scales.max()) - 127)
    for name in (f"{X}_bias", "model.norm.weight"):
        assert not torch.equal(found[name], stored[name])


def test_what_is_not_as_gpt_oss_is_named(tmp_path):
    paths = family(tmp_path)
    weights = load_checkpoint(paths["target"])
    for number, (name, tensor, said) in enumerate(
        [
            (f"{X}_scales", weights[f"{X}_scales"][:, :, :1].contiguous(), "of shape"),
            (f"{X}_scales", weights[f"{X}_scales"].float(), "without exponents in U8"),
            (f"{X}_blocks", weights[f"{X}_blocks"].flatten(2), "of shape"),
        ]
    ):
        path = write_checkpoint(tmp_path / str(number), weights | {name: tensor})
        (path / "config.json").write_bytes((paths["target"] / "config.json").read_bytes())
        with pytest.raises(BadInput, match=said):
            open_source(str(path))
