"""The engine against lm-eval's own vLLM backend, and its borders."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import SETTINGS, Family, start

from rvdist.core.errors import BadInput
from rvdist.core.point import Arm, WeightPoint
from rvdist.evaluate.fleet.arguments import (
    ALLOWED,
    REFUSED,
    EngineSettings,
    further_arguments,
    identity,
    vllm_arguments,
)
from rvdist.evaluate.fleet.engine import Engine
from rvdist.evaluate.request import Choice, Generate, Request, Rolling
from rvdist.evaluate.suite import Suite
from rvdist.evaluate.transcript import parse_answers
from rvdist.report.statistics.compare import summarise

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
    ours = tied.answer([Generate.from_lm_eval(prompt, kwargs) for prompt in PROMPTS])
    theirs = lm_eval_backend.generate_until([_Request(prompt, dict(kwargs)) for prompt in PROMPTS], disable_tqdm=True)
    assert [completion.text for completion in ours] == theirs
    assert any(completion.finish == "stop" for completion in ours)


def test_scores_are_lm_evals(tied: Engine, lm_eval_backend: Any) -> None:
    likeliest = tied.answer([Generate("what", 1)])[0].text
    pairs = [*PAIRS, ("what", likeliest)]
    ours = tied.answer([Choice(*pair) for pair in pairs])
    theirs = lm_eval_backend.loglikelihood([_Request(*pair) for pair in pairs], disable_tqdm=True)
    assert [(score.logprob, score.greedy) for score in ours] == theirs
    assert {score.greedy for score in ours} == {True, False}


def test_cut_prompts_are_lm_evals(families: dict[str, Family], lm_eval_backend: Any) -> None:
    engine = start(WeightPoint(str(families["tied"].target)), dataclasses.replace(SETTINGS, truncate=True))
    kwargs = {"until": [], "max_gen_toks": 100, "do_sample": False}
    long = "12 + 34" * 40
    (ours,) = engine.answer([Generate.from_lm_eval(long, kwargs)])
    assert [ours.text] == lm_eval_backend.generate_until([_Request(long, kwargs)], disable_tqdm=True)
    assert (ours.prompt_tokens, engine.truncated) == (156, 1)
    (score,) = engine.answer([Choice(long, "=46")])
    theirs = lm_eval_backend.loglikelihood([_Request(long, "=46")], disable_tqdm=True)
    assert [(score.logprob, score.greedy)] == theirs
    assert engine.truncated == 2
    resolved = engine.info()["resolved"]
    assert resolved["max_num_seqs"] == "16" and resolved["runner"].endswith("CPUModelRunner")
    assert resolved["attention_backend"] == "CPU_ATTN" and int(resolved["max_num_batched_tokens"]) > 0
    with pytest.raises(ValueError, match="no room for its context"):
        engine.answer([Choice("9", "7" * 300)])


TALE = "what is a tale? ab = 12 + 34 = 46, said a queen. "
TEXTS = ["ab=12+34", "", TALE * 14, TALE, "7" * 254, "7" * 255, "a" * 508 + "=  "]


def test_texts_of_any_length_score_as_lm_evals(tied: Engine, lm_eval_backend: Any) -> None:
    ours = tied.answer([Rolling(text) for text in TEXTS])
    theirs = lm_eval_backend.loglikelihood_rolling([_Request(text) for text in TEXTS], disable_tqdm=True)
    assert [score.logprob for score in ours] == pytest.approx(theirs, rel=1e-6)
    assert [score.tokens for score in ours] == [len(lm_eval_backend.tok_encode(text)) for text in TEXTS]
    assert max(score.tokens for score in ours) > 2 * SETTINGS.max_model_len


def test_windows_are_cut_into_batches_by_their_number_alone(tied: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tied.answer([Rolling(text) for text in TEXTS])
    monkeypatch.setattr("rvdist.evaluate.fleet.engine._TOKENS_AT_ONCE", 2 * SETTINGS.max_model_len)
    parts = tied.answer([Rolling(text) for text in TEXTS])
    assert [score.logprob for score in parts] == pytest.approx([score.logprob for score in whole], rel=1e-3)
    assert [score.tokens for score in parts] == [score.tokens for score in whole]


def write_task(directory: Path, name: str, settings: str, docs: list[dict[str, Any]]) -> None:
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (directory / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {directory}/{name}.jsonl}}}}\n{settings}"
    )


def test_a_perplexity_task_is_lm_evals(tied: Engine, lm_eval_backend: Any, tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate

    settings = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\nmetric_list:\n"
    settings += "".join(f"  - metric: {name}\n" for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"))
    pages = [TALE * 14, TALE, "what is 9? a 7", "queen of a tale, " * 40]
    write_task(tmp_path, "tale", settings, [{"page": page} for page in pages])
    suite = Suite.load(["tale"], tmp_path, chat=False)
    requests = suite.requests(tied._tokenizer)
    assert requests == {"tale": [Rolling(page) for page in pages]}
    arm, answers = Arm("baseline", WeightPoint("t"), alpha=0.0), {"tale": tied.answer(requests["tale"])}
    results, records = suite.score(arm, "digest", tied._tokenizer, requests, answers, seed=0)
    theirs = evaluate(lm=lm_eval_backend, task_dict=suite.loaded, bootstrap_iters=0)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        ours = results["results"]["tale"][f"{name},none"]
        assert ours == pytest.approx(theirs["results"]["tale"][f"{name},none"], rel=1e-6)
    infos = suite.infos(records)
    assert infos[0].primary == ("log2_word_perplexity", "none") and not any(infos[0].higher_is_better.values())
    assert suite.metrics_left_out(results, infos) == []
    bits = [-score.logprob / math.log(2) for score in answers["tale"]]
    words, size = [len(page.split(" ")) for page in pages], [len(page) for page in pages]
    for record, bit, word, byte in zip(records, bits, words, size, strict=True):
        per_byte = pytest.approx(bit / byte)
        assert record.metrics == {
            "log2_word_perplexity": pytest.approx(bit / word),
            "log2_byte_perplexity": per_byte,
            "bits_per_byte": per_byte,
        }
        assert (record.prompt_text, record.response) == (pages[record.doc_id], record.filtered)
    rows = summarise([arm], records, infos, baseline="baseline")
    assert rows[0].value == pytest.approx(sum(b / w for b, w in zip(bits, words, strict=True)) / 4)


REPEATS = """output_type: generate_until
doc_to_text: '{{q}}'
doc_to_target: '{{a}}'
repeats: 4
generation_kwargs: {until: ['b'], max_gen_toks: 12, do_sample: true, temperature: 0.7, top_p: 0.95SEED}
filter_list:
  - name: vote-of-3
    filter: [{function: take_first_k, k: 3}, {function: majority_vote}, {function: take_first}]
  - name: first
    filter: [{function: take_first}]
  - name: all
    filter: [{function: take_first_k, k: 4}]
process_results: !function passes.at
metric_list: [{metric: pass@1, aggregation: mean, higher_is_better: true}]
"""
PASSES = """import math
def at(doc, results):
    given = results[0] if isinstance(results[0], list) else results
    right = sum(one[:1] == doc["a"] for one in given)
    return {f"pass@{k}": 1 - math.comb(len(given) - right, k) / math.comb(len(given), k) for k in (1, len(given))}
"""


@pytest.mark.parametrize("seed", ["", ", seed: 3"])
def test_repeats_of_a_task_are_samples_of_their_own(tied: Engine, tmp_path: Path, seed: str) -> None:
    (tmp_path / "passes.py").write_text(PASSES)
    docs = [{"q": f"what is {k}+{k}? ", "a": str(2 * k)} for k in range(3)]
    write_task(tmp_path, "drawn", REPEATS.replace("SEED", seed), docs)
    suite = Suite.load(["drawn"], tmp_path, chat=False)
    asked = suite.requests(tied._tokenizer)["drawn"]
    assert [request.repeat for request in asked] == [0, 1, 2, 3] * 3 and len(set(asked)) == 3
    assert (asked[0].temperature, asked[0].top_p, asked[0].stop, asked[0].max_tokens) == (0.7, 0.95, ("b",), 12)
    slices = [asked[:6], asked[6:]]  # a border between the samples of a document
    completions = [completion for part in slices for completion in tied.answer(part)]
    assert completions == [completion for part in slices for completion in tied.answer(part)]
    texts = [completion.text for completion in completions]
    assert all(len(set(texts[k : k + 4])) > 2 for k in (0, 4, 8)) and not any("b" in text for text in texts)
    docs[0]["a"] = texts[3][:1]
    write_task(tmp_path, "drawn", REPEATS.replace("SEED", seed), docs)
    suite = Suite.load(["drawn"], tmp_path, chat=False)
    arm = Arm("baseline", WeightPoint("t"), alpha=0.0)
    _, records = suite.score(arm, "digest", tied._tokenizer, {"drawn": asked}, {"drawn": completions}, seed=0)
    first = {record.filter: record for record in records if record.doc_id == 0}
    assert first["first"].filtered == texts[0] and first["vote-of-3"].filtered in texts[:3]
    (shown,) = {record.response for record in first.values()}
    assert [answer.text for answer in parse_answers(shown, [asked[:4]])] == texts[:4] and shown == first["all"].filtered
    right = sum(text[:1] == docs[0]["a"] for text in texts[:4])
    assert first["all"].metrics == {"pass@1": right / 4, "pass@4": 1.0}
    (info,) = suite.infos(records)
    assert ("pass@4", "all") in info.metrics and info.higher_is_better["pass@4"]


def test_what_does_not_fit_is_refused_with_its_numbers(tied: Engine) -> None:
    with pytest.raises(ValueError, match="157 tokens and 100 to generate .* 256 tokens"):
        tied.answer([Generate("9", 8), Generate("7" * 157, 100)])
    with pytest.raises(ValueError, match="258 tokens and 1 to generate"):
        tied.answer([Choice("7" * 250, "=12+34=4")])
    with pytest.raises(ValueError, match="no tokens"):
        tied.answer([Generate("", 8)])
    assert tied.answer([Generate("7" * 156, 100)])[0].prompt_tokens == 156
    assert tied.answer([Choice("7" * 254, "1")])[0].tokens == 1


def test_the_order_of_a_batch_does_not_matter(tied: Engine) -> None:
    requests = [Generate(prompt, 24) for prompt in PROMPTS]
    assert tied.answer(requests[::-1]) == tied.answer(requests)[::-1]
    choices = [Choice(*pair) for pair in PAIRS]
    assert tied.answer(choices[::-1]) == tied.answer(choices)[::-1]


@pytest.mark.parametrize(
    "requests",
    [
        [Generate(prompt, 24) for prompt in PROMPTS],
        [Choice(*pair) for pair in PAIRS],
        [Rolling(text * 40) for text in PROMPTS[:4]],
    ],
)
def test_while_it_answers_it_tells_how_far_it_is(
    tied: Engine, monkeypatch: pytest.MonkeyPatch, requests: list[Request]
) -> None:
    """Told at every step it answers as when nobody asks, and what is told only grows, up to all."""
    untold = tied.answer(requests)
    monkeypatch.setattr("rvdist.evaluate.fleet.engine._TELL_EVERY", -1.0)
    monkeypatch.setattr("rvdist.evaluate.fleet.engine._TOKENS_AT_ONCE", 2 * SETTINGS.max_model_len)
    told, running = [], tied.answer_all(requests)
    with pytest.raises(StopIteration) as end:
        while True:
            told.append(next(running))
    if not isinstance(requests[0], Rolling):  # whose batches were other ones
        assert end.value.value == untold
    assert len(told) > 1 and told == sorted(told, key=lambda one: (one.steps, one.read, one.tokens, one.requests))
    assert told[-1].requests == len(requests) and told[-1].read == told[-1].prompt_tokens > 0
    assert all(one.requests <= len(requests) for one in told)
    if isinstance(requests[0], Generate):
        assert told[-1].tokens == sum(one.tokens for one in untold) and told[0].tokens < told[-1].tokens
        assert told[-1].prompt_tokens == sum(one.prompt_tokens for one in untold)


def test_a_batch_that_is_given_up_leaves_nothing_behind(tied: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Generate(prompt, 24) for prompt in PROMPTS]
    whole = tied.answer(requests)
    monkeypatch.setattr("rvdist.evaluate.fleet.engine._TELL_EVERY", -1.0)
    given_up = tied.answer_all([Generate("what", 200)])
    next(given_up)
    given_up.close()
    assert tied.answer(requests) == whole


def test_generation_arguments() -> None:
    assert Generate.from_lm_eval("p", {}) == Generate("p", 256)
    assert Generate.from_lm_eval("p", {"until": "x", "max_new_tokens": 5}) == Generate("p", 5, ("x",))
    assert Generate.from_lm_eval("p", {"until": ["", "x"]}).stop == ("x",), "as lm-eval does"
    assert Generate.from_lm_eval("p", {"do_sample": False, "temperature": 0.7}).temperature == 0
    assert Generate.from_lm_eval("p", {"temperature": 0.7}).temperature == 0.7
    assert Generate.from_lm_eval("p", {"do_sample": True}).temperature == 1
    with pytest.raises(ValueError, match="num_beams"):
        Generate.from_lm_eval("p", {"num_beams": 4})


PER_CHANNEL = further_arguments({"quantization": "fp8_per_channel"})


def test_a_quantized_base_is_refused(families: dict[str, Family], tmp_path: Path) -> None:
    copy = shutil.copytree(families["tied"].target, tmp_path / "quantized")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(BadInput, match="quantized"):
        start(WeightPoint(str(copy)))


def test_a_base_that_vllm_finds_quantized_is_refused(families: dict[str, Family], tied: Engine, tmp_path: Path) -> None:
    """By a file beside config.json, which names nothing."""
    copy = shutil.copytree(families["tied"].target, tmp_path / "quantized")
    (copy / "hf_quant_config.json").write_text(
        '{"quantization": {"quant_algo": "FP8"}, "producer": {"name": "modelopt"}}'
    )
    for args in ("{}", PER_CHANNEL):
        with pytest.raises(BadInput, match="quantiz"):
            start(WeightPoint(str(copy)), dataclasses.replace(SETTINGS, args=args))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"quantization": "fp8"}, "quantization='fp8' is not among those that leave a swap right: fp8_per_channel"),
        ({"quantization": ["fp8_per_channel"]}, "is not among those that leave a swap right"),
        ({"quantization_config": {}}, "quantization_config makes weights that no swap has been shown to give to"),
        ({"block_size": 32, "cpu_offload_gb": 4}, "cpu_offload_gb puts weights where no swap has been shown to reach"),
        ({"enable_sleep_mode": True}, "enable_sleep_mode lets an engine wake with other weights"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching is engine.prefix_caching"),
        ({"enable_lora": True}, "enable_lora adds weights that a swap leaves as they are"),
        ({"speculative_config": {"method": "ngram"}}, "speculative_config brings a second model"),
        ({"trust_remote_code": True}, "trust_remote_code runs code that comes with the checkpoint"),
        ({"load_format": "dummy"}, "load_format loads other weights"),
        ({"worker_extension_cls": "mine.Extension"}, "worker_extension_cls is the place of the swap"),
        ({"max_model_len": 9}, "max_model_len is decided by the target or by another key"),
        ({"nnodes": 2}, "nnodes wants a process started by hand on every node; set distributed_executor_backend=ray"),
        ({"distributed_executor_backend": "external_launcher"}, "'external_launcher' is not one of mp, ray"),
        ({"hf_overrides": {"eos_token_id": {1, 2}}}, "must be numbers, texts, lists and mappings, as in JSON"),
        ({"watermark": float("nan")}, "as in JSON"),
    ],
)
def test_arguments_that_would_spoil_answers_are_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=f"^engine.args: .*{reason}") as error:
        further_arguments(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["max_num_batch", "scheduler_cls", "hf_token", "of\na later\x1b[31m vLLM"])
def test_arguments_of_which_nothing_is_known_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match="is not among the arguments known to leave a swap right") as error:
        further_arguments({name: 9})
    assert str(error.value).isprintable()


def test_vllm_knows_what_is_refused_and_what_is_let_through(tied: Engine) -> None:
    from vllm.engine.arg_utils import EngineArgs

    ours = vllm_arguments("x", EngineSettings(), True).keys()
    refused = {name for names in REFUSED.values() for name in names.split()}
    allowed = set(ALLOWED.split())
    assert not refused & allowed
    assert refused | allowed | ours <= {field.name for field in dataclasses.fields(EngineArgs)}
    assert ours <= refused, "whoever overrides what an engine sets is told so"


def test_further_arguments_reach_vllm_and_name_the_answers(families: dict[str, Family], tied: Engine) -> None:
    base = str(families["tied"].target)
    settings = dataclasses.replace(SETTINGS, args=further_arguments({"max_num_batched_tokens": 1024, "block_size": 32}))
    config = start(WeightPoint(base), settings)._llm.llm_engine.vllm_config
    assert (config.scheduler_config.max_num_batched_tokens, config.cache_config.block_size) == (1024, 32)
    same = dataclasses.replace(SETTINGS, args=further_arguments({"block_size": 32, "max_num_batched_tokens": 1024}))
    assert settings == same and hash(settings) == hash(same)
    assert identity(settings, "cpu") == identity(same, "cpu") != identity(SETTINGS, "cpu")
    for arguments, reason in (
        ({"max_num_batched_tokens": "many"}, f"{base}: vLLM refuses to start on it with these settings .*many"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size and distributed_executor_backend=ray want GPUs"),
    ):
        with pytest.raises(BadInput, match=reason) as error:
            start(WeightPoint(base), dataclasses.replace(SETTINGS, args=further_arguments(arguments)))
        assert "\n" not in str(error.value)


def test_an_engine_over_several_nodes_is_configured(families: dict[str, Family], tied: Engine) -> None:
    """As far as vLLM checks it where there are no GPUs: nothing of it has run."""
    from vllm.config import ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    args = further_arguments({"pipeline_parallel_size": 2, "distributed_executor_backend": "ray"})
    settings = EngineSettings(tensor_parallel_size=4, args=args)
    arguments = EngineArgs(**vllm_arguments(str(families["tied"].target), settings, on_cpu=False))
    sizes = {name: getattr(arguments, name) for name in ("tensor_parallel_size", "pipeline_parallel_size")}
    parallel = ParallelConfig(distributed_executor_backend=arguments.distributed_executor_backend, **sizes)
    assert (parallel.world_size, parallel.use_ray) == (8, True)
    assert arguments.worker_extension_cls.endswith("SwapExtension")


def test_a_fresh_process_is_silent_and_takes_a_first_prompt_of_one_token(families: dict[str, Family]) -> None:
    program = f"""
from rvdist.evaluate.fleet.arguments import EngineSettings
from rvdist.evaluate.fleet.engine import Engine
from rvdist.evaluate.request import Generate
if __name__ == "__main__":
    engine = Engine({str(families["tied"].target)!r}, EngineSettings(max_model_len=64, kv_cache_gib=0.0625))
    engine.answer([Generate("a", 4)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_template_of_a_stranger_s_is_rendered_where_vllm_starts(families: dict[str, Family], tmp_path: Path) -> None:
    """vLLM renders one to warm up, in the engine's process, where nothing would end this one."""
    path = shutil.copytree(families["tied"].target, tmp_path / "target")
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (path / "chat_template.jinja").write_text(endless)
    engine = start(WeightPoint(str(path)))
    assert engine._tokenizer.chat_template == endless and len(engine.answer([Generate("12 + 34", 4)])) == 1


def test_shared_prefixes_are_of_one_batch_and_one_point(families: dict[str, Family]) -> None:
    """Prompts are read in part from each other; what was asked before, and other weights, change no answer."""
    family = families["tied"]
    target, other = WeightPoint(str(family.target)), family.point(1.0)
    settings = dataclasses.replace(SETTINGS, prefix_caching=True, args=json.dumps({"block_size": 32}))
    engine = start(target, settings)
    core, hits = engine._llm.llm_engine, [0]
    step = core.step

    def spying() -> Any:
        answers = step()
        hits[0] += sum(answer.num_cached_tokens or 0 for answer in answers)
        return answers

    core.step = spying
    common = "what is 12+34? ab " * 5
    batch = [Generate(f"{common}{k} = ", 12) for k in range(6)]
    before = [Generate(f"{common}what is 3+4?", 12), Generate("qu a a", 12)]

    def ask(requests: list[Generate]) -> list[Any]:
        *_, last = iter_all(engine.answer_all(requests))
        return last

    alone = ask(batch)
    assert hits[0] > 0
    hits[0] = 0
    ask([batch[0]])
    assert hits[0] == 0, "another batch"
    ask(before)
    assert ask(batch) == alone
    engine.swap(other)
    elsewhere = ask(batch)
    engine.swap(target)
    assert ask(batch) == alone != elsewhere
    engine.swap(other)
    assert ask(batch) == elsewhere
    fresh = start(target, settings)
    fresh.swap(other)
    assert fresh.answer(batch) == elsewhere


def iter_all(running: Any) -> Any:
    """All that comes, the end last."""
    while True:
        try:
            yield next(running)
        except StopIteration as end:
            yield end.value
            return


def test_keys_are_as_they_were_where_prefixes_are_not_shared() -> None:
    assert "prefix_caching" not in identity(EngineSettings(), "cpu")
    assert identity(EngineSettings(prefix_caching=True), "cpu")["prefix_caching"] is True


def test_how_weights_are_quantized_is_part_of_a_key() -> None:
    assert identity(EngineSettings(args=PER_CHANNEL), "cpu") != identity(EngineSettings(), "cpu")


def test_who_reads_is_no_part_of_a_key() -> None:
    assert identity(EngineSettings(readers=4, arithmetic="cuda"), "cpu") == identity(EngineSettings(), "cpu")
