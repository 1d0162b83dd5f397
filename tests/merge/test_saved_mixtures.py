"""Mixtures of experts as transformers itself saves them, merged across layouts."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from alone import write
from checkpoints import launch, load_checkpoint
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


def put(own: str, layouts: tuple[str, ...], place: Path) -> dict[str, dict[str, Path]]:
    """Where each of the three lies in each layout."""
    found: dict[str, dict[str, Path]] = {}
    for layout, name in product(layouts, ("target", "plus", "minus")):
        there = place / layout / name
        shutil.copytree(place / name, there, ignore=shutil.ignore_patterns("*.safetensors*"))
        weights = load_checkpoint(place / name)
        changed = weights if layout == own else relaid(weights, own, layout)
        save_file({k: v.contiguous() for k, v in changed.items()}, there / "model.safetensors", {"format": "pt"})
        found.setdefault(layout, {})[name] = there
    return found


def digests(out: Path) -> dict[str, str]:
    """Of each weight file of an output."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.glob("*.safetensors")}


def require_one_merge(own: str, paths: dict[str, dict[str, Path]], merged: dict[tuple[str, str, str], Path]) -> None:
    """Outputs by the layouts of plus, minus and target: those of one target are one to the byte, and the permuted
    output in the layout that the model was saved in; no tensor of it is left out."""
    first = load_checkpoint(merged[own, own, own])
    before = load_checkpoint(paths[own]["target"])
    assert all(not torch.equal(tensor, before[name]) for name, tensor in first.items())
    for (*donors, target), out in merged.items():
        assert digests(out) == digests(merged[target, target, target]), (donors, target)
        found, expected = load_checkpoint(out), first if target == own else relaid(first, own, target)
        assert found.keys() == expected.keys() == load_checkpoint(paths[target]["target"]).keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), (donors, target)


KINDS = [("qwen3", PLAIN), ("mixtral", PLAIN), ("gpt-oss", BIASED)]


@pytest.mark.parametrize(("kind", "layouts"), KINDS)
def test_all_layouts_of_a_saved_model_give_one_merge(tmp_path: Path, kind: str, layouts: tuple[str, ...]) -> None:
    own = saved(kind, tmp_path)
    paths, merged = put(own, layouts, tmp_path), {}
    (tmp_path / "out").mkdir()
    for plus, minus, target in product(layouts, repeat=3):
        if minus in (plus, target):  # the rest by the command
            merged[plus, minus, target] = out = tmp_path / "out" / f"{plus}-{minus}-{target}"
            vector = Vector(str(paths[plus]["plus"]), str(paths[minus]["minus"]))
            write({out: WeightPoint(str(paths[target]["target"]), (Term(0.5, vector),))})
    require_one_merge(own, paths, merged)


def by_command(kind: str, place: Path, layouts: tuple[str, ...], wanted: Callable[[str, str, str], bool]) -> None:
    own = saved(kind, place)
    paths, merged = put(own, layouts, place), {}
    for plus, minus, target in product(layouts, repeat=3):
        if wanted(plus, minus, target) or plus == minus == target:
            merged[plus, minus, target] = out = place / "out" / f"{plus}-{minus}-{target}"
            ended = launch(
                f"target={paths[target]['target']}", f"vector.plus={paths[plus]['plus']}",
                f"vector.minus={paths[minus]['minus']}", "alpha=0.5", f"output={out}", cwd=place,
            )  # fmt: skip
            assert ended.returncode == 0, ended.stderr[-2000:]
            assert "skipped" not in ended.stdout + ended.stderr and "stay as they are" not in ended.stdout
    require_one_merge(own, paths, merged)


def test_the_command_merges_donors_of_two_layouts_into_a_third(tmp_path: Path) -> None:
    by_command("mixtral", tmp_path, PLAIN, lambda *three: three == ("gate_proj", "w1", "fused"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layouts"), KINDS)
def test_the_command_merges_all_layouts_into_all(tmp_path: Path, kind: str, layouts: tuple[str, ...]) -> None:
    by_command(kind, tmp_path, layouts, lambda *three: True)


ROUTED = {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
ELSEWHERE: dict[str, dict[str, object]] = {
    "OlmoeConfig": {"num_experts": 4},
    "Qwen3NextConfig": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20, **LINEAR},
    "Glm4MoeConfig": {"first_k_dense_replace": 1, **ROUTED},
    "DeepseekV3Config": {"first_k_dense_replace": 1, **ROUTED, **LATENT},
    "GraniteMoeSharedConfig": {"num_local_experts": 4, "shared_intermediate_size": 20},
    "JambaConfig": {"num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1, **MAMBA},
    "PhimoeConfig": {"num_local_experts": 4},
    "MiniMaxM2Config": {"num_local_experts": 4},
    "Ernie4_5_MoeConfig": {"moe_num_experts": 4, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    "Lfm2MoeConfig": {
        "num_experts": 4, "moe_intermediate_size": 16, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_model_as_it_is_published_meets_itself_as_it_is_in_memory(tmp_path: Path, kind: str) -> None:
    """Trainings that save what is in memory have experts fused, and routers under other names; shared experts, and
    what corrects routers' scores, meet too, and no tensor is left out."""
    import transformers
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    config = getattr(transformers, kind)(**SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 2} | ELSEWHERE[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name in ("target", "plus", "minus"):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_((0.05 if name == "target" else 0.004) * torch.randn_like(tensor))
        model.save_pretrained(tmp_path / "published" / name)
        shutil.copytree(tmp_path / "published" / name, tmp_path / "memory" / name)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        save_file(state, tmp_path / "memory" / name / "model.safetensors", {"format": "pt"})
    before = [load_checkpoint(tmp_path / kind / "target").keys() for kind in ("published", "memory")]
    assert before[0] != before[1]
    for target, donors in product(("published", "memory"), repeat=2):
        vector = Vector(*(str(tmp_path / donors / name) for name in ("plus", "minus")))
        point = WeightPoint(str(tmp_path / target / "target"), (Term(0.5, vector),))
        write({tmp_path / f"{target}-{donors}": point})
    for target, other in (("published", "memory"), ("memory", "published")):
        own, across = (load_checkpoint(tmp_path / f"{target}-{donors}") for donors in (target, other))
        assert all(torch.equal(across[name], tensor) for name, tensor in own.items())
        unchanged = load_checkpoint(tmp_path / target / "target")
        moved = [name for name in own if "experts" in name or "put_linear" in name]
        assert moved and not any(torch.equal(own[name], unchanged[name]) for name in moved)
