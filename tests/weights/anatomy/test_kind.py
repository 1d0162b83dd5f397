import pytest

from rvdist.weights.anatomy.kind import in_order, kind_of

NAMES = {
    "model.embed_tokens.weight": "embedding",
    "transformer.wte.weight": "embedding",
    "lm_head.weight": "lm_head",
    "model.norm.weight": "norm",
    "transformer.ln_f.bias": "norm",
    "model.layers.0.input_layernorm.weight": "norm",
    "model.layers.11.self_attn.q_norm.weight": "norm",
    "model.layers.11.self_attn.q_proj.weight": "q_proj",
    "model.layers.11.self_attn.q_proj.bias": "q_proj",
    "model.layers.3.mlp.down_proj.weight": "down_proj",
    "model.layers.3.mlp.experts.17.down_proj.weight": "experts.down_proj",
    "model.layers.3.mlp.shared_experts.down_proj.weight": "shared_experts.down_proj",
    "model.layers.3.mlp.gate.weight": "gate",
    "model.layers.3.mlp.gate.e_score_correction_bias": "gate.e_score_correction_bias",
    "transformer.h.5.attn.c_proj.weight": "attn.c_proj",
    "transformer.h.5.mlp.c_proj.weight": "c_proj",
    "visual.blocks.2.attn.qkv.weight": "attn.qkv",
    "visual.merger.proj.weight": "proj",
    "scalar": "scalar",
    "weight": "weight",
    "features.0.weight": "features",
    "3": "3",
}


@pytest.mark.parametrize("name,kind", NAMES.items())
def test_the_kind_of_a_name(name, kind):
    assert kind_of(name) == kind


def test_kinds_stand_in_the_order_of_a_forward_pass():
    found = in_order(["down_proj", "gate", "k_proj", "lm_head", "gate", "embedding", "q_proj", "experts.up_proj"])
    assert found == ["embedding", "q_proj", "k_proj", "down_proj", "lm_head", "gate", "experts.up_proj"]
