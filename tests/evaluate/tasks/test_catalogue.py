"""The paper's benchmarks from local files, plain and perturbed, through lm-eval and the suite.

The files are generated: rows made up here, in the schema and under the names of the originals. Where the originals lie
beside the repository they are tried, too.
"""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from checkpoints import POCKET
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from rvdist.core.errors import BadInput
from rvdist.core.point import Arm, WeightPoint
from rvdist.evaluate.request import Choice, Completion, Loglikelihood
from rvdist.evaluate.sandbox import sandbox
from rvdist.evaluate.suite import Suite
from rvdist.evaluate.tasks.local import LAYOUTS
from rvdist.evaluate.tasks.perturb import EDITS, Perturbation

HERE = Path(__file__).parent
REAL = HERE.parents[3] / "shared" / "benchmarks"
BBH = [path.stem for path in (Path(lm_eval.tasks.__file__).parent / "bbh" / "zeroshot").glob("[a-z]*.yaml")]
ARM = Arm("baseline", WeightPoint("t"), alpha=0.0)
ROBUSTNESS = ["gsm8k", *(f"gsm8k+{name}" for name in EDITS)]
no_sandbox = pytest.mark.skipif(
    bool(sandbox._refusal("namespaces") and sandbox._refusal("landlock")), reason="this kernel gives no sandbox"
)
needs_originals = pytest.mark.skipif(not REAL.exists(), reason="no benchmark files beside the repository")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POCKET / "target")


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Every data set of the paper. BIG-Bench-Hard's first subset has 4 documents, the others 2."""
    there = tmp_path_factory.mktemp("generated")
    like = (HERE / "gsm8k_like.jsonl").read_text()
    (there / "gsm8k_test.jsonl").write_text(like)
    (there / "gsm8k_train.jsonl").write_text(like)
    (there / "HumanEval.jsonl").write_text((HERE / "humaneval_5.jsonl").read_text())
    (there / "HumanEvalPlus-OriginFmt.jsonl").write_text((HERE / "humaneval_5.jsonl").read_text())
    (there / "bbh").mkdir()
    for subset in BBH:
        rows = [
            {"input": f"Which letter comes {k}th?\nOptions:\n(A) Alpha\n(B) Beta", "target": "(A)"}
            for k in range(4 if subset == "boolean_expressions" else 2)
        ]
        (there / "bbh" / f"{subset}.json").write_text(json.dumps({"canary": "generated", "examples": rows}))
    (there / "sciq").mkdir()
    for split in ("train", "valid", "test"):
        rows = [
            {
                "question": f"What is made-up fact {k} of {split} about?",
                "distractor3": "stone",
                "distractor1": "glass",
                "distractor2": "paper",
                "correct_answer": "wood",
                "support": " A tree is made of wood." * k,
            }
            for k in range(3)
        ]
        (there / "sciq" / f"{split}.json").write_text(json.dumps(rows))
    return there


def lm_eval_itself(task, splits, tmp_path, limit, **settings):
    """The contexts that lm-eval's own definition gives on these files, loaded by lm-eval."""
    folder = task.split("_")[0]
    manager = TaskManager(include_path=[Path(lm_eval.tasks.__file__).parent / folder], include_defaults=False)
    source = {"data_files": splits, "cache_dir": str(tmp_path), **settings}
    override = {"task": task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": source}
    (own,) = manager.load([{"group": "one", "task": [override]}])["tasks"].values()
    own.set_fewshot_seed(1234)
    own.build_all_requests(limit=limit)
    return [instance.args[0] for instance in own.instances]


@pytest.mark.parametrize(
    "originals", [False, pytest.param(True, marks=needs_originals)], ids=["generated", "originals"]
)
def test_prompts_are_those_of_lm_evals_own_definitions(generated, tokenizer, tmp_path, originals):
    there = REAL if originals else generated
    names = ["gsm8k", "gsm8k_cot_zeroshot", "bbh_cot_fewshot_snarks", "bbh_zeroshot_navigate"]
    asked = Suite.load(names, limit=30, chat=False, data_dir=there).requests(tokenizer)
    gsm8k = {split: str(there / f"gsm8k_{split}.jsonl") for split in ("train", "test")}
    for name in names[:2]:
        assert [request.prompt for request in asked[name]] == lm_eval_itself(name, gsm8k, tmp_path, 30)
    for name in names[2:]:
        file = {"test": str(there / "bbh" / f"{name.split('_')[-1]}.json")}
        assert [r.prompt for r in asked[name]] == lm_eval_itself(name, file, tmp_path, 30, field="examples")
    assert asked["gsm8k"][0].prompt.count("Question: ") == 6
    assert asked["bbh_cot_fewshot_snarks"][0].prompt.count("Let's think step by step.") == 4


@needs_originals
def test_the_original_files_are_read_whole(tokenizer):
    suite = Suite.load(["gsm8k_cot_zeroshot", "bbh_zeroshot"], data_dir=REAL)
    sizes = {name: len(documents) for name, documents in suite.documents.items()}
    assert sizes.pop("gsm8k_cot_zeroshot") == 1319 and len(sizes) == 27 and sum(sizes.values()) == 6511
    rows = [json.loads(line) for line in (REAL / "gsm8k_test.jsonl").read_text().splitlines()]
    assert list(suite.tasks["gsm8k_cot_zeroshot"].eval_docs) == rows


def test_the_score_of_big_bench_hard_is_weighted_by_size(generated, tokenizer):
    suite = Suite.load(["bbh_cot_fewshot"], data_dir=generated)
    requests = suite.requests(tokenizer)
    assert len(requests) == 27
    right = Completion("So the answer is (A).", "stop", 9, 9)
    wrong = Completion("So the answer is (B).", "stop", 9, 9)
    answers = {name: [right if len(asked) == 4 else wrong] * len(asked) for name, asked in requests.items()}
    results, records = suite.score(ARM, "digest", tokenizer, requests, answers, seed=0)
    assert results["groups"]["bbh_cot_fewshot"]["exact_match,get-answer"] == pytest.approx(4 / (4 + 26 * 2))
    assert len(records) == 56 and sum(record.metrics["exact_match"] for record in records) == 4
    assert {info.primary for info in suite.infos(records)} == {("exact_match", "get-answer")}


@pytest.mark.parametrize(
    ("task", "shots", "wanted", "counts"),
    [
        ("gsm8k", None, {}, "strict-match"),  # its examples end with "#### 5"
        ("gsm8k", 0, {}, "flexible-extract"),  # and without them nothing says so
        ("gsm8k_cot", None, {}, "strict-match"),
        ("gsm8k_cot_zeroshot", None, {}, "flexible-extract"),
        ("gsm8k_cot_zeroshot+typos", None, {}, "flexible-extract"),
        ("gsm8k_cot_llama", 0, {}, "strict-match"),  # "Your response should end with …"
        ("bbh_cot_zeroshot_hyperbaton", None, {}, "flexible-extract"),
        ("bbh_zeroshot_hyperbaton", None, {}, "flexible-extract"),
        ("bbh_cot_fewshot_hyperbaton", None, {}, "get-answer"),
        ("gsm8k", None, {"gsm8k": "flexible-extract"}, "flexible-extract"),
        ("gsm8k+typos", None, {"gsm8k": "flexible-extract"}, "flexible-extract"),
        ("gsm8k+typos", None, {"gsm8k": "flexible-extract", "gsm8k+typos": "strict-match"}, "strict-match"),
    ],
)
def test_the_score_that_counts_is_read_as_the_prompt_asks(generated, tokenizer, task, shots, wanted, counts):
    suite = Suite.load([task], data_dir=generated, limit=2, num_fewshot=shots, chat=False, primary=wanted)
    plain = Suite.load([task], data_dir=generated, limit=2, num_fewshot=shots, chat=False)
    requests = suite.requests(tokenizer)
    assert requests == plain.requests(tokenizer) and suite.versions == plain.versions, "as the cache's keys are made"
    answers = {task: [Completion("So it is 5.", "stop", 1, 1) for _ in requests[task]]}
    _, records = suite.score(ARM, "d", tokenizer, requests, answers, 0)
    (info,) = suite.infos(records)
    assert info.primary == ("exact_match", counts) and info.primary in info.metrics
    (info,) = suite.restrict({task: [1]}).infos(records)
    assert info.primary == ("exact_match", counts)


def test_the_score_of_a_group_that_counts_is_that_of_its_members(generated):
    suite = Suite.load(["bbh_cot_zeroshot"], data_dir=generated, limit=1)
    assert set(suite.primary.values()) == {"flexible-extract"} and len(suite.primary) == 27
    wanted = {"bbh_cot_zeroshot": "strict-match", "bbh_cot_zeroshot_hyperbaton": "flexible-extract"}
    suite = Suite.load(["bbh_cot_zeroshot"], data_dir=generated, limit=1, primary=wanted)
    others = {filtered for task, filtered in suite.primary.items() if task != "bbh_cot_zeroshot_hyperbaton"}
    assert others == {"strict-match"} and suite.primary["bbh_cot_zeroshot_hyperbaton"] == "flexible-extract"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"gsm8": "strict-match"}, "benchmarks.primary: gsm8 is none of the tasks that are asked; did you mean gsm8k"),
        ({"gsm8k": "strict"}, "gsm8k has no filter 'strict'; it has strict-match, flexible-extract"),
    ],
)
def test_a_filter_that_there_is_not_is_refused(generated, wanted, message):
    with pytest.raises(BadInput, match=message):
        Suite.load(["gsm8k"], data_dir=generated, limit=1, primary=wanted)


def test_sciq_is_asked_with_its_four_answers(generated, tokenizer):
    suite = Suite.load(["sciq"], chat=False, data_dir=generated)
    (asked,) = suite.requests(tokenizer).values()
    assert asked[4:8] == [
        Choice("A tree is made of wood.\nQuestion: What is made-up fact 1 of test about?\nAnswer:", f" {answer}")
        for answer in ("glass", "paper", "stone", "wood")
    ]
    answers = {"sciq": [Loglikelihood(-1.0 if k % 4 == 3 else -2.0, False, 1) for k in range(12)]}
    results, records = suite.score(ARM, "digest", tokenizer, {"sciq": asked}, answers, seed=0)
    assert results["results"]["sciq"]["acc,none"] == 1.0 and [r.target for r in records] == ["wood"] * 3


@no_sandbox
def test_programs_of_local_problems_are_judged(generated, tokenizer):
    names = ["humaneval", "humaneval_plus", "humaneval_instruct", "humaneval_plus_instruct"]
    suite = Suite.load(names, limit=1, code="degraded", data_dir=generated)
    requests = suite.requests(tokenizer)
    (solution, *_) = [json.loads(line) for line in (generated / "HumanEval.jsonl").read_text().splitlines()]
    assert all(solution["prompt"].strip() in requests[name][0].prompt for name in names)
    assert requests["humaneval_plus_instruct"] == requests["humaneval_instruct"]
    answers = {name: [Completion(solution["canonical_solution"], "stop", 9, 9)] for name in names}
    _, records = suite.score(ARM, "digest", tokenizer, requests, answers, seed=0)
    assert [record.metrics for record in records] == [{"pass@1": 1.0}] * 4


@pytest.mark.parametrize(
    "originals", [False, pytest.param(True, marks=needs_originals)], ids=["generated", "originals"]
)
def test_a_perturbed_task_edits_the_question_asked_and_nothing_else(generated, tokenizer, originals):
    suite = Suite.load(ROBUSTNESS, limit=25, chat=False, data_dir=REAL if originals else generated)
    requests = suite.requests(tokenizer)
    docs = list(suite.tasks["gsm8k"].eval_docs)[:25]
    for name, edit in EDITS.items():
        for doc, plain, edited in zip(docs, requests["gsm8k"], requests[f"gsm8k+{name}"], strict=True):
            examples, question = plain.prompt.rsplit("Question: ", 1)
            assert question == f"{doc['question']}\nAnswer:"
            again = Perturbation(name, edit.rate, 0)(doc["question"])
            assert edited.prompt == f"{examples}Question: {again}\nAnswer:"
            assert (edited.stop, edited.max_tokens) == (plain.stop, plain.max_tokens)

    right = [Completion(doc["answer"], "stop", 9, 9) for doc in docs]
    answers = {name: right[::-1] if name.endswith("typos") else right for name in requests}
    results, records = suite.score(ARM, "digest", tokenizer, requests, answers, seed=0)
    by_task = {name: [r for r in records if r.task == name and r.filter == "strict-match"] for name in ROBUSTNESS}
    documents = {name: [(r.doc_id, r.doc, r.target) for r in own] for name, own in by_task.items()}
    assert len(set(documents["gsm8k"])) == len(docs)
    assert all(own == documents["gsm8k"] for own in documents.values())  # how they are paired and clustered
    scores = {name: results["results"][name]["exact_match,strict-match"] for name in ROBUSTNESS}
    assert scores.pop("gsm8k+typos") < 0.3 and set(scores.values()) == {1.0}
    shown = json.loads(json.dumps(results["configs"]["gsm8k+typos"]))["doc_to_text"]
    assert shown["perturbation"] == {"name": "typos", "rate": 0.1, "seed": 0}


def test_rate_and_seed_stand_in_the_name(generated, tokenizer):
    names = ["gsm8k+typos:0.9", "gsm8k+typos:0.9:1", "gsm8k+typos:0.01"]
    asked = Suite.load(names, chat=False, num_fewshot=0, data_dir=generated).requests(tokenizer)
    assert len({tuple(request.prompt for request in own) for own in asked.values()}) == 3


def test_a_task_of_ones_own_is_perturbed_and_read_from_files(generated, tokenizer, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: openai/gsm8k\ndataset_name: main\noutput_type: generate_until\n"
        "test_split: test\ndoc_to_text: !function mine.ask\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['.']}\nmetric_list:\n  - metric: exact_match\n"
    )
    (tmp_path / "mine.py").write_text("def ask(doc):\n    return 'So: ' + doc['question']\n")
    suite = Suite.load(["mine+instruction"], tmp_path, chat=False, data_dir=generated)
    (asked,) = suite.requests(tokenizer).values()
    questions = [doc["question"] for doc in suite.tasks["mine+instruction"].eval_docs]
    edited = [Perturbation("instruction", 1.0, 0)(question) for question in questions]
    assert [request.prompt for request in asked] == [f"So: {text}" for text in edited]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bbh_zeroshot+typos", "bbh_zeroshot is a group; name those of its tasks that shall be perturbed"),
        ("humaneval+typos", "the questions of humaneval are programs; perturbations edit prose alone"),
        ("gsm8k+tpyos", r"did you mean gsm8k\+typos"),
    ],
)
def test_what_cannot_be_perturbed(generated, name, message):
    with pytest.raises(BadInput, match=message):
        Suite.load([name], code="degraded", data_dir=generated, include_path=generated)


def test_a_document_without_a_question_cannot_be_perturbed(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: generate_until\ntest_split: test\n"
        f"dataset_kwargs: {{cache_dir: {tmp_path}, data_files: {{test: {tmp_path}/mine.jsonl}}}}\n"
        "doc_to_text: '{{a}} {{b}}'\ndoc_to_target: '{{a}}'\ngeneration_kwargs: {until: ['.']}\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    (tmp_path / "mine.jsonl").write_text('{"a": "one", "b": "1"}\n')
    with pytest.raises(BadInput, match="one of question, problem, input; this one has a, b"):
        Suite.load(["mine+typos"], tmp_path)


def test_missing_files_stop_the_run_or_are_left_out(tmp_path):
    (tmp_path / "gsm8k_test.jsonl").write_text((HERE / "gsm8k_like.jsonl").read_text())
    with pytest.raises(BadInput, match="has no data for gsm8k's train split; looked for gsm8k_train, gsm8k/train"):
        Suite.load(["gsm8k"], data_dir=tmp_path)
    assert Suite.load(["gsm8k"], num_fewshot=0, data_dir=tmp_path).documents == {"gsm8k": range(6)}
    names = ["sciq", "gsm8k_cot_zeroshot", "bbh_zeroshot", "gsm8k+typos"]
    suite = Suite.load(names, data_dir=tmp_path, leave_out=True)
    assert list(suite.tasks) == ["gsm8k_cot_zeroshot"] and not suite.loaded["groups"]
    assert list(suite.lacking) == ["sciq", "bbh_zeroshot", "gsm8k+typos"]
    assert "has no data for sciq's test split; looked for sciq_test, sciq/test" in suite.lacking["sciq"]
    with pytest.raises(BadInput, match="has no data for"):
        Suite.load(["sciq", "bbh_zeroshot"], data_dir=tmp_path, leave_out=True)
    with pytest.raises(BadInput, match=r"benchmarks.data_dir: .*/nowhere is not a directory"):
        Suite.load(["gsm8k"], data_dir=tmp_path / "nowhere")


def test_the_papers_benchmarks_have_their_conf_and_their_docs():
    root = HERE.parents[2]
    tasks = yaml.safe_load((root / "conf" / "benchmarks" / "paper.yaml").read_text())["tasks"]
    assert {"sciq", "bbh_cot_fewshot", *ROBUSTNESS} < set(tasks)
    docs = (root / "docs" / "benchmarks.md").read_text()
    for dataset, layout in LAYOUTS.items():
        assert f"`{dataset}`" in docs
        assert all(f"`{name}`" in docs for name in layout.names), dataset
    assert all(f"`{name}`" in docs for name in EDITS)
