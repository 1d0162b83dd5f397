"""lm-eval's side of the fleet: requests in, scores out, on the pocket family's real tasks."""

import json
import math
from pathlib import Path

import pytest
from checkpoints import POCKET
from transformers import AutoTokenizer

from rvdist.core.errors import BadInput
from rvdist.core.point import Arm, WeightPoint
from rvdist.core.record import read_records, write_records
from rvdist.evaluate.request import Choice, Completion, Generate, Loglikelihood
from rvdist.evaluate.sandbox import sandbox
from rvdist.evaluate.suite import Suite
from rvdist.evaluate.tasks import catalogue

TASKS = ["pocket_sums", "pocket_choice", "pocket_control"]
ARM = Arm("baseline", WeightPoint("t"), alpha=0.0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POCKET / "target")


@pytest.fixture(scope="module")
def suite():
    return Suite.load(TASKS, limit=20)


def oracle(suite, requests, wrong=()):
    """Right answers, from the tasks' own documents, except for the documents in `wrong`."""
    answers = {}
    for name, task in suite.tasks.items():
        expected = answers[name] = []
        for doc_id, doc in enumerate(task.eval_docs):
            if doc_id == 20:
                break
            right = doc_id not in wrong
            if "choices" in doc:
                expected += [
                    Loglikelihood(-1.0 if (k == doc["label"]) == right else -9.0, False, 3)
                    for k in range(len(doc["choices"]))
                ]
            elif task.task_name == "pocket_sums":
                expected.append(Completion(f"work #### {int(doc['answer']) + (not right)}", "stop", 9, 9))
            else:
                expected.append(Completion(doc["answer"] if right else "no", "stop", 9, 9))
    assert {name: len(asked) for name, asked in requests.items()} == {name: len(a) for name, a in answers.items()}
    return answers


def test_a_template_that_refuses_a_role_is_named_with_task_and_key(tmp_path):
    """As Gemma's does: a task with a description has a system message."""
    (tmp_path / "asked.json").write_text(json.dumps([{"question": "1+1?", "answer": "2"}]))
    (tmp_path / "described.yaml").write_text(
        "task: described\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'asked.json'}}}}}\n"
        "description: 'Answer in digits. '\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['x'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    )
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    suite = Suite.load(["described"], tmp_path)
    assert suite.requests(tokenizer)["described"]
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(BadInput, match="task described: .*target refuses .*no system role.*apply_chat_template=false"):
        suite.requests(tokenizer)


def test_requests_are_in_the_chat_template_and_repeatable(suite, tokenizer):
    requests = suite.requests(tokenizer)
    kinds = {task: [type(r) for r in asked] for task, asked in requests.items()}
    assert kinds == {"pocket_sums": [Generate] * 20, "pocket_choice": [Choice] * 80, "pocket_control": [Generate] * 20}
    first = requests["pocket_sums"][0]
    assert first.prompt.startswith("User: ") and first.prompt.endswith("\nAssistant: ")
    assert first.temperature == 0 and "\n" in first.stop
    assert requests == suite.requests(tokenizer)


def test_without_a_template_the_question_stands_alone(tokenizer):
    (request,) = Suite.load(["pocket_sums"], limit=1, chat=False).requests(tokenizer)["pocket_sums"]
    assert "User:" not in request.prompt


@pytest.mark.parametrize(("wrong", "score"), [((), 1.0), (range(5), 0.75), (range(20), 0.0)])
def test_lm_eval_scores_what_the_engine_answered(suite, tokenizer, wrong, score):
    requests = suite.requests(tokenizer)
    results, records = suite.score(ARM, "digest", tokenizer, requests, oracle(suite, requests, wrong), seed=0)
    assert results["results"]["pocket_sums"]["exact_match,after-hashes"] == score
    assert results["results"]["pocket_choice"]["acc,none"] == score
    assert results["results"]["pocket_control"]["exact_match,stripped"] == score
    assert len(records) == 60 and {r.point for r in records} == {"digest"}
    for record in records:
        assert set(record.metrics.values()) == {float(record.doc_id not in wrong)}
        if not wrong:
            assert record.filtered == record.target
    infos = suite.infos(records)
    assert [info.name for info in infos] == TASKS and infos[1].primary == ("acc", "none")
    assert infos[0].higher_is_better == {"exact_match": True}


def test_some_documents_alone(suite, tokenizer):
    requests = suite.requests(tokenizer)
    answers = oracle(suite, requests, wrong=[2])
    _, whole = suite.score(ARM, "digest", tokenizer, requests, answers, seed=0)
    assert suite.documents == dict.fromkeys(TASKS, range(20))
    some = suite.restrict({"pocket_sums": [7, 2], "pocket_choice": [5], "pocket_control": []})
    asked = some.requests(tokenizer)
    places = {"pocket_sums": [2, 7], "pocket_choice": [20, 21, 22, 23]}
    assert asked == {task: [requests[task][k] for k in own] for task, own in places.items()}
    given = {task: [answers[task][k] for k in own] for task, own in places.items()}
    _, records = some.score(ARM, "digest", tokenizer, asked, given, seed=0)
    assert [(r.task, r.doc_id) for r in records] == [("pocket_sums", 2), ("pocket_sums", 7), ("pocket_choice", 5)]
    assert set(map(repr, records)) <= set(map(repr, whole))
    assert suite.requests(tokenizer) == requests


def test_records_survive_a_file(suite, tokenizer, tmp_path):
    requests = suite.requests(tokenizer)
    _, records = suite.score(ARM, "digest", tokenizer, requests, oracle(suite, requests), seed=0)
    write_records(tmp_path / "r.jsonl", records)
    assert list(read_records(tmp_path / "r.jsonl")) == records


def test_tasks_of_ones_own(tmp_path, tokenizer):
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: generate_until\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files: {{test: {tmp_path}/mine.jsonl}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 5}\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    (tmp_path / "mine.jsonl").write_text('{"q": "one", "a": "1"}\n{"q": "two", "a": "2"}\n')
    requests = Suite.load(["mine"], include_path=tmp_path, chat=False).requests(tokenizer)["mine"]
    assert [r.prompt for r in requests] == ["one", "two"] and requests[0].max_tokens == 5


def own_task(directory, settings, rows):
    (directory / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        f"dataset_kwargs: {{data_files: {{test: {directory}/mine.jsonl}}}}\n{settings}"
    )
    (directory / "mine.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return Suite.load(["mine"], include_path=directory, chat=False)


def test_a_perplexity_is_the_other_way_round(tmp_path, tokenizer):
    """lm-eval gives a sample's log-likelihood, of which more is better, for a metric of which less is."""
    suite = own_task(
        tmp_path,
        "output_type: loglikelihood\nmetric_list: [{metric: perplexity}, {metric: acc}]\n",
        ['{"q": "one", "a": "1"}', '{"q": "two", "a": "2"}'],
    )
    requests = suite.requests(tokenizer)
    answers = {"mine": [Loglikelihood(-math.log(2), True, 1), Loglikelihood(-3 * math.log(2), False, 1)]}
    results, records = suite.score(ARM, "digest", tokenizer, requests, answers, seed=0)
    assert [record.metrics["log2_perplexity"] for record in records] == pytest.approx([1, 3])
    assert results["results"]["mine"]["perplexity,none"] == pytest.approx(2**2)
    assert records[1].response == records[1].filtered == f"{-3 * math.log(2)} (not greedy) 2"
    (info,) = suite.infos(records)
    assert info.higher_is_better == {"log2_perplexity": False, "acc": True}
    assert suite.metrics_left_out(results, [info]) == []


def test_what_only_all_documents_together_have_is_said_to_be_left_out(tmp_path, tokenizer):
    suite = own_task(
        tmp_path,
        "output_type: multiple_choice\nrepeats: 2\ndoc_to_choice: [a, b]\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: acc}, {metric: mcc}]\n",
        ['{"q": "one", "a": 0}', '{"q": "two", "a": 1}'],
    )
    requests = suite.requests(tokenizer)
    assert requests["mine"][:3] == [Choice("one", " a"), Choice("one", " a"), Choice("one", " b")]
    answers = {"mine": [Loglikelihood(logprob, False, 1) for logprob in (-1.0, -1.0, -2.0, -2.0) * 2]}
    results, records = suite.score(ARM, "digest", tokenizer, requests, answers, seed=0)
    assert [record.metrics for record in records] == [{"acc": 1.0}, {"acc": 0.0}]
    shown = ["[1 of 2, 20 characters]", "-1.0 (not greedy)  a", "[2 of 2, 20 characters]", "-1.0 (not greedy)  a"]
    assert records[0].response.splitlines()[:4] == shown
    (sentence,) = suite.metrics_left_out(results, suite.infos(records))
    assert sentence == "mine: mcc is one number for all documents together and not a mean over them: see results/"


@pytest.mark.skipif(
    bool(sandbox._refusal("namespaces") and sandbox._refusal("landlock")), reason="this kernel gives no sandbox"
)
def test_every_sample_of_a_program_is_judged(tmp_path, tokenizer):
    """pass@k, for a task of one's own that asks HumanEval's questions several times."""
    five = Path(__file__).parent / "tasks" / "humaneval_5.jsonl"
    (tmp_path / "passes.py").write_text(
        "import math\n"
        "def at(doc, results):\n"
        "    (verdicts,) = results\n"
        "    n, wrong = len(verdicts), sum(not v.startswith('passed ') for v in verdicts)\n"
        "    return {f'pass@{k}': 1 - math.comb(wrong, k) / math.comb(n, k) for k in (1, 2)}\n"
    )
    (tmp_path / "thrice.yaml").write_text(
        f"include: {catalogue.OURS}/humaneval/humaneval.yaml\ntask: thrice\ndataset_path: json\nrepeats: 3\n"
        f"dataset_kwargs: {{data_files: {{test: {five}}}}}\n"
        'generation_kwargs: {until: ["\\ndef"], do_sample: true, temperature: 0.8, max_gen_toks: 64}\n'
        "filter_list:\n  - name: create_test\n    filter:\n      - function: custom\n"
        "        filter_fn: !function rvdist.evaluate.tasks.humaneval.verdicts.judge\n"
        "process_results: !function passes.at\n"
        "metric_list: [{metric: pass@1, aggregation: mean}, {metric: pass@2, aggregation: mean}]\n"
    )
    suite = Suite.load(["thrice"], tmp_path, limit=2, chat=False, code="degraded")
    requests = suite.requests(tokenizer)
    assert [(r.repeat, r.temperature, r.stop) for r in requests["thrice"]] == [
        (k, 0.8, ("\ndef",)) for k in (0, 1, 2)
    ] * 2
    right = [json.loads(line)["canonical_solution"] for line in five.read_text().splitlines()[:2]]
    texts = [right[0], "    return 7\n", "    return 8\n", right[1], right[1], right[1]]
    answers = {"thrice": [Completion(text, "stop", 9, 9) for text in texts]}
    results, records = suite.score(ARM, "digest", tokenizer, requests, answers, seed=0)
    assert [record.metrics for record in records] == [
        {"pass@1": pytest.approx(1 / 3), "pass@2": pytest.approx(2 / 3)},
        {"pass@1": 1.0, "pass@2": 1.0},
    ]
    assert results["results"]["thrice"]["pass@2,create_test"] == pytest.approx(5 / 6)
    assert records[0].filtered.count("\npassed (") == 1 and records[0].filtered.count("\nfailed (") == 2


def test_a_task_of_several_subgroups_counts_in_each(tmp_path):
    """lm-eval makes an object of it for each, and keeps one."""
    (tmp_path / "asked.json").write_text(json.dumps([{"question": "1+1?", "answer": "2"}]))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'asked.json'}}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: exact_match}]\n"
    )
    for group, members in {"one": "mine", "two": "mine", "both": "one, two"}.items():
        (tmp_path / f"{group}.yaml").write_text(
            f"group: {group}\ntask: [{members}]\naggregate_metric_list: [{{metric: exact_match}}]\n"
        )
    groups = Suite.load(["both"], tmp_path, chat=False).groups
    assert [(name, members) for name, (_, members) in groups.items()] == [(k, ["mine"]) for k in ("both", "one", "two")]
