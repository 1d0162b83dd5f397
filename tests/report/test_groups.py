"""A group's score: weighted as it says, with an interval of its own, beside what SciPy and theory say."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import make_arm, make_records, make_task
from scipy.stats import bootstrap
from statsmodels.stats.proportion import proportion_confint

from rvdist.report.statistics.compare import (
    compare_differences,
    detectable_effects,
    holm,
    minimal_detectable_effect,
    summarise,
)
from rvdist.report.statistics.intervals import share_interval
from rvdist.report.summary import GroupInfo, Outline

BASE, ARM = make_arm("baseline", 0.0), make_arm("α=1", 1.0)
PAIR = ("exact_match", "none")


def group_row(ours, theirs, by_size=True):
    """The rows of a group whose members have these scores, a list each."""
    tasks = [make_task(f"member_{i}") for i in range(len(theirs))]
    records = []
    for task, a, b in zip(tasks, ours, theirs, strict=True):
        records += make_records("α=1", a, task.name) + make_records("baseline", b, task.name)
    group = GroupInfo("group", tuple(task.name for task in tasks), (PAIR,), by_size)
    rows = summarise([BASE, ARM], records, tasks, "baseline", [group])
    assert [row.task for row in rows[:3]] == ["group", "group", "member_0"]
    return rows[:2]


def draw(rng, sizes, chances):
    return [(rng.random(n) < p).astype(float).tolist() for n, p in zip(sizes, chances, strict=True)]


SIZES, CHANCES = [40, 90, 150], [0.9, 0.5, 0.2]


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_weighted_as_it_says_and_drawn_by_member(by_size):
    rng = np.random.default_rng(0)
    theirs, ours = draw(rng, SIZES, CHANCES), draw(rng, SIZES, [0.9, 0.7, 0.3])
    base, row = group_row(ours, theirs, by_size)
    weights = np.array(SIZES) / sum(SIZES) if by_size else np.full(3, 1 / 3)
    assert base.value == pytest.approx(sum(w * np.mean(x) for w, x in zip(weights, theirs, strict=True)))
    assert row.delta == pytest.approx(row.value - base.value) and row.n == sum(SIZES)
    squares = [(w**2 * np.var(x, ddof=1) / len(x)) for w, x in zip(weights, theirs, strict=True)]
    assert base.stderr == pytest.approx(np.sqrt(sum(squares)))

    def statistic(*members, axis):
        return sum(w * np.mean(x, axis=axis) for w, x in zip(weights, members, strict=True))

    scipys = bootstrap(theirs, statistic, method="percentile", n_resamples=9999, vectorized=True)
    assert (base.ci_low, base.ci_high) == pytest.approx(tuple(scipys.confidence_interval), abs=0.006)
    differences = [np.subtract(a, b) for a, b in zip(ours, theirs, strict=True)]
    scipys = bootstrap(differences, statistic, method="percentile", n_resamples=9999, vectorized=True)
    assert (row.delta_ci_low, row.delta_ci_high) == pytest.approx(tuple(scipys.confidence_interval), abs=0.01)
    assert (row.delta_ci_low > 0) == (row.p_value < 0.05)


def test_drawing_by_member_is_narrower_than_drawing_from_all():
    """What differs between members is no uncertainty: each is asked as often as it is."""
    theirs = draw(np.random.default_rng(1), [200, 200], [0.98, 0.02])
    base, _ = group_row(theirs, theirs)
    low, high = proportion_confint(base.value * 400, 400, method="wilson")
    assert base.ci_high - base.ci_low < 0.5 * (high - low)


def test_members_that_do_not_vary_keep_an_honest_interval():
    for scores in ([[1.0] * 5, [1.0] * 7], [[1.0] * 5, [0.0] * 7], [[1.0], [1.0]], [[1.0], [0.0], [1.0, 1.0]]):
        base, row = group_row(scores, scores)
        assert base.ci_low <= base.value <= base.ci_high and base.ci_high - base.ci_low > 0.1
        assert row.delta == 0 and row.p_value == 1 and row.delta_ci_low < 0 < row.delta_ci_high


def test_a_member_that_changed_as_one_is_judged_by_its_signs():
    """No member varies within, and McNemar's signs are not certain of it."""
    for n, verdict in [(5, "no detectable difference"), (6, "better")]:
        _, row = group_row([[1.0] * n, [0.0] * 30], [[0.0] * n, [0.0] * 30])
        assert row.verdict == verdict, n


def test_members_and_edited_questions_are_families_of_their_own():
    names = ["alone", "alone+typos", "a", "b"]
    tasks = [make_task(name) for name in names]
    records = []
    for task in tasks:
        records += make_records("baseline", [0.0] * 20, task.name)
        records += make_records("α=1", [1.0] * 8 + [0.0] * 12, task.name)
    groups = [GroupInfo("group", ("a", "b"), (PAIR,))]
    rows = {row.task: row for row in summarise([BASE, ARM], records, tasks, "baseline", groups) if row.p_value}
    for family in (["alone", "group"], ["a", "b"], ["alone+typos"]):
        together = holm([rows[task].p_value for task in family])
        assert [rows[task].p_adjusted for task in family] == together
        assert together != [rows[task].p_value for task in family] or len(family) == 1
    assert all(row.primary for row in rows.values())
    outline = Outline(names, groups)
    assert [row.task for row in outline.benchmarks(list(rows.values()))] == ["alone", "group"]
    assert (outline.original("alone+typos"), outline.original("gone+typos")) == ("alone", None)


def test_a_group_within_a_group_is_a_member():
    groups = [GroupInfo("all", ("a", "b", "c"), (PAIR,)), GroupInfo("some", ("a", "b"), (PAIR,))]
    outline = Outline(["a", "b", "c", "d"], groups)
    assert [name for name in ("all", "some", "a", "c", "d") if outline.is_benchmark(name)] == ["all", "d"]


def test_a_groups_score_is_lm_evals():
    from lm_eval.api.metrics import aggregate_subtask_metrics

    theirs = draw(np.random.default_rng(3), SIZES, CHANCES)
    for by_size in (True, False):
        expected = aggregate_subtask_metrics([float(np.mean(x)) for x in theirs], SIZES, by_size)
        assert group_row(theirs, theirs, by_size)[0].value == pytest.approx(expected)


def test_what_a_group_can_detect():
    tasks = [make_task("a"), make_task("b")]
    records = []
    for task in tasks:
        records += make_records("baseline", [1.0] * 50, task.name)
        records += make_records("α=1", [0.0] * 10 + [1.0] * 40, task.name)
    for by_size in (True, False):
        groups = [GroupInfo("g", ("a", "b"), (PAIR,), by_size)]
        found = detectable_effects([BASE, ARM], records, tasks, "baseline", groups)
        assert found["g", "α=1"] == pytest.approx(minimal_detectable_effect(100, 0.2))


def test_what_a_group_can_detect_allows_for_a_member_of_two_documents():
    """In a mean of means it weighs as much as hundreds, and shows nothing of how its documents vary: each member is
    taken to vary as if four documents of the whole group's were added."""
    sizes, changes = (2, 50, 200), (0, 10, 30)
    tasks, records = [make_task(name) for name in "abc"], []
    for task, n, k in zip(tasks, sizes, changes, strict=True):
        records += make_records("baseline", [1.0] * n, task.name)
        records += make_records("α=1", [0.0] * k + [1.0] * (n - k), task.name)
    groups = [GroupInfo("g", ("a", "b", "c"), (PAIR,), False)]
    found = detectable_effects([BASE, ARM], records, tasks, "baseline", groups)["g", "α=1"]
    n, mean = sum(sizes), sum(changes) / sum(sizes)
    weights = [n / (3 * size) for size in sizes]
    seen = [w**2 * k for w, k in zip(weights, changes, strict=True)]  # squared, of each member
    likely = [w**2 * m * (k + 4 * mean) / (m + 4) for w, m, k in zip(weights, sizes, changes, strict=True)]
    size = sum(seen) / sum(w * k for w, k in zip(weights, changes, strict=True))
    narrow = minimal_detectable_effect(n, sum(seen) / n, size)
    assert found == pytest.approx(narrow * (sum(likely) / sum(seen)) ** 0.5) and found > 2 * narrow


def simulate(sizes, changed, tilt, by_size, rounds, seed=0):
    """How often the test calls the difference real, and how often the interval holds the true one."""
    rng = np.random.default_rng(seed)
    n, k = sum(sizes), len(sizes)
    factors = [1.0 if by_size else n / (k * size) for size in sizes]
    truth = sum(f * size / n * c * t for f, size, c, t in zip(factors, sizes, changed, tilt, strict=True))
    called = held = 0
    for _ in range(rounds):
        parts = [
            f * (rng.random(size) < c) * np.where(rng.random(size) < (1 + t) / 2, 1.0, -1.0)
            for f, size, c, t in zip(factors, sizes, changed, tilt, strict=True)
        ]
        found = compare_differences(np.concatenate(parts), np.repeat(factors, sizes), sizes, 1.0)
        assert (found.low > 0 or found.high < 0) == (found.p_value < 0.05)
        called += found.p_value < 0.05
        held += found.low - 1e-12 <= truth <= found.high + 1e-12
    return called / rounds, held / rounds


def test_the_stratified_interval_covers():
    called, held = simulate([20, 40, 80], [0.3, 0.1, 0.2], [0.6, -0.6, 0.0], True, rounds=250)
    assert held >= 0.92
    called, held = simulate([4] * 10, [0.2] * 10, [0.0] * 10, False, rounds=250)
    assert called <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize(
    "sizes,changed,tilt",
    [
        ([20] * 27, [0.1] * 27, [0.0] * 27),
        ([20] * 27, [0.01] * 27, [0.0] * 27),
        ([2] * 27, [0.2] * 27, [0.0] * 27),
        ([20] * 27, [0.2] * 27, [0.4] * 27),
        ([30] * 10, [0.3] * 10, [0.6, -0.6] * 5),
        ([146, 187, 250, 250], [0.2, 0.05, 0.1, 0.3], [0.3, -0.3, 0.0, 0.2]),
    ],
)
def test_the_stratified_interval_covers_everywhere(sizes, changed, tilt, by_size):
    called, held = simulate(sizes, changed, tilt, by_size, rounds=600)
    assert held >= 0.93
    if not any(tilt):
        assert called <= 0.07


@pytest.mark.parametrize("sizes", [[2, 200], [3, 100, 100], [5, 100, 100], [1] * 10, [2] * 27])
@pytest.mark.parametrize("chance", [0.5, 0.9, 0.98])
def test_a_members_few_documents_do_not_make_a_score_sure(sizes, chance):
    rng = np.random.default_rng(len(sizes))
    n = sum(sizes)
    weights = np.repeat([n / (len(sizes) * size) for size in sizes], sizes)
    held = 0
    for _ in range(400):
        low, high = share_interval((rng.random(n) < chance).astype(float), weights, sizes)
        held += low <= chance <= high
    assert held >= 0.93 * 400
