"""Donors → vector → checkpoint → sweep → statistics → report, by the one command, on the pocket family."""

import json
import os
import re
import sqlite3
import subprocess
import sys

import forked
import pytest
from checkpoints import POCKET, launch

from rvdist.core.record import read_records
from rvdist.evaluate.fleet.arguments import EngineSettings
from rvdist.evaluate.fleet.engine import Engine
from rvdist.evaluate.request import Generate

pytestmark = pytest.mark.heavy

ALPHAS = [-1, 0.5, 1]
KEYS = (
    "arm point alpha prompt task metric filter primary higher_is_better seed value stderr ci_low ci_high n "
    "delta delta_ci_low delta_ci_high p_value p_adjusted verdict verdict_alone margin unseen "
    "tokens tokens_ci_low tokens_ci_high cut cut_ci_low cut_ci_high in_format in_format_ci_low in_format_ci_high "
    "value_in_format"
)


SCORING = (
    "experiment=demo",
    f"target={POCKET / 'target'}",
    f"vector.plus={POCKET / 'grpo'}",
    f"vector.minus={POCKET / 'sft'}",
    "benchmarks.limit=64",
    "engine.count=2",
)
ONE = "engine.count=1"  # changes no answer
REQUESTS = 64 + 4 * 64 + 64  # of an arm: sums, four choices each, control


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("end_to_end")
    arguments = ("alpha=1", f"sweep.alphas={ALPHAS}", "output=out", "cache.dir=cache", "hydra.run.dir=run")
    done = launch(*SCORING, *arguments, cwd=place, COLUMNS="120")
    assert done.returncode == 0, done.stderr
    return place, done.stdout


def score_again(place, alphas, cache, into):
    """The same scoring, without the merge; returns what the fleet did."""
    arguments = (f"sweep.alphas={alphas}", "output=null", f"cache.dir={cache}", f"hydra.run.dir={into}", ONE)
    done = launch(*SCORING, *arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    return json.loads((place / into / "timing.json").read_text())["fleet"]


def test_the_run_directory_is_as_promised(run):
    place, _ = run
    names = {path.name for path in (place / "run").iterdir()}
    assert {"summary.json", "results", "samples", "alpha.png", "report.html", "timing.json", "config.yaml"} <= names
    phases = json.loads((place / "run/timing.json").read_text())["phases"]
    wanted = ["imports", "ray_init", "index", "plan", "merge", "engine_start", "swap", "generate", "score", "report"]
    assert set(wanted) <= phases.keys()
    assert not list((place).glob("*.partial"))
    fleet = json.loads((place / "run/timing.json").read_text())["fleet"]
    assert (fleet["requests"], fleet["cached"]) == (4 * REQUESTS, 0)
    assert 0 < fleet["utilisation"] <= 1


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
    assert [a.text for a in engine.answer(requests)] == [r.response for r in records]


def test_the_page_is_one_file_without_a_network(run):
    place, _ = run
    page = (place / "run/report.html").read_text()
    assert "data:image/png;base64," in page and "alpha=1" in page and "experiment=demo" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="http' not in page


def test_what_was_answered_before_is_not_asked_again(run):
    place, _ = run
    assert score_again(place, ALPHAS, "cache", "again") == {"requests": 0, "cached": 4 * REQUESTS}
    assert (place / "again/summary.json").read_bytes() == (place / "run/summary.json").read_bytes()


@pytest.mark.slow
def test_the_demo_ends_as_the_readme_shows(tmp_path):
    """`make demo`, but for where things lie. The table of README.md is its output, some rows left out."""
    readme = (POCKET.parents[1] / "README.md").read_text()
    (block,) = re.findall(r"`make demo` ends like this:\n\n((?:    .*\n)+)", readme)
    shown = [line.strip() for line in block.splitlines() if line.strip() != "…"]
    done = launch("experiment=demo", *SCORING[1:4], "output=out", "cache.dir=cache", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [line.strip() for line in done.stdout.splitlines()]
    assert len(shown) == 7 and [line for line in printed if line in shown] == shown


@pytest.mark.slow
def test_another_alpha_asks_only_what_is_new(run):
    place, _ = run
    fleet = score_again(place, [*ALPHAS, 0.75], "cache", "more")
    assert (fleet["requests"], fleet["cached"]) == (REQUESTS, 4 * REQUESTS)
    assert {row["alpha"] for row in json.loads((place / "more/summary.json").read_text())} == {0, *ALPHAS, 0.75}


STANDING = """
import time
from rvdist.evaluate.cache import SampleCache
write = SampleCache.write
def stand(self, kept):
    if kept := list(kept):
        write(self, kept)
        print("written", flush=True)
        time.sleep(600)
SampleCache.write = stand
from rvdist.launch import main
main()
"""


def test_a_killed_run_resumes_with_all_that_it_answered(run):
    place, _ = run
    arguments = (f"sweep.alphas={ALPHAS}", "output=null", "cache.dir=killed", "hydra.run.dir=killed_run", ONE)
    command = [sys.executable, "-c", STANDING, *SCORING, *arguments]
    environment = {**os.environ, **forked.ray()}
    with subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert "written\n" in process.stdout
        process.kill()
    with sqlite3.connect(place / "killed/samples.sqlite") as cache:
        (before,) = cache.execute("SELECT sum(json_array_length(answers)) FROM slices").fetchone()
    assert 0 < before < 4 * REQUESTS
    fleet = score_again(place, ALPHAS, "killed", "resumed")
    assert (fleet["requests"], fleet["cached"]) == (4 * REQUESTS - before, before)
    assert (place / "resumed/summary.json").read_bytes() == (place / "run/summary.json").read_bytes()
