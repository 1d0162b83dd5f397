"""What another seed would have shown."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from made_up import make_arm, make_records, make_task

from rvdist.report.statistics.seeds import _interval, seed_spread, write_seeds
from rvdist.report.summary import GroupInfo

BASE, ARM = make_arm("baseline", 0.0), make_arm("α=1", 1.0)


def drawn(arm: str, chance: float, n: int, seeds: int, task: str = "gsm8k"):
    """Records, and the scores by document and seed."""
    scores = (np.random.default_rng(len(arm)).random((n, seeds)) < chance).astype(float)
    return make_records(arm, scores.tolist(), task), scores


def test_each_seed_is_a_run_of_its_own(tmp_path):
    base, theirs = drawn("baseline", 0.5, 80, 4)
    arm, ours = drawn("α=1", 0.6, 80, 4)
    first, second = seed_spread([BASE, ARM], base + arm, [make_task()], "baseline")
    assert first.seeds == (0, 1, 2, 3) and first.values == pytest.approx(theirs.mean(axis=0))
    assert first.sd == pytest.approx(theirs.mean(axis=0).std(ddof=1)) and first.deltas is first.delta_sd is None
    assert second.deltas == pytest.approx(ours.mean(axis=0) - theirs.mean(axis=0))
    assert second.delta_sd == pytest.approx(np.std(second.deltas, ddof=1))
    assert first.sd_low < first.sd < first.sd_high
    write_seeds(tmp_path / "seeds.csv", [first, second])
    with (tmp_path / "seeds.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(line["arm"], line["seed"]) for line in table] == [
        (a, str(s)) for a in ("baseline", "α=1") for s in range(4)
    ]
    assert float(table[5]["delta"]) == second.deltas[1] and table[0]["delta"] == ""


def test_one_seed_has_no_spread():
    records = make_records("baseline", [1.0, 0.0]) + make_records("α=1", [[1.0, 0.0], [1.0, 1.0]])
    assert seed_spread([BASE], records[:2], [make_task()], "baseline") == []
    [alone] = seed_spread([BASE, ARM], records, [make_task()], None)  # the baseline has one seed, and is no reference
    assert (alone.arm, alone.values) == ("α=1", (1.0, 0.5))
    assert seed_spread([BASE, ARM], records, [make_task()], "baseline") == []


def test_a_group_has_a_spread_and_its_members_have_none():
    tasks = [make_task("a"), make_task("b")]
    a, ours = drawn("baseline", 0.5, 30, 3, "a")
    b, theirs = drawn("baseline", 0.5, 10, 3, "b")
    [group] = seed_spread([BASE], a + b, tasks, None, [GroupInfo("g", ("a", "b"), (("exact_match", "none"),))])
    assert group.task == "g" and group.values == pytest.approx(np.concatenate([ours, theirs]).mean(axis=0))


def test_the_interval_of_the_spread_covers():
    """Binomial scores of five seeds, 300 documents each."""
    scores = np.random.default_rng(0).binomial(300, 0.6, (4000, 5)) / 300
    truth = np.sqrt(0.6 * 0.4 / 300)
    low, high = np.array([_interval(sd, 5) for sd in scores.std(axis=1, ddof=1)]).T
    assert 0.94 < np.mean((low <= truth) & (truth <= high)) < 0.96


def test_equal_scores_say_nothing_of_how_far_seeds_may_differ():
    for values in ([[1.0, 0.0], [0.0, 1.0]], [[0.3, 0.1 + 0.2], [0.6, 0.6]]):  # 0.1 + 0.2 is not 0.3
        [spread] = seed_spread([BASE], make_records("baseline", values), [make_task()], None)
        assert (spread.sd, spread.sd_low, spread.sd_high) == (0.0, 0.0, None)
