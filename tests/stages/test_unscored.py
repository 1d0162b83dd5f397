"""Arms whose points are not made of numbers: no score, no row, no answer kept; the others are scored; all is said."""

import json
import shutil
import sqlite3

import pytest
from checkpoints import POCKET, launch
from safetensors.torch import load_file, save_file

SCORING = (
    f"target={POCKET / 'target'}",
    f"vector.plus={POCKET / 'grpo'}",
    f"vector.minus={POCKET / 'sft'}",
    "benchmarks.tasks=[pocket_sums,pocket_choice]",
    "benchmarks.limit=8",
    "engine.count=1",
    "engine.max_model_len=1024",
    "engine.kv_cache_gib=0.0625",
    "cache.dir=cache",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`nan`: a donor with a NaN; and what the arms that can be scored answer alone."""
    place = tmp_path_factory.mktemp("unscored")
    shutil.copytree(POCKET / "grpo", place / "nan")
    tensors = load_file(place / "nan/model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, place / "nan/model.safetensors", {"format": "pt"})
    return place


def rows(directory):
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.slow
def test_arms_without_numbers_fail_by_name_and_the_others_are_scored(place):
    base, half = "{name: base, alpha: 0}", "{name: half, alpha: 0.5}"
    spoiled = f"{{name: spoiled, alpha: 1, vector: {{plus: {place}/nan, minus: {POCKET}/sft}}}}"
    arms = f"arms=[{base},{spoiled},{{name: large, alpha: 1e20}},{half}]"
    done = launch(*SCORING, arms, "hydra.run.dir=mixed", cwd=place)
    (sentence,) = done.stderr.splitlines()
    assert done.returncode == 1 and sentence.startswith("rvdist: ")
    assert "spoiled has no score: tensor model.norm.weight would be infinite or not a number: " in sentence
    assert str(place / "nan") in sentence
    assert "large has no score: " in sentence and "all other arms are scored" in sentence
    assert {row["arm"] for row in rows(place / "mixed")} == {"base", "half"}
    assert "spoiled has no score" in (place / "mixed/report.html").read_text()
    assert "spoiled has no score" in " ".join(done.stdout.split())
    kept = sqlite3.connect(place / "cache/samples.sqlite").execute("SELECT count(DISTINCT point) FROM slices")
    assert kept.fetchone() == (2,)

    alone = launch(*SCORING, f"arms=[{base},{half}]", "cache.samples=false", "hydra.run.dir=alone", cwd=place)
    assert alone.returncode == 0, alone.stderr
    assert rows(place / "alone") == rows(place / "mixed")
    assert (place / "alone/samples/half.jsonl").read_bytes() == (place / "mixed/samples/half.jsonl").read_bytes()


@pytest.mark.slow
def test_a_baseline_without_a_score_leaves_the_others_uncompared(place):
    done = launch(*SCORING, f"arms=[{{name: gone, weights: {place}/nan}},{{name: half, alpha: 0.5}}]", cwd=place)
    assert done.returncode == 1 and "gone has no score" in done.stderr
    (run,) = [path.parent for path in (place / "outputs").rglob("summary.json")]
    assert {(row["arm"], row["delta"], row["verdict"]) for row in rows(run)} == {("half", None, None)}


@pytest.mark.slow
def test_a_candidate_of_a_race_drops_out(place):
    racing = ("search=racing", "search.round=4", "sweep.alphas=[1e20,0.5,1]", "benchmarks.limit=20")
    done = launch(*SCORING, *racing, "hydra.run.dir=race", cwd=place)
    assert done.returncode == 1 and "alpha=100000000000000000000 has no score" in done.stderr, done.stderr
    found = json.loads((place / "race/search.json").read_text())
    assert found["best"] in found["means"].keys() == {"alpha=0.5", "alpha=1"}
    assert {row["arm"] for row in rows(place / "race")} == {"baseline", found["best"]}


@pytest.mark.slow
def test_a_trial_without_a_score_fails_and_the_study_goes_on(place):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    optuna = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1", "hydra.sweep.dir=optuna")
    trials = ("hydra.sweeper.sampler.seed=1", "hydra.sweeper.direction=maximize", "alpha=choice(1e20,1,0.5)")
    done = launch("-m", *SCORING, "sweep.alphas=null", *optuna, *trials, cwd=place)
    assert done.returncode == 1 and done.stderr.count("has no score") == 1, done.stderr
    summaries = [json.loads(path.read_text()) for path in sorted((place / "optuna").glob("*/summary.json"))]
    assert [{row["alpha"] for row in rows} for rows in summaries] == [{0.0, 1.0}, {0.0}, {0.0, 0.5}, {0.0, 0.5}]
    assert "alpha: 1e+20" not in (place / "optuna/optimization_results.yaml").read_text()
