"""Configurations are compared by what they mean, however they are spelled."""

import json

import pytest
from checkpoints import tensors, write_checkpoint

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.configurations import compare_configs as differences

LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
          "rope_type": "llama3"}  # fmt: skip
FOUR = {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"}
FIVE = {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "dtype": "bfloat16"}


def test_rope_is_one_thing_in_two_spellings():
    assert list(differences(FOUR, FIVE)) == []
    other = {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}
    said = [("rope_parameters.rope_theta", 500000.0, 10000.0)]
    assert list(differences(FOUR, other)) == said == list(differences(FIVE, other))
    unknown = {"model_type": "nobody_knows"}
    assert list(differences(FOUR | unknown, other | unknown)) == said and not list(
        differences(FOUR | unknown, FIVE | unknown)
    )


def test_defaults_left_out_are_defaults_written():
    from transformers import Gemma3Config, Qwen2Config

    for config in (Qwen2Config(), Gemma3Config()):
        full, less = json.loads(config.to_json_string(use_diff=False)), json.loads(config.to_json_string())
        assert list(differences(full, less)) == [] == list(differences(full, {"model_type": full["model_type"]}))


def test_nested_configs_are_compared_too():
    text = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 20000.0, "sliding_window": 512}
    keys = {key for key, *_ in differences({"model_type": "gemma3"}, {"model_type": "gemma3", "text_config": text})}
    assert keys == {"text_config.rope_parameters.sliding_attention.rope_theta", "text_config.sliding_window"}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters", "hidden_size", "text_config", "model_type"])
@pytest.mark.parametrize("value", ["x", 7, [1], {"type": 7}, {"a": {"b": []}}, None])
def test_hostile_values_are_compared_all_the_same(key, value):
    for config in (FOUR, FIVE):
        list(differences(config, config | {key: value}))
        list(differences(config | {key: value}, config))


def test_a_config_that_nests_without_end_is_refused(tmp_path):
    write_checkpoint(tmp_path / "deep", tensors(0))
    (tmp_path / "deep" / "config.json").write_text('{"a":' * 200 + "1" + "}" * 200)
    with pytest.raises(BadInput, match=r"config.json: .*nests more than 64 levels"):
        open_source(str(tmp_path / "deep"))


def test_what_scales_an_output_is_not_what_asks_for_one():
    said = {"model_type": "nobody_knows", "output_multiplier": 1.0, "output_attentions": False}
    other = {"model_type": "nobody_knows", "output_multiplier": 2.0, "output_attentions": True}
    assert list(differences(said, other)) == [("output_multiplier", 1.0, 2.0)]
