"""The command with a replay in an engine's place, where vLLM cannot be imported: lm-eval's own run is scored again, and
ours after it; and what is written opens in lm-eval's own tools."""

import json
import os
import re
from pathlib import Path

import datasets
import forked
import pytest
import torch
from checkpoints import POCKET, launch
from lm_eval.api.model import TemplateLM
from lm_eval.loggers import EvaluationTracker, WandbLogger
from lm_eval.loggers.trackio_logger import TrackioLogger
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_results_filenames, make_table
from lm_eval_logs import log_samples
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.heavy

TASKS = ["pocket_sums", "pocket_choice", "ended", "whole"]
LIMIT = 12
OWN = {
    "ended": "output_type: loglikelihood\nmetric_list: [{metric: perplexity}, {metric: acc}]\n",
    "whole": "output_type: loglikelihood_rolling\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
}


class Transformers(TemplateLM):
    """A small model, one request at a time."""

    def __init__(self, path):
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self):
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def tok_encode(self, string, **settings):
        return self.tokenizer(string).input_ids

    def _loglikelihood_tokens(self, requests, **settings):
        return [self._score(context, continuation) for _, context, continuation in requests]

    @torch.no_grad()
    def _score(self, context, continuation):
        logits = self.model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        of_tokens = logits.log_softmax(-1)[range(len(continuation)), continuation]
        return float(of_tokens.sum()), logits.argmax(-1).tolist() == continuation

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [self._score([self.eot_token_id], self.tok_encode(one.args[0]))[0] for one in requests]

    def generate_until(self, requests, disable_tqdm=False):
        found = []
        for one in requests:
            prompt, settings = one.args
            tokens = torch.tensor([self.tok_encode(prompt)])
            written = self.model.generate(tokens, max_new_tokens=settings["max_gen_toks"], do_sample=False)
            text = self.tokenizer.decode(written[0, tokens.shape[1] :])
            for stop in settings["until"]:
                text = text.split(stop)[0]
            found.append(text)
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tasks of one's own, and a directory in which whatever imports vLLM fails."""
    place = tmp_path_factory.mktemp("rescoring")
    (place / "tasks").mkdir()
    rows = [{"q": f"{k} + {k} =", "a": f" {2 * k}"} for k in range(20)]
    (place / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in OWN.items():
        (place / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
            f"dataset_kwargs: {{data_files: {{test: {place}/tasks/rows.jsonl}}}}\n{settings}"
        )
    (place / "without" / "vllm").mkdir(parents=True)
    (place / "without" / "vllm" / "__init__.py").write_text("raise ImportError('vLLM is not installed')\n")
    return place


@pytest.fixture(scope="module")
def logged(place):
    """lm-eval's own run and log of the pocket tasks; its results."""
    folders = [POCKET / "tasks", place / "tasks"]
    tasks = TaskManager(include_path=folders, include_defaults=False).load(TASKS)
    settings = {"limit": LIMIT, "apply_chat_template": True, "fewshot_as_multiturn": True}
    return log_samples(Transformers(POCKET / "target"), tasks, place / "logged", **settings)


@pytest.fixture(scope="module")
def rescored(place):
    """`rescored(replay, into)`: the command, where vLLM cannot be imported."""
    path = os.pathsep.join(filter(None, [str(place / "without"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    line = forked.serve(forked.MODULES, environment)

    def score(replay, into):
        arguments = (
            *("engine=replay", f"engine.replay={replay}", f"target={POCKET / 'target'}", f"benchmarks.limit={LIMIT}"),
            *(f"benchmarks.tasks={TASKS}", f"benchmarks.include_path={place}/tasks", "cache.dir=cache"),
            f"hydra.run.dir={into}",
        )
        done = forked.ask(line, "rvdist.launch", arguments, place, environment, timeout=600)
        assert done.returncode == 0, done.stderr
        return place / into

    yield score
    line.close()


@pytest.fixture(scope="module")
def run(rescored, logged):
    return rescored("logged", "run")


def test_code_of_tasks_that_the_user_named_is_said_once(run):
    said = [json.loads(line)["message"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert sum("code of its tasks (!function) runs as you do" in message for message in said) == 1


@pytest.mark.slow
def test_lm_evals_own_run_scores_as_lm_eval_scored_it(run, logged):
    results = json.loads((run / "results/baseline.json").read_text())
    assert results["results"] == json.loads(json.dumps(logged["results"]))
    rows = {(row["task"], row["metric"]): row for row in json.loads((run / "summary.json").read_text())}
    for metric, task in (("exact_match", "pocket_sums"), ("acc", "pocket_choice"), ("acc", "ended")):
        (value,) = (v for key, v in logged["results"][task].items() if key.startswith(f"{metric},"))
        assert rows[task, metric]["value"] == value and rows[task, metric]["n"] == LIMIT
    assert 0 < logged["results"]["pocket_sums"]["exact_match,after-hashes"] < 1


def test_what_is_written_opens_in_lm_evals_own_tools(run, tmp_path):
    """Those that upload what they make of a file are used up to there."""
    file = run / "results" / "baseline.json"
    results = json.loads(file.read_text())
    score = results["results"]["pocket_sums"]["exact_match,after-hashes"]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in make_table(results).splitlines()]
    assert ["pocket_sums", "1", "after-hashes", "0", "exact_match", "↑", f"{score:.4f}", "±", "N/A"] in rows
    assert (
        datasets.load_dataset("json", data_files=str(file), cache_dir=str(tmp_path))["train"]["results"][0]
        == (results["results"])
    )
    wandb, trackio = (object.__new__(logger) for logger in (WandbLogger, TrackioLogger))
    for logger in (wandb, trackio):
        logger.post_init(results)
    assert wandb._get_config() == {"task_configs": results["configs"], "cli_configs": results["config"]}
    assert wandb._sanitize_results_dict()[1]["pocket_sums/exact_match,after-hashes"] == score
    assert trackio._flatten_results_for_log()["pocket_sums/exact_match,after-hashes"] == score
    assert results["config"]["model_args"]["pretrained"] == str(POCKET / "target"), "the uploader to Zeno reads it"
    assert {one["output_type"] for one in results["configs"].values()} == {
        *("generate_until", "multiple_choice", "loglikelihood", "loglikelihood_rolling")
    }
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.log_experiment_args("rvdist", results["config"]["model_args"], None, None, True)
    tracker.save_results_aggregated(results)
    (written,) = get_results_filenames([str(path) for path in tmp_path.rglob("*.json")])
    assert json.loads(Path(written).read_text())["results"] == results["results"]


def test_our_run_scores_as_it_did_and_nothing_is_cached(place, rescored, run):
    again = rescored("run", "again")
    assert (again / "summary.json").read_bytes() == (run / "summary.json").read_bytes()
    assert (again / "samples/baseline.jsonl").read_bytes() == (run / "samples/baseline.jsonl").read_bytes()
    assert not (place / "cache" / "samples.sqlite").exists()
    page = (again / "report.html").read_text()
    assert "engine mode" in page and str(place / "run") in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (["engine.replay=run"], " lacks answers to 600 of the 600 documents .*nothing of these weights"),
        (["engine.replay=logged", "arms=[{name:a,alpha:0},{name:b,alpha:0}]"], "of one model, and there are 2 arms"),
        ([], ": is not set; give a run directory of ours"),
    ],
)
def test_what_lacks_is_refused_before_anything_starts(place, run, setting, said):
    done = launch(
        *("engine=replay", *setting, f"target={POCKET / 'grpo'}", "cache.dir=cache"),
        *("benchmarks.tasks=[pocket_sums]", "hydra.run.dir=refused"),
        cwd=place,
    )
    assert done.returncode == 2 and not (place / "refused").exists()
    (sentence,) = (line for line in done.stderr.splitlines() if "INFO worker.py" not in line)  # Ray's own, if it was up
    assert re.match(f"rvdist: engine.replay.*{said}", sentence)


@pytest.mark.slow
def test_a_sweep_on_engines_scores_as_it_did(tmp_path):
    """Every arm by its weights, to the byte: texts, log-likelihoods, statistics."""
    settings = (
        "experiment=demo",
        *(f"{key}={POCKET / name}" for key, name in (("target", "target"), ("vector.plus", "grpo"))),
        *(f"vector.minus={POCKET / 'sft'}", "output=null", "benchmarks.limit=24", "sweep.alphas=[-1,1]"),
    )
    for how in ("engine.count=1 hydra.run.dir=run", "engine=replay engine.replay=run hydra.run.dir=again"):
        done = launch(*settings, "cache.dir=cache", *how.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for name in ("summary.json", *(f"samples/{arm}.jsonl" for arm in ("baseline", "alpha=-1", "alpha=1"))):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
