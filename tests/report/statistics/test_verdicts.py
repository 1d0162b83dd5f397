"""Verdicts that say more: equivalent, cannot be seen, confirmed elsewhere, only format; and what answers cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import significance
from made_up import make_arm, make_records, make_task
from statsmodels.stats.proportion import proportion_confint

from rvdist.report.findings import Findings
from rvdist.report.page.tables import task_table
from rvdist.report.statistics.compare import format_gains, summarise
from rvdist.report.statistics.sweep import halve, sweeps, take
from rvdist.report.summary import GroupInfo

BASE, ARM = make_arm("baseline", 0.0), make_arm("α=1", 1.0)


def judged(ours, theirs, alpha=1.0, metric="exact_match", **settings):
    """The arm's row."""
    records = make_records("baseline", theirs, metric=metric) + make_records("arm", ours, metric=metric)
    task = make_task(metric=metric)
    return summarise([BASE, make_arm("arm", alpha)], records, [task], "baseline", **settings)[1]


def halves(n, share, changed=0):
    """A baseline of n documents, and an arm with so many that rose as fell."""
    theirs = [1.0] * int(n * share) + [0.0] * (n - int(n * share))
    ours = [0.0] * changed + theirs[changed : n - changed] + [1.0] * changed
    return ours, theirs


@pytest.mark.parametrize(
    ("n", "changed", "verdict"), [(1300, 2, "equivalent"), (1300, 100, "no detectable difference"), (60, 0, None)]
)
def test_equivalent_needs_an_interval_within_the_margin(n, changed, verdict):
    row = judged(*halves(n, 0.5, changed))
    assert row.verdict == (verdict or "no detectable difference") and row.margin == 0.02
    assert (row.verdict == "equivalent") == (row.delta_ci_low > -0.02 and row.delta_ci_high < 0.02)
    assert row.verdict_alone == "no detectable difference"
    assert judged(*halves(n, 0.5, changed), margin=0.0).verdict == "no detectable difference"
    assert judged(*halves(n, 0.5, changed), margin=0.2).verdict == "equivalent"


def test_what_is_no_share_has_no_margin():
    row = judged([0.5] * 500, [0.5001] * 500, metric="bits_per_byte")
    assert row.margin is None and row.verdict != "equivalent"


@pytest.mark.parametrize(
    ("right", "alpha", "verdict"),
    [
        (58, 1.0, "cannot be seen"),  # two documents could rise
        (58, -1.0, "no detectable difference"),  # and 58 fall, which is what subtraction is to show
        (3, -1.0, "cannot be seen"),
        (3, 1.0, "no detectable difference"),
        (54, 1.0, "no detectable difference"),
    ],
)
def test_a_floor_or_ceiling_cannot_be_seen_from(right, alpha, verdict):
    scores = [1.0] * right + [0.0] * (60 - right)
    assert judged(scores, scores, alpha).verdict == verdict


def test_what_was_seen_is_no_question_of_room():
    row = judged([0.0] * 30 + [1.0] * 30, [1.0] * 60)
    assert (row.verdict, row.unseen) == ("worse", "rise")


def equal_sweep(rng, n=300, arms=17):
    """A baseline and arms that are all equal to it."""
    theirs = (rng.random(n) < 0.6) * 1.0
    found = [make_arm("baseline", 0.0)] + [make_arm(f"α={k}", float(k)) for k in range(1, arms + 1)]
    records = make_records("baseline", theirs.tolist())
    for arm in found[1:]:
        moved = rng.random(n) < 0.2
        records += make_records(arm.name, np.where(moved, (rng.random(n) < 0.6) * 1.0, theirs).tolist())
    return found, records


def test_the_best_of_a_grid_is_confirmed_by_documents_that_did_not_choose_it():
    rng = np.random.default_rng(0)
    ease = rng.random(400)
    arms = [make_arm("baseline", 0.0), *(make_arm(f"α={a}", a) for a in (0.5, 1.0, 2.0))]
    records = []
    for arm, skill in zip(arms, (0.4, 0.5, 0.65, 0.3), strict=True):
        records += make_records(arm.name, (ease < skill).astype(float).tolist())
    [found] = sweeps(arms, records, [make_task()], (), "baseline")
    one = found.confirmation
    assert (one.chosen, one.alpha, one.n, one.verdict) == ("α=1.0", 1.0, 200, "better")
    assert one.found.low < 0.25 < one.found.high
    rows = summarise(arms, records, [make_task()], "baseline")
    said = " ".join(Findings(arms, rows, records, [make_task()]).claims)
    assert (
        "on 200 documents that did not, α = 1, the choice of the others, changes it by" in said and "confirmed" in said
    )
    assert sweeps(arms, records, [make_task()])[0].confirmation is None, "there is nothing to compare it with"


def test_the_winners_curse_is_not_repeated():
    """Of the best of 17 equal arms: what chose it shows a gain, what did not shows none."""
    flattered, honest, wrong = [], [], 0
    for seed in range(20):
        arms, records = equal_sweep(np.random.default_rng(seed))
        [found] = sweeps(arms, records, [make_task()], (), "baseline")
        rows = summarise(arms, records, [make_task()], "baseline")
        flattered.append(max(row.delta for row in rows[1:]))
        honest.append(found.confirmation.found.delta)
        wrong += found.confirmation.verdict != "no detectable difference"
    assert np.mean(flattered) > 0.02 and abs(np.mean(honest)) < 0.015 and wrong <= 4


def test_halves_are_of_every_stratum_and_count_as_the_whole_does():
    sizes, members = (5, 20, 40), "abc"
    tasks, records = [make_task(name) for name in members], []
    rng = np.random.default_rng(1)
    for task, n in zip(tasks, sizes, strict=True):
        records += make_records("baseline", (rng.random(n) < 0.5).astype(float).tolist(), task.name)
    from rvdist.report.statistics.sample import sample, scores, sort_records

    group = GroupInfo("g", tuple(members), (("exact_match", "none"),), False)
    whole = sample(sort_records(records), "baseline", next(scores(tasks, [group])))
    chosen = halve(whole)
    assert chosen.sum() in (32, 33) and (halve(whole) == chosen).all()
    for kept in (chosen, ~chosen):
        part = take(whole, kept)
        assert len(part.documents) == sum(part.strata) == len(part.values) and part.weights.mean() == pytest.approx(1)
        ends = np.cumsum((0, *part.strata))
        shares = [part.weights[a:b].sum() / len(part.values) for a, b in pairwise(ends)]
        assert shares == pytest.approx([1 / 3] * 3)


def answered(arm, scores, formats=None, tokens=None, finish=None):
    """Records that say what their answers cost."""
    records = make_records(arm, scores)
    return [
        replace(
            record,
            in_format=None if formats is None else formats[k],
            tokens=() if tokens is None else (tokens[k],),
            finish=() if tokens is None else ((finish or ["stop"] * len(scores))[k],),
        )
        for k, record in enumerate(records)
    ]


def test_a_row_says_what_answers_cost():
    records = answered("baseline", [1.0, 0.0, 1.0, 0.0], [True, True, True, False], [10, 20, 30, 64])
    records += answered("α=1", [1.0] * 4, [True] * 4, [5, 5, 5, 64], ["stop", "stop", "stop", "length"])
    base, row = summarise([BASE, ARM], records, [make_task()], "baseline")
    assert (base.tokens, base.cut, base.in_format) == (31, 0, 0.75) and base.value_in_format == pytest.approx(2 / 3)
    assert base.tokens_ci_low < 31 < base.tokens_ci_high
    ends = [(base.cut_ci_low, base.cut_ci_high), (base.in_format_ci_low, base.in_format_ci_high)]
    for (low, high), count in zip(ends, (0, 3 * base.n // 4), strict=True):
        assert (low, high) == pytest.approx(proportion_confint(count, base.n, method="wilson"), abs=1e-9)
    assert (row.tokens, row.cut, row.in_format, row.value_in_format) == (19.75, 0.25, 1, 1)
    shown = task_table([base, row], {}, {})["rows"]
    assert shown[0]["answers"].endswith("0.0 [0.0, 49.0] % cut; 75.0 [30.1, 95.4] % in format, which score 66.7")
    said = Findings([BASE, ARM], [base, row], records, [make_task()]).claims
    assert "gsm8k: answers were cut at max_gen_toks: 25.0 % with “α=1”." in said
    older = summarise([BASE], answered("baseline", [1.0, 0.0]), [make_task()], None)[0]
    assert older.tokens is older.cut is older.in_format is older.value_in_format is None


def gains(formatted, besides, n=1000, right=400):
    """Claims of a gain: so many answers came into the format and are right; so many were gained in the format."""
    theirs = [1.0] * right + [0.0] * (n - right)
    before = [True] * (n - formatted) + [False] * formatted
    ours = theirs[: n - formatted] + [1.0] * formatted
    ours[right : right + besides] = [1.0] * besides
    records = answered("baseline", theirs, before) + answered("α=1", ours, [True] * n)
    tasks = [make_task()]
    rows = summarise([BASE, ARM], records, tasks, "baseline")
    return format_gains(rows, records, tasks, "baseline"), Findings([BASE, ARM], rows, records, tasks).claims


def test_a_gain_that_is_only_format_is_said_to_be():
    [gain], said = gains(100, 4)
    assert gain.only and gain.rest.delta == pytest.approx(0.004) and (gain.before, gain.after) == (0.9, 1.0)
    assert any("the difference is only format: 90.0 % of answers were in the asked format" in one for one in said)
    found, said = gains(100, 60)
    assert found == [] and not any("only format" in one for one in said), "sixty were gained besides"
    found, _ = gains(0, 60)
    assert found == [], "the format did not change"


def test_of_few_documents_it_cannot_be_told_that_nothing_else_changed():
    [gain], said = gains(20, 2, n=80, right=30)
    assert not gain.only and any("the difference may be only format" in one for one in said)


@pytest.mark.parametrize("name", significance.VERDICTS)
def test_no_verdict_is_wrong_more_often_than_one_time_in_twenty(name):
    """Where each is easiest to be wrong: of 100 rounds more than 12 are once in 600 times with 5 %."""
    wrong = significance.VERDICTS[name]
    for n in (60, 1300):
        rng = np.random.default_rng([n, 5])
        assert sum(wrong(rng, n) for _ in range(100)) <= 12, n


def test_few_documents_of_scores_without_bounds_are_warned_of():
    said = {}
    for n in (199, 200):
        values = np.random.default_rng(n).lognormal(size=n)
        records = make_records("baseline", values.tolist(), metric="loss")
        records += make_records("α=1", (values + 0.1).tolist(), metric="loss")
        tasks = [make_task(metric="loss", higher_is_better=False)]
        rows = summarise([BASE, ARM], records, tasks, "baseline")
        said[n] = any(
            "95 % intervals hold as seldom" in one for one in Findings([BASE, ARM], rows, records, tasks).footnotes
        )
    assert said == {199: True, 200: False}
    scores = make_records("baseline", [1.0, 0.0] * 20) + make_records("α=1", [1.0] * 40)
    rows = summarise([BASE, ARM], scores, [make_task()], "baseline")
    assert not any("as seldom" in one for one in Findings([BASE, ARM], rows, scores, [make_task()]).footnotes)
