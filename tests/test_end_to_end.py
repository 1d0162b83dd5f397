"""Donors → vector → checkpoint → sweep → statistics → report, by the one command, on the pocket family."""

import json

import pytest
from checkpoints import POCKET, launch

from rvdist.fleet.engine import Engine, EngineSettings
from rvdist.fleet.request import Generate
from rvdist.record import read_records

ALPHAS = [-1, 0.5, 1]
KEYS = (
    "arm point alpha prompt task metric filter primary higher_is_better seed value stderr ci_low ci_high n "
    "delta delta_ci_low delta_ci_high p_value p_adjusted verdict"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("end_to_end")
    done = launch(
        "experiment=demo",
        *(f"{key}={POCKET / name}" for key, name in (("target", "target"), ("vector.plus", "grpo"))),
        f"vector.minus={POCKET / 'sft'}",
        "alpha=1",
        f"sweep.alphas={ALPHAS}",
        "benchmarks.limit=64",
        "engine.count=2",
        "cache.dir=cache",
        "output=out",
        "hydra.run.dir=run",
        cwd=place,
        COLUMNS="120",
    )
    assert done.returncode == 0, done.stderr
    return place, done.stdout


def test_the_run_directory_is_as_promised(run):
    place, _ = run
    names = {path.name for path in (place / "run").iterdir()}
    assert {"summary.json", "results", "samples", "alpha.png", "report.html", "timing.json", "config.yaml"} <= names
    phases = json.loads((place / "run/timing.json").read_text())["phases"]
    wanted = ["imports", "ray_init", "index", "plan", "merge", "engine_start", "swap", "generate", "score", "report"]
    assert set(wanted) <= phases.keys()
    assert not list((place).glob("*.partial"))


def test_the_summary_says_what_happened(run):
    place, shown = run
    rows = json.loads((place / "run/summary.json").read_text())
    assert all(" ".join(row) == KEYS for row in rows)
    by_alpha = {row["alpha"]: row for row in rows if row["task"] == "pocket_sums"}
    assert by_alpha.keys() == {0.0, *ALPHAS}
    assert by_alpha[0.0]["delta"] is None and by_alpha[0.0]["arm"] == "baseline"
    assert by_alpha[1]["verdict"] == "better" and by_alpha[1]["delta_ci_low"] > 0
    assert by_alpha[-1]["verdict"] == "worse" and by_alpha[-1]["delta_ci_high"] < 0
    assert all(row["ci_low"] <= row["value"] <= row["ci_high"] and row["n"] == 64 for row in rows)
    assert len({row["point"] for row in rows}) == 4
    assert "alpha=1" in shown and "better" in shown and "worse" in shown


def test_scores_follow_from_the_records(run):
    place, _ = run
    rows = json.loads((place / "run/summary.json").read_text())
    for row in rows:
        records = [r for r in read_records(place / f"run/samples/{row['arm']}.jsonl") if r.task == row["task"]]
        assert len(records) == 64
        assert row["value"] == pytest.approx(sum(r.metrics[row["metric"]] for r in records) / 64)
        results = json.loads((place / f"run/results/{row['arm']}.json").read_text())["results"]
        assert results[row["task"]][f"{row['metric']},{row['filter']}"] == pytest.approx(row["value"])


def test_what_was_scored_in_place_is_what_was_written(run):
    """The engine that the sweep swapped to α = 1 wrote what one started from the written checkpoint writes."""
    place, _ = run
    records = [r for r in read_records(place / "run/samples/alpha=1.jsonl") if r.task == "pocket_sums"]
    engine = Engine(str(place / "out"), EngineSettings(max_model_len=1024, kv_cache_gib=0.125))
    requests = [Generate(r.prompt_text, 64, ("\n", "<|im_end|>")) for r in records]
    assert [a.text for a in engine.generate(requests)] == [r.response for r in records]


def test_the_page_is_one_file_without_a_network(run):
    place, _ = run
    page = (place / "run/report.html").read_text()
    assert "data:image/png;base64," in page and "alpha=1" in page and "experiment=demo" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="http' not in page
