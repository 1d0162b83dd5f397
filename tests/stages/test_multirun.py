"""`-m`: the jobs of a sweep on one Ray cluster and one warm fleet; each job ends as it would alone."""

import json
import shutil

import pytest
from checkpoints import POCKET, launch

pytestmark = pytest.mark.heavy

LIMIT = 8
SCORING = (
    "experiment=demo",
    f"vector.plus={POCKET / 'grpo'}",
    f"vector.minus={POCKET / 'sft'}",
    f"benchmarks.limit={LIMIT}",
    "sweep.alphas=null",
    "output=null",
    "engine.count=1",
    "hydra.sweep.dir=sweep",
)


def summary(directory):
    return (directory / "summary.json").read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The target, another one that is served alike, and a target that is not there."""
    place = tmp_path_factory.mktemp("multirun")
    shutil.copytree(POCKET / "target", place / "one")
    shutil.copytree(POCKET / "target", place / "two")
    shutil.copy(POCKET / "sft/model.safetensors", place / "two/model.safetensors")
    return place


def test_one_fleet_for_all_jobs_and_a_failure_that_loses_no_other(place):
    done = launch("-m", *SCORING, "target=one,two,nowhere", "alpha=0.5,1", "cache.samples=false", cwd=place)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("rvdist: ")] == done.stderr.splitlines()
    assert len(done.stderr.splitlines()) == 2
    assert "job 4 (target=nowhere alpha=0.5): nowhere: no such checkpoint directory" in done.stderr
    assert done.stdout.count("failed") == 2 and "target=two alpha=0.5" in done.stdout
    jobs = sorted(path.name for path in (place / "sweep").iterdir() if path.is_dir())
    assert jobs == ["0", "1", "2", "3"]
    page = (place / "sweep/report.html").read_text()
    assert "2 models" in page and "target=one" in page and page.count("<td>alpha=") == 4 and "nowhere" not in page
    points = {row["point"] for job in jobs for row in json.loads(summary(place / "sweep" / job))}
    fleet = json.loads((place / "sweep/3/timing.json").read_text())["fleet"]
    assert len(points) == 6 and (fleet["engines"], fleet["swaps"]) == (1, 5)
    requests = (1 + 4 + 1) * LIMIT * 6
    assert (fleet["requests"], fleet["cached"]) == (requests, 0), "every point once, the baselines too"
    alone = launch(*SCORING, "target=two", "alpha=0.5", "cache.dir=cache", "hydra.run.dir=alone", cwd=place)
    assert alone.returncode == 0, alone.stderr
    assert summary(place / "alone") == summary(place / "sweep/2")


@pytest.mark.slow
def test_what_is_discarded_is_merged_for_every_job(place):
    vector = (f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}")
    done = launch("-m", "target=one", *vector, "alpha=0.5,1", "output=/dev/null", "hydra.sweep.dir=discards", cwd=place)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("discarded")] == [
        "discarded /dev/null",
        "discarded /dev/null/1",
    ]


@pytest.mark.slow
def test_a_sweeper_that_asks_batch_by_batch_finds_the_fleet_warm(place):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    optuna = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.sampler.seed=0",
    ]
    arguments = ["target=one", "alpha=interval(-1,1)", "hydra.sweeper.direction=maximize", "hydra.sweep.dir=optuna"]
    done = launch("-m", *SCORING, *optuna, *arguments, "cache.dir=cache", cwd=place)
    assert done.returncode == 0, done.stderr
    first, *_, last = (json.loads((place / f"optuna/{job}/timing.json").read_text()) for job in range(4))
    assert first["phases"]["engine_start"] > 0 == last["phases"]["engine_start"]
    assert "ray_init" in first["phases"] and "ray_init" not in last["phases"] and last["fleet"]["requests"] > 0
    best = (place / "optuna/optimization_results.yaml").read_text()
    scores = [json.loads(summary(place / f"optuna/{job}")) for job in range(4)]
    means = [sum(r["value"] for r in rows if r["primary"] and r["alpha"]) / 3 for rows in scores]
    assert f"best_value: {max(means)}" in best
