"""HumanEval through lm-eval and the sandbox, on five of its problems; and who may run it."""

import json
import sys
from pathlib import Path

import pytest
from checkpoints import POCKET
from transformers import AutoTokenizer

from rvdist.core.errors import BadInput
from rvdist.core.point import Arm, WeightPoint
from rvdist.evaluate.request import Completion
from rvdist.evaluate.sandbox import sandbox
from rvdist.evaluate.suite import Suite
from rvdist.evaluate.tasks import catalogue

FIVE = Path(__file__).with_name("humaneval_5.jsonl")
ROWS = [json.loads(line) for line in FIVE.read_text().splitlines()]
ARM = Arm("baseline", WeightPoint("t"), alpha=0.0)


@pytest.fixture
def local(tmp_path):
    """Our tasks with the five problems as their data."""
    for name in ("humaneval", "humaneval_instruct", "humaneval_plus"):
        (tmp_path / f"{name}_5.yaml").write_text(
            f"include: {catalogue.OURS}/humaneval/{name}.yaml\ntask: {name}_5\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {FIVE}}}}}\n"
        )
    return tmp_path


@pytest.mark.skipif(
    bool(sandbox._refusal("namespaces") and sandbox._refusal("landlock")), reason="this kernel gives no sandbox"
)
@pytest.mark.parametrize(
    ("task", "ending"), [("humaneval_5", ""), ("humaneval_plus_5", ""), ("humaneval_instruct_5", "```\nIt works.")]
)
def test_answers_are_judged_in_the_sandbox(local, task, ending):
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    suite = Suite.load([task], local, chat=False, code="degraded")
    requests = suite.requests(tokenizer)
    (asked,) = requests.values()
    assert asked[0].stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint") and asked[0].max_tokens == 1024
    assert asked[0].temperature == 0 and ROWS[0]["prompt"].strip() in asked[0].prompt
    solutions = [row["canonical_solution"] + ending for row in ROWS]
    solutions[2] = "    return l\n"
    answers = {task: [Completion(text, "stop", 9, 9) for text in solutions]}
    results, records = suite.score(ARM, "digest", tokenizer, requests, answers, seed=0)
    assert results["results"][task]["pass@1,create_test"] == 0.8
    assert results["sandbox"] in ("namespaces", "landlock")
    assert [record.metrics for record in records] == [{"pass@1": float(k != 2)} for k in range(5)]
    assert records[0].filtered == f"passed ({results['sandbox']})"
    assert records[2].filtered.startswith(f"failed ({results['sandbox']}): AssertionError: ")
    (info,) = suite.infos(records)
    assert info.primary == ("pass@1", "create_test") and info.higher_is_better == {"pass@1": True}
    assert "lm_eval.tasks.humaneval.utils" not in sys.modules


def test_code_is_refused_unless_it_is_allowed(local):
    with pytest.raises(
        BadInput, match="humaneval_5 runs what the model wrote; set benchmarks.allow_code_execution=true"
    ):
        Suite.load(["humaneval_5"], local)


def test_code_that_would_run_outside_is_refused_before_it_is_loaded(tmp_path):
    (tmp_path / "loose.yaml").write_text(
        "task: loose\nunsafe_code: true\ndataset_path: json\noutput_type: generate_until\ntest_split: test\n"
        "doc_to_text: '{{q}}'\nmetric_list:\n  - metric: !function trap.score\n"
    )
    (tmp_path / "trap.py").write_text("raise SystemExit('this module must not be imported')\n")
    with pytest.raises(BadInput, match="loose runs what the model wrote outside our sandbox; leave it out"):
        Suite.load(["loose"], tmp_path, code="strict")
