"""What asking would cost, foreseen."""

import json

import pytest
from checkpoints import POCKET

from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.schedule import cut
from rvdist.evaluate.foresight import Memory, load_of, mean_lengths
from rvdist.evaluate.request import Answered, Choice, Completion, Generate, Loglikelihood


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POCKET / "target")


def test_tokens_of_prompts_and_answers(tokenizer):
    """The pocket family's tokens are bytes."""
    generated = [Generate("x" * (10 + k % 3), 20 if k % 2 else 5) for k in range(600)]
    characters = sum(len(one.prompt) for one in generated)
    foreseen = load_of(generated, tokenizer, None)
    assert (foreseen.requests, foreseen.prompt, foreseen.made) == (600, characters, 7500) and not foreseen.known
    assert load_of(generated, tokenizer, 8.0).made == 300 * 8 + 300 * 5, "no answer is longer than it may be"
    assert load_of(generated, tokenizer, 8.0).known
    choices = load_of([Choice("abc", " d")] * 7, tokenizer, None)
    assert (choices.prompt, choices.made, choices.known) == (35, 7, True)
    assert load_of([], tokenizer, None).prompt == 0


def test_lengths_of_tasks_that_share_a_batch():
    asked = {"a": [Generate("x", 9)] * 3, "b": [Generate("y", 9)] * 2, "c": [Choice("x", "y")]}
    first, second = cut(WeightPoint("base"), asked, 8)
    answers = [Completion("", "stop", 1, tokens) for tokens in (1, 2, 3, 10, 20)]
    answered = {first: Answered(tuple(answers), 0, 0.1), second: Answered((Loglikelihood(0.0, True, 5),), 0, 0.1)}
    assert mean_lengths(answered) == {"a": 2.0, "b": 15.0}


def test_what_is_remembered(tmp_path):
    Memory().remember(tmp_path, "H100", 3_000, 999, 9.9, {"gsm8k": 100.0})
    assert not list(tmp_path.iterdir()), "too short to say something"
    Memory().remember(tmp_path, "H100", 3_000, 100_000, 20.0, {"gsm8k": 210.5, "choices": 0.0})
    Memory.read(tmp_path).remember(tmp_path, "A100", 1_000, 10_000, 10.0, {"gsm8k": 190.0})
    memory = Memory.read(tmp_path)
    assert memory.lengths == {"gsm8k": 190.0}
    assert memory.seconds("H100", 3_000, 100_000, 4) == 5.0
    assert memory.seconds("H100", 6_000, 100_000, 4) == 10.0, "twice the bytes"
    assert memory.seconds("T4", 3_000, 100_000, 4) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        json.dumps({"rates": {"H100": [0, 5]}, "lengths": {}}),
        json.dumps({"rates": {"H100": ["5", 5]}, "lengths": {}}),
        json.dumps({"rates": {"H100": [True, 5]}, "lengths": {}}),
        '{"rates": {"H100": [1e999, 5]}, "lengths": {}}',
        json.dumps({"rates": {}, "lengths": {"gsm8k": -1}}),
        "[" * 100_000,
    ],
)
def test_a_memory_that_is_damaged_says_nothing(tmp_path, content):
    (tmp_path / "speeds.json").write_text(content)
    memory = Memory.read(tmp_path)
    assert memory.seconds("H100", 1, 1, 1) is None and not memory.lengths
