"""Scoring what has the tokens of several models: in place as when it is written."""

import json

import pytest
from checkpoints import POCKET, launch
from moved import move

SCORING = (
    *("benchmarks.tasks=[pocket_sums,pocket_choice]", "benchmarks.limit=8", "sweep.alphas=null"),
    *("engine.count=1", "engine.kv_cache_gib=0.125", "cluster.nodes=1"),
)


def samples(run, arm):
    lines = (run / "samples" / f"{arm}.jsonl").read_text().splitlines()
    return [json.loads(line) | {"arm": None, "alpha": None} for line in lines]


@pytest.mark.slow
def test_scores_in_place_are_those_of_what_is_written(tmp_path):
    donors = {name: move(POCKET / name, tmp_path / name, f"<{name}>") for name in ("grpo", "sft")}
    given = (f"target={POCKET / 'target'}", f"vector.plus={donors['grpo']}", f"vector.minus={donors['sft']}")
    union = (*given, "tokenizer=union", "alpha=[0,0.5]", "output=out-{alpha}", "cache.dir=cache")
    done = launch(*union, *SCORING, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arms = "arms=[{name: baseline, weights: out-0}, {name: half, weights: out-0.5}]"
    done = launch("target=out-0", arms, *SCORING, "cache.dir=other", "hydra.run.dir=fresh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for arm, written in (("baseline", "baseline"), ("alpha=0.5", "half")):
        assert samples(tmp_path / "run", arm) == samples(tmp_path / "fresh", written)
    (start,) = (tmp_path / "cache" / "tokens").iterdir()
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (start / file).read_bytes() == (tmp_path / "out-0" / file).read_bytes()
    done = launch(*union, *SCORING, "hydra.run.dir=again", cwd=tmp_path)
    assert "no engine is needed" in done.stdout, done.stderr
