"""`stages=[plan]` of an evaluation: what it would ask, of which engines, for how long, and what it could show."""

import json
import re

import pytest
from checkpoints import POCKET, launch

pytestmark = pytest.mark.heavy
ASKED = (
    f"target={POCKET / 'target'}",
    f"vector.plus={POCKET / 'grpo'}",
    f"vector.minus={POCKET / 'sft'}",
    "sweep.alphas=[0.5,1]",
    "benchmarks=pocket",
    "benchmarks.tasks=[pocket_sums]",
    "stages=[plan]",
    "cache.dir=cache",
)


def test_what_an_evaluation_would_take(tmp_path):
    done = launch(*ASKED, "engine.count=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = [re.split("  +", line.strip()) for line in done.stdout.splitlines() if line.startswith("pocket_sums")]
    assert row[1:3] == ["600", "1,800"] and row[4:] == ["at most 115,200", "3.6 %", "6.3 %"]
    assert re.search(r"^2 engines of [\d.]+ cores each, .* for 3 arms and about ", done.stdout, re.MULTILINE)
    (kind,) = re.findall("no engine was measured on (.*) yet", done.stdout)
    assert "writes" not in done.stdout and not list(tmp_path.iterdir()), "nothing is merged, nothing is left"

    (tmp_path / "cache").mkdir()
    size = sum(path.stat().st_size for path in (POCKET / "target").glob("*.safetensors"))
    known = {"rates": {kind: [100.0, float(size)]}, "lengths": {"pocket_sums": 12.0}}
    (tmp_path / "cache/speeds.json").write_text(json.dumps(known))
    done = launch(*ASKED, "engine.count=2", "output=out-{alpha}", "alpha=[0.5,1]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = [re.split("  +", line.strip()) for line in done.stdout.splitlines() if line.startswith("pocket_sums")]
    read, made = (int(cell.replace(",", "")) for cell in row[3:5])
    assert made == 3 * 600 * 12
    (hours,) = re.findall(r"about ([\d.]+) hours, as last measured on", done.stdout)
    assert float(hours) == pytest.approx((read + made) / 100 / 2 / 3600, rel=0.05)
    assert "out-0.5: target" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_engines_that_cannot_be_had_here_are_said(tmp_path):
    done = launch(*ASKED, "engine.device=cuda", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cannot be foretold here: engine.device=cuda: the cluster has no GPU" in done.stdout
