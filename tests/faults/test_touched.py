"""What a sweep reads changes while engines answer: no answer that may be of it is scored or kept."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import pytest
from checkpoints import POCKET
from test_kills import BOTH, SCORED

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(
    ("touched", "kept"), [("grpo/model.safetensors", 1), ("target/model.safetensors", 0), ("target/tokenizer.json", 0)]
)
def test_a_source_that_is_touched_ends_the_sweep_which_goes_on(whole, tmp_path, touched, kept):
    """What the target alone answers is kept where a donor changes."""
    for name in ("target", "grpo", "sft"):
        shutil.copytree(POCKET / name, tmp_path / name)
    arguments = ["target=target", "vector.plus=grpo", "vector.minus=sft", *BOTH, *SCORED, "sweep.alphas=[0.5,1]"]

    def run(**environment):
        return whole(tmp_path, SimpleNamespace(environment=environment), *arguments, "stages=[evaluate]")

    status, errors = run(TOUCHED=str(tmp_path / touched))
    assert (status, errors.count("\n")) == (2, 1) and f"{touched}: changed while it was being read" in errors, errors
    with closing(sqlite3.connect(tmp_path / "cache/samples.sqlite")) as cache:
        assert cache.execute("SELECT count(*) FROM slices").fetchone() == (kept,)
    assert not (tmp_path / "run/summary.json").exists()
    status, errors = run()
    assert (status, errors) == (0, "")
    assert (tmp_path / "run/summary.json").exists()
