"""What a sweeper maximises."""

import pytest

from rvdist.core.record import TaskInfo
from rvdist.report.findings import Findings
from rvdist.report.summary import GroupInfo, Row


def scores(rows, groups=()):
    names = dict.fromkeys(row.task for row in rows if row.task not in {group.name for group in groups})
    return Findings((), rows, [], [TaskInfo(name, "1", (), ("metric", "none")) for name in names], groups)


def row(arm, value, delta=None, primary=True, more_is_better=True, task="task"):
    return Row(
        *(arm, "digest", None, "plain", task, "metric", "none", primary, more_is_better, 0),
        *(value, None, None, None, 10, delta),
    )


def test_the_mean_primary_score_of_what_is_not_the_baseline():
    rows = [row("baseline", 0.1), row("a", 0.4, 0.3), row("a", 0.9, 0.8, primary=False), row("b", 0.8, 0.7)]
    assert scores(rows).objective == pytest.approx(0.6)
    assert scores(rows[:1]).objective == 0.1
    assert scores([]).objective is None


def test_less_is_more_where_less_is_better():
    """A sweep over a perplexity must not look for the worst."""
    better, worse = (scores([row("baseline", 5.0), row("a", v, v - 5, True, False)]).objective for v in (3.0, 4.0))
    assert better > worse


def test_a_group_counts_once_and_edited_questions_not_at_all():
    named = {"group": 0.5, "one": 0.1, "two": 0.9, "task": 0.7, "task+typos": 0.0}
    rows = [row("a", value, 0.1, task=name) for name, value in named.items()]
    group = GroupInfo("group", ("one", "two"), (("metric", "none"),))
    assert scores(rows, [group]).objective == pytest.approx((0.5 + 0.7) / 2)
