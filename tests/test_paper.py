"""`experiment=paper_1_5b`, on models that are there: the paper's arms, real benchmark files, what lacks data named."""

import json
from pathlib import Path

import pytest
from checkpoints import POCKET, launch

from rvdist.core.record import read_records

SHARED = Path(__file__).resolve().parents[2] / "shared/benchmarks"
ARMS = ["Baseline", "G+T", "+Vector", "+Vector+Think", "−Vector"]
TASKS = ["gsm8k", "gsm8k+typos", "humaneval_instruct", "bbh_cot_fewshot_snarks"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks' files are not on this machine")
def test_every_arm_and_benchmark_for_which_there_is_data(tmp_path):
    done = launch(
        "experiment=paper_1_5b",
        *(f"{key}={POCKET / name}" for key, name in (("target", "target"), ("vector.plus", "grpo"))),
        f"vector.minus={POCKET / 'sft'}",
        *(f"benchmarks.data_dir={SHARED}", "benchmarks.limit=2", "benchmarks.allow_code_execution=true"),
        *(f"benchmarks.tasks=[{','.join([*TASKS, 'sciq'])}]", "engine.kv_cache_gib=0.25"),
        *("hydra.run.dir=run", "cache.dir=cache"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run/summary.json").read_text())
    assert {(row["arm"], row["task"]) for row in rows if row["primary"]} == {(a, t) for a in ARMS for t in TASKS}
    assert "left out: benchmarks.data_dir" in done.stdout and "sciq" in (tmp_path / "run/report.html").read_text()
    for arm in ARMS:
        for record in read_records(tmp_path / f"run/samples/{arm}.jsonl"):
            assert record.prompt_text.count("Think step by step.") == (record.prompt == "think"), record.task
