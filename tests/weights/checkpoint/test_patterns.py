"""A stranger's patterns mean what they mean to peft, and end."""

import json
import random
import re

import pytest
from hostile import refused
from safetensors.torch import save_file
from test_adapter import factors

from rvdist.weights.checkpoint.patterns import first_matches

NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head",
    "model.embed_tokens", "q_proj", "model.layers.0.mlp.experts.3.w1", "a\n", "model.layers.0.xq_proj", "", "naïve.É",
]  # fmt: skip
ORDINARY = [
    "q_proj", "self_attn.q_proj", r".*\.q_proj", r"model\.layers\.(0|1)\..*", r"layers.\d+.mlp.down_proj", "^q_proj",
    r"^model.layers.0.self_attn.q_proj", "(?i:LM_HEAD)", "lm_head|q_proj", "lm_head$", "w[12]", r"experts\.\d+\.w1",
    "a", "a.", "", ".", "q.proj", r"(.*)", "layers.0", "a)|(q_proj", "É", r"(?<=x)q_proj", r"([ql])m_head\1?",
]  # fmt: skip


def as_peft(patterns, name):
    """peft 0.21's get_pattern_key, in its own words."""
    return next((k for k, p in enumerate(patterns) if re.match(rf"(.*\.)?({p})$", name)), None)


def test_they_mean_what_they_mean_to_peft():
    for pattern in ORDINARY:
        assert first_matches([pattern], NAMES) == [as_peft([pattern], name) for name in NAMES], pattern
    chance = random.Random(0)
    for _ in range(5):
        some = chance.sample(ORDINARY, 6)
        assert first_matches(some, NAMES) == [as_peft(some, name) for name in NAMES], some
    many = [f"model.layers.{k}.self_attn.{m}_proj" for k in range(80) for m in "qkvo"]
    assert first_matches(many, many) == list(range(len(many)))


ENDLESS = "(a|a)*b", "(?:(?:.*)*)*#", "(.?){60}.{60}#", "^(([a-z])+.)+[A-Z]$"


def hostile(path, pattern, key):
    name = f"base_model.model.model.{'a' * 3000}.self_attn.q_proj"
    tensors = factors()
    a, b = (next(t for n, t in tensors.items() if f"lora_{k}.weight" in n) for k in "AB")
    path.mkdir()
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, key: pattern}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.heavy
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [ENDLESS[0], *(pytest.param(p, marks=pytest.mark.slow) for p in ENDLESS[1:])])
def test_a_pattern_that_does_not_end_is_ended(pattern, key, tmp_path):
    said = refused("rvdist.weights.checkpoint.source.open_source", hostile(tmp_path / "a", {pattern: 4}, key))
    assert f"damaged {key} (matching it takes more than" in said


@pytest.mark.parametrize("pattern", ["(" * 100_000, "a{9999999999999999999999}", "(?P<n>a)(?P=m)", "[z-a]", "(?<=a+)b"])
def test_what_is_no_pattern_is_refused(pattern, tmp_path):
    assert "damaged rank_pattern" in refused(
        "rvdist.weights.checkpoint.source.open_source", hostile(tmp_path / "a", {pattern: 4}, "rank_pattern")
    )
