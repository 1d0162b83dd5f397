"""The benchmarks' own published sample outputs score here as they were published.

They are not ours to carry: clones of the originals' repositories (openai/grade-school-math, openai/human-eval,
suzgunmirac/BIG-Bench-Hard) are looked for in $RVDIST_PUBLISHED, or in shared/published beside this repository. What was
found there is in docs/replay.md.
"""

import json
import os
from pathlib import Path

import pytest
from checkpoints import POCKET
from transformers import AutoTokenizer

from rvdist.core.point import Arm, WeightPoint
from rvdist.evaluate.replay import Recording
from rvdist.evaluate.suite import Suite

SHARED = Path(__file__).resolve().parents[3] / "shared"
PUBLISHED = Path(os.environ.get("RVDIST_PUBLISHED", SHARED / "published"))
GSM8K = PUBLISHED / "grade-school-math/grade_school_math/data/example_model_solutions.jsonl"
HUMANEVAL = PUBLISHED / "human-eval/data"
BBH = PUBLISHED / "BIG-Bench-Hard"
ARM = Arm("baseline", WeightPoint("t"), alpha=0.0)
# By lm-eval's definition, which counts: three answers end without a full stop, and its filter takes their last bracket
# for one; the others hold a Q, such as the choice (Q), and there it stops.
FEWER = {
    "bbh_cot_fewshot_dyck_languages": 3,
    "bbh_cot_fewshot_formal_fallacies": 2,
    "bbh_cot_fewshot_reasoning_about_colored_objects": 7,
    "bbh_fewshot_reasoning_about_colored_objects": 6,
}

pytestmark = pytest.mark.slow


def needs(path):
    return pytest.mark.skipif(not path.exists(), reason=f"no {path.name} in $RVDIST_PUBLISHED")


def rows_of(file):
    return [json.loads(line) for line in file.read_text().rstrip("\n").split("\n")]


def scored(suite, outputs, directory):
    """lm-eval's results and the records of these outputs: by task the texts, in the order of its documents."""
    for task, texts in outputs.items():
        documents = suite.tasks[task].eval_docs
        samples = [
            {"doc_id": number, "doc": document, "resps": [[text]]}
            for number, (document, text) in enumerate(zip(documents, texts, strict=True))
        ]
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (directory / f"samples_{task}_2025-01-01T00-00-00.jsonl").write_text(lines)
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    answers, *_ = Recording(directory).answers(suite.documents_asked(tokenizer), "", 0, "baseline")
    results, records = suite.score(ARM, "", tokenizer, suite.requests(tokenizer), answers, 0)
    return results["results"], records


@needs(GSM8K)
@pytest.mark.parametrize("model", ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"])
def test_gsm8k(tmp_path, model):
    (tmp_path / "gsm8k_test.jsonl").write_text((GSM8K.parent / "test.jsonl").read_text())
    suite = Suite.load(["gsm8k_cot_zeroshot"], chat=False, data_dir=tmp_path)
    published = rows_of(GSM8K)
    texts = [row[model]["solution"] for row in published]
    _, records = scored(suite, {"gsm8k_cot_zeroshot": texts}, tmp_path)
    found = [record.metrics["exact_match"] == 1 for record in records if record.filter == "flexible-extract"]
    assert len(found) == 1319 and found == [row[model]["is_correct"] for row in published]


@needs(HUMANEVAL)
def test_humaneval(tmp_path):
    """Six answers to one problem, of which the original's README says that half are right."""
    (problem,) = rows_of(HUMANEVAL / "example_problem.jsonl")
    texts = [sample["completion"] for sample in rows_of(HUMANEVAL / "example_samples.jsonl")]
    (tmp_path / "humaneval.jsonl").write_text("".join(json.dumps(problem) + "\n" for _ in texts))
    suite = Suite.load(["humaneval"], chat=False, data_dir=tmp_path, code="strict")
    results, records = scored(suite, {"humaneval": texts}, tmp_path)
    assert results["humaneval"]["pass@1,create_test"] == 0.5
    assert [record.metrics["pass@1"] for record in records] == [0, 0, 0, 1, 1, 1]


@needs(BBH)
@pytest.mark.parametrize(("kind", "prefix"), [("cot", "bbh_cot_fewshot"), ("direct", "bbh_fewshot")])
def test_big_bench_hard(tmp_path, kind, prefix):
    suite = Suite.load([prefix], chat=False, data_dir=BBH)
    outputs, published = {}, {}
    for task, loaded in suite.tasks.items():
        stem = BBH / f"code-davinci-002-outputs/code-davinci-002-{kind}" / task.removeprefix(f"{prefix}_")
        given = json.loads(Path(f"{stem}_few_shot_template_0-255000.json").read_text())["outputs"]
        outputs[task] = [answer["prediction"] for answer in given]
        assert all(doc["input"] in one["input"] for doc, one in zip(loaded.eval_docs, given, strict=True))
        (metrics,) = rows_of(Path(f"{stem}_few_shot_template_0-255000_eval_metrics.jsonl"))
        published[task] = round(metrics["accuracy"] / 100 * len(given)) - FEWER.get(task, 0)
    _, records = scored(suite, outputs, tmp_path)
    found = dict.fromkeys(published, 0)
    for record in records:
        found[record.task] += int(record.metrics["exact_match"])
    assert found == published and len(found) == 27
