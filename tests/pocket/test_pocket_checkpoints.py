"""The shipped checkpoints, as transformers and the safetensors header see them."""

import json
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from rvdist.pocket import GRPO, HERE, SFT, TARGET, measure

FILES = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


def header(directory):
    with (directory / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(size))
    tensors.pop("__metadata__", None)
    return tensors


@pytest.mark.parametrize("directory", [TARGET, SFT, GRPO], ids=lambda path: path.name)
def test_a_checkpoint_is_whole(directory):
    assert {path.name for path in directory.iterdir()} == FILES
    assert sum(path.stat().st_size for path in directory.iterdir()) < 1_500_000
    assert {tensor["dtype"] for tensor in header(directory).values()} == {"BF16"}
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert isinstance(model, Qwen2ForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings >= 8192
    assert model.config.tie_word_embeddings
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_the_family_has_one_shape():
    shapes = [{name: tensor["shape"] for name, tensor in header(path).items()} for path in (TARGET, SFT, GRPO)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_prompt_as_long_as_the_context_is_read():
    model = AutoModelForCausalLM.from_pretrained(TARGET)
    with torch.no_grad():
        logits = model(torch.full((1, 8192), 97), logits_to_keep=1).logits
    assert torch.isfinite(logits).all()


@pytest.mark.heavy
def test_the_vector_moves_accuracy_both_ways():
    """The shipped weights on 120 problems; the numbers in docs/pocket.md are over all of them."""
    family = measure.Family(HERE, torch.float32)
    low, middle, high = (measure.sums(family.at(alpha), family.tokenizer, 120) for alpha in (-1.0, 0.0, 1.0))
    assert sum(low) < 0.5 * 120 < sum(middle) < 0.9 * 120 < sum(high)
    assert measure.interval(low)[1] < measure.interval(middle)[0]
    assert measure.interval(middle)[1] < measure.interval(high)[0]
