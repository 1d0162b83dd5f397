"""What was recorded, by us or by lm-eval, is found again and scores as it did."""

import json
import random
from dataclasses import replace
from pathlib import Path

import lm_eval.tasks
import pytest
from checkpoints import POCKET
from lm_eval.tasks import TaskManager
from lm_eval_logs import Scripted, log_samples
from transformers import AutoTokenizer

from rvdist.core.errors import BadInput
from rvdist.core.point import Arm, WeightPoint
from rvdist.core.record import write_records
from rvdist.evaluate.fleet.schedule import cut
from rvdist.evaluate.replay import Recording, ReplayActor
from rvdist.evaluate.request import Completion, Generate, Loglikelihood
from rvdist.evaluate.suite import Suite

ARM = Arm("baseline", WeightPoint("t"), alpha=0.0)
REAL = Path(__file__).resolve().parents[3] / "shared" / "benchmarks"
DATE = "2025-01-02T03-04-05.678901"
TEXTS = [
    "",
    "one",
    "two\n[2 of 2, 3 characters]\nabc",
    "\n",
    "[1 of 2, 9 characters]",
    "ein Maß ñ\u2028 \U0001f600",
    "a|b",
]
LINE = {
    "doc_id": 0, "doc": "hash", "point": "digest", "task": "said", "seed": 0, "prompt_text": "q", "response": "r",
}  # fmt: skip
LOGGED = {"doc_id": 0, "doc_hash": "hash", "arguments": {"gen_args_0": {"arg_0": "q", "arg_1": {}}}, "resps": [["r"]]}
KINDS = {
    "said": "output_type: generate_until\nrepeats: 2\ngeneration_kwargs: {until: ['.']}\n"
    "metric_list: [{metric: exact_match}]\n",
    "chosen": 'output_type: multiple_choice\ndoc_to_choice: ["a", "b\\n-1.0 (greedy) a", a b]\ndoc_to_target: n\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]\n",
    "asked_twice": "output_type: multiple_choice\nrepeats: 2\ndoc_to_choice: [a, b]\ndoc_to_target: n\n"
    "metric_list: [{metric: acc}]\n",
    "ended": "output_type: loglikelihood\nmetric_list: [{metric: perplexity}, {metric: acc}]\n",
    "whole": "output_type: loglikelihood_rolling\ndoc_to_target: '{{q}}'\nmetric_list: [{metric: word_perplexity}]\n",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POCKET / "target")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One task of every kind of request. The last two documents are the same."""
    place = tmp_path_factory.mktemp("kinds")
    rows = [{"q": f"what is {k}?", "a": str(k), "n": k % 2} for k in (0, 1, 2, 3, 3)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {place}/rows.jsonl}}}}\ntest_split: test\n"
    for name, settings in KINDS.items():
        asked = "" if "doc_to_target" in settings else "doc_to_target: '{{a}}'\n"
        (place / f"{name}.yaml").write_text(f"task: {name}\n{source}doc_to_text: '{{{{q}}}}'\n{asked}{settings}")
    return place


@pytest.fixture(scope="module")
def suite(folder):
    return Suite.load(list(KINDS), include_path=folder, chat=False)


def made_up(requests, seed=0):
    drawn = random.Random(seed)
    return {
        task: [
            Completion(drawn.choice(TEXTS), "stop", 0, 0)
            if isinstance(request, Generate)
            else Loglikelihood(-drawn.expovariate(0.1), task != "whole" and drawn.random() < 0.5, 0)
            for request in asked
        ]
        for task, asked in requests.items()
    }


def lines_of(file):
    """Of JSON Lines; a text may hold other characters that end a line."""
    return file.read_text().rstrip("\n").split("\n")


def samples_of(suite, tokenizer, answers, seed=0, digest="digest"):
    return suite.score(ARM, digest, tokenizer, suite.requests(tokenizer), answers, seed)


@pytest.fixture(scope="module")
def recorded(suite, tokenizer, tmp_path_factory):
    """A run's samples, the answers that they are made of, and the results."""
    run = tmp_path_factory.mktemp("run")
    answers = made_up(suite.requests(tokenizer))
    results, records = samples_of(suite, tokenizer, answers)
    (run / "samples").mkdir()
    write_records(run / "samples" / "baseline.jsonl", records)
    return run, answers, results


def test_what_a_record_shows_is_read_again_to_the_last_digit(suite, tokenizer, recorded):
    run, answers, _ = recorded
    for path in (run, run / "samples", run / "samples" / "baseline.jsonl"):
        assert Recording(path).answers(suite.documents_asked(tokenizer), "digest", 0, "baseline") == (answers, 0, 0)
    responses = [json.loads(line) for line in lines_of(run / "samples/baseline.jsonl")]
    shown = next(sample["response"] for sample in responses if sample["task"] == "chosen")
    first = answers["chosen"][0]
    assert shown.split("\n")[0] == f"{first.logprob!r} ({'' if first.greedy else 'not '}greedy)  a"


def test_some_documents_alone_are_found(suite, tokenizer, recorded):
    run, answers, _ = recorded
    some = suite.restrict({"said": [1, 4], "chosen": [3]})
    found, *_ = Recording(run).answers(some.documents_asked(tokenizer), "digest", 0, "baseline")
    assert found == {"said": answers["said"][2:4] + answers["said"][8:], "chosen": answers["chosen"][18:24]}


def test_the_actor_answers_slices_as_an_engine_does(suite, tokenizer, recorded):
    _, answers, _ = recorded
    requests, point = suite.requests(tokenizer), WeightPoint("t")
    actor = ReplayActor("t", {(point, task): own for task, own in answers.items()})
    given = {task: [] for task in requests}
    for piece in cut(point, requests, 3):
        answered, swap = actor.answer(piece, piece.take(requests))
        assert swap == 0 and answered.truncated == 0
        given[piece.parts[0].task] += answered.answers
    assert given == answers


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"point": "another"}, "lacks answers to 25 of the 25 documents that alpha=1 is asked, first to said 0"),
        ({"point": "another"}, "nothing of these weights"),
        ({"seed": 1}, "nothing with this engine.seed"),
        ({"task": "sung"}, "nothing of this task"),
        ({"prompt_text": "What is it?"}, "nothing with this prompt"),
        ({"response": ""}, "first to said 0 (it shows answers to something else)"),
    ],
)
def test_what_lacks_is_said_in_one_sentence(suite, tokenizer, recorded, tmp_path, change, said):
    run, _, _ = recorded
    lines = map(json.loads, lines_of(run / "samples/baseline.jsonl"))
    (tmp_path / "changed.jsonl").write_text("".join(json.dumps(line | change) + "\n" for line in lines))
    with pytest.raises(BadInput) as error:
        Recording(tmp_path).answers(suite.documents_asked(tokenizer), "digest", 0, "alpha=1")
    sentence = str(error.value)
    assert said in sentence and "\n" not in sentence and "benchmarks.limit and num_fewshot" in sentence


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("-1.2345  a", "no log-likelihood, or one of 4 decimals, as older versions wrote it"),
        ("nan (greedy)  a", "its log-likelihood is not a number"),
        ("-1.5 (greedy)  b", "answers to something else"),
        ("-1.5 (greedy)  a", "answers to something else"),
        ("-1.5 (greedy)  a\n-1.5 (greedy)  b\n", "answers to something else"),
    ],
)
def test_what_is_no_answer_to_the_choices_is_said_so(suite, tokenizer, tmp_path, response, said):
    asked = suite.restrict({"asked_twice": [0]}).documents_asked(tokenizer)
    (document,) = asked["asked_twice"]
    once = {"asked_twice": [replace(document, requests=tuple(repeats[:1] for repeats in document.requests))]}
    line = LINE | {"task": "asked_twice", "prompt_text": "what is 0?", "response": response}
    (tmp_path / "baseline.jsonl").write_text(json.dumps(line))
    with pytest.raises(BadInput, match=said):
        Recording(tmp_path).answers(once, "digest", 0, "baseline")


def test_a_smaller_run_lacks_the_rest(suite, tokenizer, recorded, tmp_path):
    run, _, _ = recorded
    lines = lines_of(run / "samples/baseline.jsonl")
    (tmp_path / "some.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["doc_id"] < 2))
    with pytest.raises(BadInput, match=r"15 of the 25 documents .* first to said 2 \(nothing with this prompt\)"):
        Recording(tmp_path).answers(suite.documents_asked(tokenizer), "digest", 0, "baseline")


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "7", '"doc_id"', "null", "\ufeff{}", "[" * 100_000, '{"doc_id": ' + "9" * 5000 + "}",
        *(json.dumps(LINE | {key: value}) for key in LINE for value in (None, [], {}, 1.5, True, "\ud800")),
        *(json.dumps({k: v for k, v in LINE.items() if k != key}) for key in LINE),
        *(json.dumps(LOGGED | {key: value}) for key in [*list(LOGGED)[:2], "resps"] for value in (None, 1.5, "\ud800")),
        *(json.dumps(LOGGED | {"arguments": value}) for value in (7, "q", [7], [[]], {"a": {}}, [["q"], ["q"]])),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["baseline.jsonl", f"samples_said_{DATE}.jsonl"])
def test_a_line_that_is_no_sample_is_said_so(tmp_path, line, name):
    (tmp_path / name).write_text(f"\n{line}\n", encoding="utf-8", errors="surrogatepass")
    with pytest.raises(BadInput, match="line 2 is no sample; give a run directory of ours, or samples_TASK_DATE.jsonl"):
        Recording(tmp_path)


@pytest.mark.parametrize("response", [None, [], ["r", "s"], {}, "\ud800", ["-1", "maybe"], ["x", "True"], [[], []]])
def test_a_response_of_another_kind_is_lacking(suite, tokenizer, tmp_path, response):
    for task, document in suite.documents_asked(tokenizer).items():
        sample = {"doc_id": 0, "doc_hash": document[0].doc, "resps": [[response] * 2] * len(document[0].requests)}
        (tmp_path / f"samples_{task}_{DATE}.jsonl").write_text(json.dumps(sample))
    with pytest.raises(BadInput, match="lacks answers to 25 of the 25"):
        Recording(tmp_path).answers(suite.documents_asked(tokenizer), "digest", 0, "baseline")


def test_a_place_without_samples_is_said_so(tmp_path):
    with pytest.raises(BadInput, match="nowhere is neither a file nor a directory"):
        Recording(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no samples; give a run directory of ours"):
        Recording(tmp_path)
    (tmp_path / "mine.jsonl").write_text(json.dumps(LOGGED))
    with pytest.raises(BadInput, match="its name does not say of what task; call it samples_TASK_DATE.jsonl"):
        Recording(tmp_path)


def test_of_lm_evals_files_the_newest_counts_and_of_models_one_is_to_be_given(suite, tokenizer, tmp_path):
    only = replace(suite, limit=1).restrict({"said": [0]})
    (document,) = only.documents_asked(tokenizer)["said"]
    for model in ("one", "other"):
        for day, text in ((3, "new"), (2, "old")):
            file = tmp_path / model / f"samples_said_2025-01-0{day}T00-00-00.123456.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"doc_id": 0, "doc_hash": document.doc, "resps": [[text, text]]}))
    with pytest.raises(BadInput, match=r"holds samples of 2 models; give one, such as .*/one$"):
        Recording(tmp_path)
    found, reworded, _ = Recording(tmp_path / "one").answers(only.documents_asked(tokenizer), "digest", 0, "baseline")
    assert [answer.text for answer in found["said"]] == ["new", "new"] and reworded == 1


def lm_eval_itself(folder, out, answers, **settings):
    """lm-eval's own run of the tasks in a folder, with these answers."""
    tasks = TaskManager(include_path=[folder], include_defaults=False).load(list(KINDS))
    return log_samples(answers, tasks, out, **settings)


def reply(arguments, repeat):
    return random.Random(f"{arguments} {repeat}").choice([*TEXTS, *"0123"])


def score(arguments, repeat):
    drawn = random.Random(f"{arguments} {repeat}")
    return -drawn.expovariate(0.1), drawn.random() < 0.5


@pytest.mark.parametrize("change", [{}, {"arguments": None}, {"doc_hash": None}])
def test_lm_evals_samples_score_as_lm_eval_scored_them(folder, suite, tokenizer, tmp_path, change):
    """By prompt; by the document's hash, where prompts lack; by the document."""
    results = lm_eval_itself(folder, tmp_path, Scripted(reply, score))
    for file in tmp_path.glob("*/samples_*.jsonl"):
        lines = [json.loads(line) for line in lines_of(file)]
        kept = [{key: value for key, value in line.items() if key not in change} for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    recording = Recording(tmp_path)
    answers, reworded, _ = recording.answers(suite.documents_asked(tokenizer), "digest", 0, "baseline")
    ours, records = samples_of(suite, tokenizer, answers)
    assert ours["results"] == results["results"]
    assert recording.logged and reworded == (25 if "arguments" in change else 0)
    assert len(records) == 25


def gsm8k_by_lm_eval(out, rows, cache):
    """Made-up completions to the rows, scored by lm-eval's own definition of GSM8K."""
    manager = TaskManager(include_path=[Path(lm_eval.tasks.__file__).parent / "gsm8k"], include_defaults=False)
    source = {"data_files": {split: str(rows) for split in ("train", "test")}, "cache_dir": str(cache)}
    override = {"task": "gsm8k_cot_zeroshot", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": source}
    answers = {}
    for number, row in enumerate(map(json.loads, lines_of(rows))):
        right = row["answer"].split("#### ")[1]
        forms = (f"It is {right}.", f"so\nThe answer is {right}.", f"The answer is ${right}", "The answer is 1,23.", "")
        answers[row["question"]] = forms[number % len(forms)]

    def made_up_completion(arguments, repeat):
        (question,) = (question for question in answers if question in arguments[0])
        return answers[question]

    return log_samples(Scripted(made_up_completion), manager.load([{"group": "one", "task": [override]}]), out)


@pytest.mark.parametrize(
    "rows",
    [
        Path(__file__).parent / "tasks" / "gsm8k_like.jsonl",
        pytest.param(
            REAL / "gsm8k_test.jsonl",
            marks=pytest.mark.skipif(not REAL.exists(), reason="no benchmark files beside the repository"),
        ),
    ],
    ids=["generated", "original"],
)
def test_gsm8k_scores_as_lm_eval_scored_it(tokenizer, tmp_path, rows):
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(line + "\n" for line in lines_of(rows)[:40]))
    results = gsm8k_by_lm_eval(tmp_path / "out", tmp_path / "gsm8k_test.jsonl", tmp_path / "cache")
    suite = Suite.load(["gsm8k_cot_zeroshot"], chat=False, data_dir=tmp_path)
    recording = Recording(tmp_path / "out")
    answers, reworded, _ = recording.answers(suite.documents_asked(tokenizer), "digest", 0, "baseline")
    ours, _ = samples_of(suite, tokenizer, answers)
    names = ("exact_match,strict-match", "exact_match,flexible-extract")
    both = [{name: one["results"]["gsm8k_cot_zeroshot"][name] for name in names} for one in (ours, results)]
    assert both[0] == both[1] and reworded == 0
    assert 0 < both[0][names[0]] < both[0][names[1]] < 1
    chatty = Suite.load(["gsm8k_cot_zeroshot"], data_dir=tmp_path)
    assert Recording(tmp_path / "out").answers(chatty.documents_asked(tokenizer), "digest", 0, "baseline") == (
        answers,
        len(answers["gsm8k_cot_zeroshot"]),
        0,
    ), "in the chat template the prompts are others, and the documents the same"
