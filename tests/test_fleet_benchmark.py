"""The benchmark of the fleet compares like with like, and its long run ends in a table."""

import json
from pathlib import Path

import fleet
import pytest

from rvdist.core.record import Record, write_records


@pytest.fixture
def scored(tmp_path):
    """Our records and lm-eval's samples of both tasks at α = 0.5, four documents each; of the sums one differs."""
    records = []
    results = tmp_path / "theirs" / "a-model"
    for directory in (results, tmp_path / "ours" / "samples"):
        directory.mkdir(parents=True)
    for task, metric in zip(fleet.TASKS, ("exact_match", "acc"), strict=True):
        lines = []
        for k in range(4):
            prompt, doc = f"{task} {k}?", f"{task} {k}"
            records.append(Record("alpha=0.5", "", 0.5, "", task, "", 0, k, doc, {metric: 1.0}, prompt, "", "", ""))
            theirs = {"doc_hash": doc, "arguments": {"gen_args_0": {"arg_0": prompt}}, "metrics": [metric]}
            lines.append(json.dumps(theirs | {metric: float(metric == "acc" or k > 0)}))
        (results / f"samples_{task}_2026.jsonl").write_text("\n".join(lines))
    write_records(tmp_path / "ours" / "samples" / "alpha=0.5.jsonl", records)
    return tmp_path / "ours", fleet.Peer(0.5, 6.0, 30.0, tmp_path / "theirs")


def test_agreement_counts_scores_that_differ(scored):
    run, peer = scored
    assert fleet.agreement(run, [peer]) == fleet.Agreement(samples=8, different=1, largest=0.25)


def test_other_prompts_are_refused(scored):
    run, peer = scored
    (file,) = peer.results.glob("*/samples_pocket_sums_*")
    file.write_text(file.read_text().replace("pocket_sums 3?", "pocket_sums 3!"))
    with pytest.raises(SystemExit, match="pocket_sums at α = 0.5: .* not asked the same"):
        fleet.agreement(run, [peer])


def test_the_report_has_every_ratio():
    def run(wall):
        timing = {"phases": {"swap": 0.1, "generate": 5.0}, "fleet": {"requests": 100, "utilisation": 0.5, "swaps": 2}}
        return fleet.Ours(wall, timing)

    found = fleet.Measured([0.0, 1.0])
    found.tuned = [fleet.Peer(0.0, 0.0, 30.0, Path()), fleet.Peer(1.0, 6.0, 40.0, Path())]
    found.typed = [fleet.Peer(1.0, 8.0, 50.0, Path())]
    found.ours = {1: [run(10.0), run(8.0), run(9.0)], 2: [run(6.0), run(7.0), run(6.0)]}
    found.loads = [1.5, 2.5]
    found.agreement = fleet.Agreement(8, 1, 0.25)
    found.swaps = [fleet.Swap(400_000, 8.0, 0.5, [0.02, 0.04, 0.03], [0.01, 0.01, 0.02])]
    found.overhead = fleet.Overhead(100, [fleet.Round(1.05, 0.8, 0.9)] * 2, [fleet.Round(1.0, 0.9, 1.0)] * 2)
    text = fleet.report(found)
    assert "| mergekit, lm-eval, tuned | 76 | 8.4 | 12.7 | 1 | 6.0 (6.0 to 6.0) | 35.0 (30.0 to 40.0) |" in text
    assert "| the same, as typed, from 1 of the values | 108 | 12.0 | 18.0 |" in text
    assert "| rvdist, two engines | 6.0 (6.0 to 7.0) | 0.67 | 1.00 | 17 |" in text
    assert "of their scores 1 differ, of a task's mean at one α at most 25.0 points" in text
    assert "| 0.4 M | 8.0 | 0.50 | 0.030 (0.020 to 0.040) | 0.4% | 0.010 | 3.0 |" in text
    assert "ours takes 1.05 × as long, and 0.90 × the CPU." in text
