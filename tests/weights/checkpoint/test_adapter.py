"""LoRA adapters: what they are opened as, and everything that must be refused in one sentence."""

import json
import math

import pytest
import torch
from adapters import EMBEDDING, close, differences, factors, write_adapter
from test_hub import hub, server  # noqa: F401  # fixtures

from rvdist.core.errors import BadInput
from rvdist.core.point import Vector
from rvdist.weights.checkpoint.difference import Difference
from rvdist.weights.checkpoint.digest import checkpoint_digest
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand
from rvdist.weights.store import Storage, save

Q = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{Q}.lora_{x}.weight" for x in "AB")


def opened(path):
    found = open_source(str(path))
    assert isinstance(found, Difference) and found.kind == "adapter"
    return found


def test_tensors_bear_the_names_and_shapes_of_the_model(tmp_path):
    found = opened(write_adapter(tmp_path / "a", factors()))
    assert {name: spec.shape for name, spec in found.tensors.items()} == {
        "model.layers.0.self_attn.q_proj.weight": (48, 48),
        "model.layers.2.mlp.up_proj.weight": (131, 48),
        "model.embed_tokens.weight": (301, 48),
    }
    assert {spec.dtype for spec in found.tensors.values()} == {"F32"}
    assert found.trained_on == "org/base"


def test_scale_follows_rank_alpha_and_their_patterns(tmp_path):
    tensors = factors() | {A: torch.randn(7, 48), B: torch.randn(48, 7)}
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 7}, "alpha_pattern": {"up_proj": 3, "proj": 5}}
    forms = opened(write_adapter(tmp_path / "a", tensors, **patterns)).forms
    assert forms[f"{Q}.weight"].scale == 10 / 7  # "proj" must match a whole component
    assert forms["model.layers.2.mlp.up_proj.weight"].scale == 3 / 4
    forms = opened(write_adapter(tmp_path / "b", tensors, use_rslora=True, **patterns)).forms
    assert forms[f"{Q}.weight"].scale == 10 / math.sqrt(7)


def test_the_stored_embedding_itself_is_left_alone(tmp_path):
    base_layer = {f"base_model.model.{EMBEDDING}.base_layer.weight": torch.zeros(301, 48)}
    assert f"{EMBEDDING}.weight" in opened(write_adapter(tmp_path / "a", factors() | base_layer)).forms


def test_the_config_is_part_of_the_contents(tmp_path):
    one, other = (write_adapter(tmp_path / k, factors(), lora_alpha=alpha) for k, alpha in (("a", 10), ("b", 11)))
    assert checkpoint_digest(opened(one)) != checkpoint_digest(opened(other))
    before = opened(one)
    (one / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(BadInput, match=r"adapter_config.json: changed while it was being read"):
        before.require_unchanged()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3', and only LORA is known"),
        ({"use_dora": True}, "has use_dora, and module .* no lora_magnitude_vector"),
        ({"target_parameters": ["down"]}, "target_parameters with 'down', which does not name its module"),
        ({"trainable_token_indices": [1]}, "and 0 tensors are of trained tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "changing the base's own weights; save it with peft's path_initial"),
        ({"r": 5}, r"have shapes \[48, 4\] and \[4, 301\], and adapter_config.json has rank 5"),
        ({"r": "4"}, "has r='4' for .*, which is no number"),
        ({"r": None}, "has r=None"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": 10**400}, "which is no number"),
        ({"rank_pattern": {"(": 4}}, "damaged rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "damaged rank_pattern"),
    ],
)
def test_configs_that_are_refused(tmp_path, config, reason):
    with pytest.raises(BadInput, match=reason):
        open_source(str(write_adapter(tmp_path / "a", factors(), **config)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({B: None}, f"module {Q} has lora_A where lora_A and lora_B belong"),
        ({A: None}, "has lora_B where"),
        ({A: torch.zeros(3, 48)}, r"shapes \[48, 4\] and \[3, 48\]"),
        ({A: torch.zeros(0, 48), B: torch.zeros(48, 0)}, "rank 4"),
        ({A: torch.zeros(4, 48, 1, 1)}, "has 4 dimensions, and only matrices"),
        ({A: torch.zeros(4, 48).double()}, "is stored as F64"),
        ({A: torch.zeros(4, 48).to(torch.float8_e4m3fn)}, "is stored as F8_E4M3"),
        ({f"base_model.model.{Q}.lora_B.bias": torch.zeros(48)}, "is no factor of a product"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": torch.zeros(48)}, "is no factor of a product"),
        ({"base_model.model.model.norm.weight": torch.zeros(9)}, "norm.weight is no factor"),
        ({"base_model.model.lm_head.base_layer.weight": torch.zeros(9, 9)}, "is no factor"),
        ({"../../etc/passwd.lora_A.weight": torch.zeros(4, 4)}, "does not begin with base_model.model."),
        ({f"base_model.model.{Q}.lora_embedding_A": torch.zeros(4, 4)}, "lora_embedding_A and lora_embedding_B belong"),
    ],
)
def test_weights_that_are_refused(tmp_path, change, reason):
    tensors = {name: tensor for name, tensor in (factors() | change).items() if tensor is not None}
    with pytest.raises(BadInput, match=reason) as refused:
        open_source(str(write_adapter(tmp_path / "a", tensors)))
    assert "\n" not in str(refused.value) and str(tmp_path / "a") in str(refused.value)


def test_pickled_adapters_and_lost_configs(tmp_path):
    path = write_adapter(tmp_path / "a", factors())
    (path / "adapter_config.json").unlink()
    with pytest.raises(BadInput, match="has adapter_model.safetensors but no adapter_config.json"):
        open_source(str(path))
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(BadInput, match="holds pickled weights, which can run code"):
        open_source(str(path))


def test_adapters_and_stored_vectors_on_the_hub(hub, tmp_path):  # noqa: F811
    hub.publish("org/lora", write_adapter(tmp_path / "a", factors()))
    found = opened("org/lora")
    operand = open_operand(found)
    for name, exact in differences(factors()).items():
        spec = found.tensors[name]
        read = operand.read(name, 0, spec.numel, torch.empty(spec.nbytes, dtype=torch.uint8))
        assert close(read.view(spec.shape), exact)
    save(Vector("org/lora"), {"org/lora": found}, tmp_path / "v", Storage(), say=lambda text: None)
    said = json.loads((tmp_path / "v" / "vector.json").read_text())
    assert said["donors"]["difference"] == {
        "name": "org/lora", "revision": found.hub.commit, "digest": checkpoint_digest(found)
    }  # fmt: skip
    hub.publish("org/vector", tmp_path / "v")
    stored = open_source("org/vector")
    assert isinstance(stored, Difference) and stored.kind == "vector" and "vector.json" in stored.stamps
