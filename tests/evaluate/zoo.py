"""Tiny models of the families that people have, with random weights; and, run with one's name and a directory, one of
them in vLLM: whether an engine swapped to a point answers as one started on the written checkpoint."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

_SHAPE = {  # under whatever name a family has for it
    "attn_layer_indices": None,
    "bos_token_id": 0,
    "d_model": 128,
    "eos_token_id": 1,
    "ffn_dim": 256,
    "first_k_dense_replace": 1,
    "head_dim": 32,
    "hidden_size": 128,
    "initializer_range": 0.3,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 64,
    "moe_k": 2,
    "moe_num_experts": 4,
    "n_embd": 128,
    "n_group": 1,
    "n_head": 4,
    "n_inner": 256,
    "n_layer": 2,
    "n_layers": 2,
    "n_positions": 512,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 32,
    "shared_expert_intermediate_size": 64,
    "topk_group": 1,
    "vocab_size": 70,
    "word_embed_proj_dim": 128,
}
_LINEAR = {  # of gated delta nets
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
_CONVOLUTION = {
    "block_dim": 128,
    "conv_dim": 128,
    "conv_dim_out": 128,
    "layer_types": ["conv", "full_attention"],
}
ZOO: dict[str, dict[str, Any]] = {  # by transformers' model_type: what else its tiny model needs
    "apertus": {},
    "arcee": {},
    "bloom": {},
    "cohere": {},
    "cohere2": {},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "topk_method": "noaux_tc",
    },
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "falcon": {},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 256},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm4": {},
    "glm4_moe": {"head_dim": 32, "topk_method": "noaux_tc"},
    "qwen3_5_moe_text": _LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "llama4_text": {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 256},
    "lfm2_moe": _CONVOLUTION | {"num_dense_layers": 1},
    "dots1": {},
    "exaone_moe": {},
    "hunyuan_v1_moe": {},
    "gpt2": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "granitemoeshared": {},
    "hunyuan_v1_dense": {},
    "lfm2": _CONVOLUTION,
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "nemotron": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "opt": {},
    "phi3": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_text": _LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": _LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
}


def make(kind: str, out: Path) -> Any:
    """A family of this `model_type`, far enough apart that α shows in every tensor."""
    from families import Family, _tokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    of_family = CONFIG_MAPPING[kind]
    known = of_family().to_dict().keys() | getattr(of_family, "attribute_map", {}).keys()
    config = of_family(**({key: value for key, value in _SHAPE.items() if key in known} | ZOO[kind]))
    for seed, name in enumerate(("target", "plus", "minus")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for tensor in model.state_dict().values():  # biases, norms and scalars are constant, which hides α
                if tensor.ndim < 2 or not tensor.any():
                    tensor.add_(torch.randn_like(tensor) * 0.3)
        model.save_pretrained(out / name)
        _tokenizer().save_pretrained(out / name)
    return Family(out / "target", out / "plus", out / "minus")


def main(kind: str, out: Path) -> None:
    """Prints what was found as one line of JSON."""
    from families import answers, start

    from rvdist.core.point import WeightPoint

    family = make(kind, out)
    engine = start(WeightPoint(str(family.target)))
    base = answers(engine)
    engine.swap(family.point(0.5))
    swapped = answers(engine)
    fresh = answers(start(family.write(0.5, out / "written")))
    engine.swap(family.point(0.0))
    found = {
        "probe": engine.info()["probe"],
        "texts": swapped.texts == fresh.texts,
        "scores": swapped.scores == fresh.scores,
        "moved": swapped.scores != base.scores,
        "back": answers(engine) == base,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1], Path(sys.argv[2]))
    os._exit(0)  # vLLM takes seconds to take itself down
