"""Edited questions: the drop within an arm, and the difference of differences, by document."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from made_up import make_arm, make_records, make_task
from scipy.stats import binomtest

from rvdist.report.findings import Findings
from rvdist.report.statistics.compare import compare_differences, holm, summarise
from rvdist.report.statistics.robustness import Edited, robustness, write_robustness

BASE, ARM = make_arm("baseline", 0.0), make_arm("α=1", 1.0)
TASK = "gsm8k"


def edited(scores: dict[str, dict[str, list]], baseline: str | None = "baseline") -> dict[tuple[str, str], Edited]:
    """`scores` by task, then by arm, in the order of the documents; the documents are the original's."""
    records = []
    for task, by_arm in scores.items():
        for arm, values in by_arm.items():
            made = make_records(arm, values, task)
            records += [type(r)(**{**vars(r), "doc": r.doc.replace(task, TASK)}) for r in made]
    arms = [arm for arm in (BASE, ARM) if arm.name in next(iter(scores.values()))]
    tasks = [make_task(task) for task in scores]
    found = robustness(arms, records, tasks, baseline, summarise(arms, records, tasks, baseline))
    return {(row.edit, row.arm): row for row in found}


def right(k: int, n: int) -> list[float]:
    return [1.0] * k + [0.0] * (n - k)


def test_the_drop_is_mcnemar_within_the_arm():
    rows = edited({TASK: {"baseline": right(60, 100)}, f"{TASK}+typos:0.2": {"baseline": right(48, 100)}})
    assert list(rows) == [("typos:0.2", "baseline")]
    row = rows["typos:0.2", "baseline"]
    assert (row.original, row.value, row.n) == (0.6, 0.48, 100)
    assert row.change.delta == pytest.approx(-0.12) and row.change.verdict == "worse"
    assert row.change.p_value == pytest.approx(binomtest(0, 12).pvalue) == row.change.p_adjusted
    assert row.gain is row.gain_change is row.persistence is None


def test_the_gains_are_those_of_the_summary():
    scores = {
        TASK: {"baseline": right(40, 100), "α=1": right(70, 100)},
        f"{TASK}+typos": {"baseline": right(35, 100), "α=1": right(60, 100)},
    }
    row = edited(scores)["typos", "α=1"]
    records = [r for task, arms in scores.items() for arm, s in arms.items() for r in make_records(arm, s, task)]
    before, after = summarise([BASE, ARM], records, [make_task(task) for task in scores], "baseline")[1::2]
    for gain, expected in ((row.gain_original, before), (row.gain, after)):
        assert (gain.delta, gain.ci_low, gain.ci_high) == (
            expected.delta,
            expected.delta_ci_low,
            expected.delta_ci_high,
        )
        assert (gain.p_value, gain.verdict) == (expected.p_value, expected.verdict)
    assert row.gain_change.delta == pytest.approx(-0.05)


def test_the_change_of_the_gain_is_the_clustered_interaction():
    """The same number, and nearly the same interval, as a regression with errors clustered by document."""
    rng = np.random.default_rng(3)
    n = 400
    ease = rng.random(n)
    chance = {("baseline", 0): 0.5, ("α=1", 0): 0.7, ("baseline", 1): 0.42, ("α=1", 1): 0.5}
    scores = {TASK: {}, f"{TASK}+shuffle": {}}
    lines = []
    for (arm, is_edited), p in chance.items():
        values = (0.7 * ease + 0.3 * rng.random(n) < p).astype(float)
        scores[f"{TASK}+shuffle" if is_edited else TASK][arm] = values.tolist()
        lines += [
            {"y": y, "arm": float(arm != "baseline"), "edited": is_edited, "doc": d} for d, y in enumerate(values)
        ]
    frame = pd.DataFrame(lines)
    fit = smf.ols("y ~ arm * edited", frame).fit(cov_type="cluster", cov_kwds={"groups": frame["doc"]})
    row = edited(scores)["shuffle", "α=1"]
    assert row.gain_change.delta == pytest.approx(fit.params["arm:edited"])
    theirs = fit.conf_int().loc["arm:edited"]
    assert (row.gain_change.ci_low, row.gain_change.ci_high) == pytest.approx(tuple(theirs), abs=0.012)
    assert row.gain_change.verdict == "worse" and row.persistence == "persists, but smaller"


@pytest.mark.parametrize(
    "original,perturbed,said",
    [
        ((40, 70), (40, 68), "persists"),
        ((40, 70), (40, 50), "persists, but smaller"),
        ((40, 50), (40, 80), "persists, and larger"),
        ((40, 70), (40, 40), "shrinks"),
        ((40, 48), (40, 44), "cannot be told"),
        ((40, 60), (40, 20), "reverses"),
        ((40, 41), (40, 41), "no detectable difference"),
        ((40, 41), (40, 70), "only when edited"),
        ((70, 40), (70, 42), "persists"),
        ((70, 40), (70, 70), "shrinks"),
    ],
)
def test_what_became_of_the_gain_in_words(original, perturbed, said):
    both = {
        TASK: dict(zip(("baseline", "α=1"), (right(k, 100) for k in original), strict=True)),
        f"{TASK}+typos": dict(zip(("baseline", "α=1"), (right(k, 100) for k in perturbed), strict=True)),
    }
    assert edited(both)["typos", "α=1"].persistence == said


def test_a_rounding_neither_persists_nor_grows():
    theirs = np.random.default_rng(0).random(40).tolist()
    ours = [x + 0.3 for x in theirs]
    row = edited(
        {
            TASK: {"baseline": theirs, "α=1": ours},
            f"{TASK}+typos": {"baseline": theirs, "α=1": [x + 0.1 + 0.2 for x in theirs]},
        }
    )["typos", "α=1"]
    assert (row.persistence, row.gain_change.delta, row.gain_change.p_value) == ("persists", 0.0, 1.0)


def draw_report(rng, gain: float):
    """Four arms and three edits, `gain` that of the first arm."""
    arms = [BASE, *(make_arm(f"α={i}", float(i)) for i in (1, 2, 3))]
    records = []
    chances = rng.random(40)
    for task in (TASK, *(f"{TASK}+{edit}" for edit in ("typos", "shuffle", "numbers"))):
        for arm in arms:
            ease = np.clip(chances + gain * (arm.alpha == 1), 0, 1)
            made = make_records(arm.name, (rng.random(40) < ease).astype(float).tolist(), task)
            records += [replace(r, doc=r.doc.replace(task, TASK)) for r in made]
    return arms, records, [make_task(task) for task in dict.fromkeys(r.task for r in records)]


@pytest.mark.parametrize("equal,gaining", [(8, 3), pytest.param(40, 10, marks=pytest.mark.slow)])
def test_what_is_said_of_equal_arms_is_corrected_and_contradicts_nothing(equal, gaining):
    """Of reports of equal arms at most one in twenty may claim something, and chance lets it be two more."""
    rng = np.random.default_rng(0)
    claiming = persisting = 0
    for report in range(equal + gaining):
        arms, records, tasks = draw_report(rng, 0.0 if report < equal else 0.35)
        rows = summarise(arms, records, tasks, "baseline")
        findings = Findings(arms, rows, records, tasks)
        said = [row for row in findings.edited if row.persistence_p is not None]
        claiming += bool(said) and report < equal
        survivors = {row.arm for row in rows if row.task == TASK and (row.p_adjusted or 1.0) < 0.05}
        for row in findings.edited:
            if row.persistence and ("persists" in row.persistence or row.persistence in ("reverses", "shrinks")):
                assert row.arm in survivors and row.persistence_p < 0.05
        text = " ".join(findings.claims)
        assert not (("none survives" in text or "can be told from chance" in text) and "persists" in text)
        persisting += report >= equal and any("persists" in (row.persistence or "") for row in findings.edited)
    assert claiming <= equal / 20 + 2 and persisting


def test_all_edits_together_count_a_document_once():
    n = 60
    rng = np.random.default_rng(4)
    base, ours = right(30, n), right(45, n)
    scores = {TASK: {"baseline": base, "α=1": ours}}
    for edit in ("typos", "shuffle", "numbers"):
        scores[f"{TASK}+{edit}"] = {
            arm: [s * float(rng.random() < 0.8) for s in values] for arm, values in scores[TASK].items()
        }
    rows = edited(scores)
    together = rows["all 3 edits", "α=1"]
    parts = [rows[edit, "α=1"] for edit in ("typos", "shuffle", "numbers")]
    assert together.n == n and together.value == pytest.approx(np.mean([row.value for row in parts]))
    assert together.change.delta == pytest.approx(np.mean([row.change.delta for row in parts]))
    assert together.gain_change.delta == pytest.approx(np.mean([row.gain_change.delta for row in parts]))
    width = together.change.ci_high - together.change.ci_low
    assert width > 0.4 * np.mean([row.change.ci_high - row.change.ci_low for row in parts])
    tests = [c for row in rows.values() for c in (row.change, row.gain, row.gain_change) if c]
    assert len(tests) == 4 * 2 + 4 + 4 and [c.p_adjusted for c in tests] == holm([c.p_value for c in tests])


def test_only_what_was_asked_both_ways_is_compared():
    rows = edited({TASK: {"baseline": right(60, 100)}, f"{TASK}+typos": {"baseline": right(30, 40)}})
    row = rows["typos", "baseline"]
    assert (row.n, row.original, row.value) == (40, 1.0, 0.75)
    assert edited({f"{TASK}+typos": {"baseline": right(3, 4)}}) == {}  # its original was not asked


def test_as_csv(tmp_path):
    rows = edited(
        {
            TASK: {"baseline": right(40, 100), "α=1": right(70, 100)},
            f"{TASK}+typos": {"baseline": right(35, 100), "α=1": right(60, 100)},
        }
    )
    write_robustness(tmp_path / "robustness.csv", list(rows.values()))
    with (tmp_path / "robustness.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(line["edit"], line["arm"]) for line in table] == list(rows)
    assert table[0]["gain_delta"] == "" and float(table[1]["gain_delta"]) == pytest.approx(0.25)
    assert float(table[1]["change_ci_low"]) == rows["typos", "α=1"].change.ci_low


def simulate(n, rounds, chances, repeats, seed=0):
    """How often the interval of the change of the gain holds the true one, and how often it excludes zero; `chances` of
    baseline and arm, as they are and edited."""
    rng = np.random.default_rng(seed)
    truth = (chances[3] - chances[2]) - (chances[1] - chances[0])
    held = called = 0
    for _ in range(rounds):
        ease = rng.uniform(-0.25, 0.25, (n, 1))
        base, arm, edited_base, edited_arm = ((rng.random((n, repeats)) < p + ease).mean(axis=1) for p in chances)
        change = compare_differences((edited_arm - edited_base) - (arm - base), np.ones(n), (n,), 2.0)
        held += change.low <= truth <= change.high
        called += change.p_value < 0.05
    return held / rounds, called / rounds


def test_the_change_of_the_gain_covers():
    held, _ = simulate(60, 300, [0.4, 0.6, 0.35, 0.45], 1)
    assert held >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("n,repeats", [(25, 1), (150, 1), (60, 4)])
def test_the_change_of_the_gain_covers_everywhere(n, repeats):
    held, _ = simulate(n, 2000, [0.4, 0.6, 0.35, 0.45], repeats)
    assert held >= 0.935
    held, called = simulate(n, 2000, [0.4, 0.5, 0.4, 0.5], repeats, seed=1)
    assert held >= 0.935 and called <= 0.065
