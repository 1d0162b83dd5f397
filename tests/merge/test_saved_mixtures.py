"""Mixtures of experts as transformers itself saves them, merged across layouts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from alone import write
from checkpoints import load_checkpoint
from mixtures import BIASED, PLAIN, E, stored, unstored
from safetensors.torch import save_file

from rvdist.core.point import Term, Vector, WeightPoint

pytestmark = pytest.mark.heavy
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip


def saved(kind: str, place: Path) -> str:
    """Target and donors by save_pretrained, near each other; returns the layout that they have."""
    from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    config = {
        "qwen3": lambda: Qwen3MoeConfig(**SHAPE, num_experts=E, moe_intermediate_size=16),
        "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=E),
        "gpt-oss": lambda: GptOssConfig(**SHAPE, num_local_experts=E),
    }[kind]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name in ("target", "plus", "minus"):
        model.save_pretrained(place / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.004 * torch.randn_like(parameter))
    return {"qwen3": "gate_proj", "mixtral": "w1", "gpt-oss": "interleaved"}[kind]


def relaid(weights: dict[str, torch.Tensor], layout: str, other: str) -> dict[str, torch.Tensor]:
    """A model in another layout, by the permutation alone."""
    kept = {name: tensor for name, tensor in weights.items() if "experts" not in name and ".gate.weight" not in name}
    at = "model.layers.0.mlp.router.weight"  # gpt-oss's router has a name of its own, which stays
    router = {f"model.layers.0.{'block_sparse_moe' if layout == 'w1' else 'mlp'}.gate.weight": torch.zeros(1)}
    found = stored(unstored(router | weights, layout), other)
    return kept | {name: tensor for name, tensor in found.items() if at not in weights or ".gate.weight" not in name}


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [("qwen3", PLAIN), ("mixtral", PLAIN), ("gpt-oss", BIASED)],
)
def test_all_layouts_of_a_saved_model_give_one_merge(tmp_path: Path, kind: str, layouts: tuple[str, ...]) -> None:
    own = saved(kind, tmp_path)
    for layout in layouts:
        for name in ("target", "plus", "minus"):
            there = tmp_path / name if layout == own else tmp_path / layout / name
            if layout != own:
                shutil.copytree(tmp_path / name, there, ignore=shutil.ignore_patterns("*.safetensors*"))
                changed = relaid(load_checkpoint(tmp_path / name), own, layout)
                save_file(
                    {k: v.contiguous() for k, v in changed.items()}, there / "model.safetensors", {"format": "pt"}
                )
            (tmp_path / "targets").mkdir(exist_ok=True)
            if name == "target":
                shutil.copytree(there, tmp_path / "targets" / layout)
    merged = {}
    for donors in layouts:
        place = tmp_path if donors == own else tmp_path / donors
        vector = Vector(str(place / "plus"), str(place / "minus"))
        (tmp_path / "out" / donors).mkdir(parents=True)
        for target in layouts:
            point = WeightPoint(str(tmp_path / "targets" / target), (Term(0.5, vector),))
            write({tmp_path / "out" / donors / target: point})
        merged |= {(donors, target): load_checkpoint(tmp_path / "out" / donors / target) for target in layouts}
    assert any(
        "experts" in name and not torch.equal(tensor, load_checkpoint(tmp_path / "target")[name])
        for name, tensor in merged[own, own].items()
    )
    for target in layouts:
        expected = merged[own, own] if target == own else relaid(merged[own, own], own, target)
        for donors in layouts:
            found = merged[donors, target]
            assert found.keys() == expected.keys(), (donors, target)
            assert all(torch.equal(found[name], expected[name]) for name in found), (donors, target)
