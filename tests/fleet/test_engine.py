"""The engine against lm-eval's own vLLM backend, and its borders."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import SETTINGS, Family, start

from rvdist.errors import BadInput
from rvdist.fleet.engine import Engine
from rvdist.fleet.request import Choice, Generate
from rvdist.point import WeightPoint

PROMPTS = ["ab=12+34", "qu a a ", " ", "<|im_end|>what is", "9", "\nQ: 472+314=?\nA: ", "a" * 150, "=  ab"]
GENERATION = [
    {"until": ["7", "ab"], "max_gen_toks": 40, "do_sample": False},
    {"until": [], "max_gen_toks": 40, "temperature": 0.0},
    {
        "until": ["\n", "7", "a"],
        "max_gen_toks": 20,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "seed": 3,
    },
]
PAIRS = [
    ("12+34", "=46 ab"),
    ("q a ", "a b"),  # white space moves
    ("=", " ab"),  # a token crosses the border
    ("", "7 and 8"),
    ("", "<|im_end|>7"),
    ("<|im_end|>ab", "ab"),
    ("aaaa", "."),
    ("what is 3+4?\n\n", "7"),
]


class _Request:
    """All that lm-eval's backends read of an Instance."""

    task_name = None

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def tied(families: dict[str, Family]) -> Engine:
    start(WeightPoint(str(families["moe"].target)))  # the first model of the process must have experts: see KINDS
    return start(WeightPoint(str(families["tied"].target)))


@pytest.fixture(scope="module")
def lm_eval_backend(families: dict[str, Family], tied: Engine) -> Any:
    """Made after an engine: vLLM finds out that it is a CPU build from the version that is patched here."""
    import vllm

    real = importlib.metadata.version
    with pytest.MonkeyPatch.context() as patch:  # a CPU build's distribution goes by another name
        patch.setattr(importlib.metadata, "version", lambda n: vllm.__version__ if n == "vllm" else real(n))
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(
            pretrained=str(families["tied"].target),
            max_model_len=SETTINGS.max_model_len,
            max_num_seqs=SETTINGS.max_num_seqs,
            kv_cache_memory_bytes=int(SETTINGS.kv_cache_gib * 2**30),
            seed=SETTINGS.seed,
            enforce_eager=True,
            enable_prefix_caching=False,
        )


@pytest.mark.parametrize("kwargs", GENERATION)
def test_completions_are_lm_evals(tied: Engine, lm_eval_backend: Any, kwargs: dict[str, Any]) -> None:
    ours = tied.generate([Generate.from_lm_eval(prompt, kwargs) for prompt in PROMPTS])
    theirs = lm_eval_backend.generate_until([_Request(prompt, dict(kwargs)) for prompt in PROMPTS], disable_tqdm=True)
    assert [completion.text for completion in ours] == theirs
    assert any(completion.finish == "stop" for completion in ours)


def test_scores_are_lm_evals(tied: Engine, lm_eval_backend: Any) -> None:
    likeliest = tied.generate([Generate("what", 1)])[0].text
    pairs = [*PAIRS, ("what", likeliest)]
    ours = tied.loglikelihood([Choice(*pair) for pair in pairs])
    theirs = lm_eval_backend.loglikelihood([_Request(*pair) for pair in pairs], disable_tqdm=True)
    assert [(score.logprob, score.greedy) for score in ours] == theirs
    assert {score.greedy for score in ours} == {True, False}


def test_cut_prompts_are_lm_evals(families: dict[str, Family], lm_eval_backend: Any) -> None:
    engine = start(WeightPoint(str(families["tied"].target)), dataclasses.replace(SETTINGS, truncate=True))
    kwargs = {"until": [], "max_gen_toks": 100, "do_sample": False}
    long = "12 + 34" * 40
    (ours,) = engine.generate([Generate.from_lm_eval(long, kwargs)])
    assert [ours.text] == lm_eval_backend.generate_until([_Request(long, kwargs)], disable_tqdm=True)
    assert (ours.prompt_tokens, engine.info()["truncated"]) == (156, 1)
    (score,) = engine.loglikelihood([Choice(long, "=46")])
    theirs = lm_eval_backend.loglikelihood([_Request(long, "=46")], disable_tqdm=True)
    assert [(score.logprob, score.greedy)] == theirs
    assert engine.info()["truncated"] == 2
    with pytest.raises(ValueError, match="no room for its context"):
        engine.loglikelihood([Choice("9", "7" * 300)])


def test_what_does_not_fit_is_refused_with_its_numbers(tied: Engine) -> None:
    with pytest.raises(ValueError, match="157 tokens and 100 to generate .* 256 tokens"):
        tied.generate([Generate("9", 8), Generate("7" * 157, 100)])
    with pytest.raises(ValueError, match="258 tokens and 1 to generate"):
        tied.loglikelihood([Choice("7" * 250, "=12+34=4")])
    with pytest.raises(ValueError, match="no tokens"):
        tied.generate([Generate("", 8)])
    assert tied.generate([Generate("7" * 156, 100)])[0].prompt_tokens == 156
    assert tied.loglikelihood([Choice("7" * 254, "1")])[0].tokens == 1
    assert tied.generate([]) == [] and tied.loglikelihood([]) == []


def test_the_order_of_a_batch_does_not_matter(tied: Engine) -> None:
    requests = [Generate(prompt, 24) for prompt in PROMPTS]
    assert tied.generate(requests[::-1]) == tied.generate(requests)[::-1]
    choices = [Choice(*pair) for pair in PAIRS]
    assert tied.loglikelihood(choices[::-1]) == tied.loglikelihood(choices)[::-1]


def test_generation_arguments() -> None:
    assert Generate.from_lm_eval("p", {}) == Generate("p", 256)
    assert Generate.from_lm_eval("p", {"until": "x", "max_new_tokens": 5}) == Generate("p", 5, ("x",))
    assert Generate.from_lm_eval("p", {"do_sample": False, "temperature": 0.7}).temperature == 0
    assert Generate.from_lm_eval("p", {"temperature": 0.7}).temperature == 0.7
    assert Generate.from_lm_eval("p", {"do_sample": True}).temperature == 1
    with pytest.raises(ValueError, match="num_beams"):
        Generate.from_lm_eval("p", {"num_beams": 4})


def test_a_quantized_base_is_refused(families: dict[str, Family], tmp_path: Path) -> None:
    copy = shutil.copytree(families["tied"].target, tmp_path / "quantized")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(BadInput, match="quantized"):
        Engine(str(copy), SETTINGS)


def test_a_fresh_process_is_silent_and_takes_a_first_prompt_of_one_token(families: dict[str, Family]) -> None:
    program = f"""
from rvdist.fleet.engine import Engine, EngineSettings
from rvdist.fleet.request import Generate
if __name__ == "__main__":
    engine = Engine({str(families["tied"].target)!r}, EngineSettings(max_model_len=64, kv_cache_gib=0.0625))
    engine.generate([Generate("a", 4)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
