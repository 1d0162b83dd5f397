"""What a sweeper maximises."""

import pytest

from rvdist.evaluation import objective
from rvdist.report.summary import Row


def row(arm, value, delta=None, primary=True, more_is_better=True):
    return Row(
        *(arm, "digest", None, "plain", "task", "metric", "none", primary, more_is_better, 0),
        *(value, None, None, None, 10, delta),
    )


def test_the_mean_primary_score_of_what_is_not_the_baseline():
    rows = [row("baseline", 0.1), row("a", 0.4, 0.3), row("a", 0.9, 0.8, primary=False), row("b", 0.8, 0.7)]
    assert objective(rows) == pytest.approx(0.6)
    assert objective(rows[:1]) == 0.1
    assert objective([]) is None


def test_less_is_more_where_less_is_better():
    """A sweep over a perplexity must not look for the worst."""
    better, worse = (objective([row("baseline", 5.0), row("a", v, v - 5, True, False)]) for v in (3.0, 4.0))
    assert better > worse
