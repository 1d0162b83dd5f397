"""The benchmark of verdicts measures what the report does, and says what comes of it."""

import numpy as np
import pytest
import significance

from rvdist.report.statistics.sample import sample, scores, sort_records

SITUATIONS = [situation for situation in significance.situations() if sum(situation.sizes) <= 300]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: f"{situation.name}, {sum(situation.sizes)}")
def test_its_samples_are_what_the_report_makes_of_the_records(situation):
    answers = situation.answers(np.random.default_rng(0), 0.0)
    records, tasks, groups = situation.report(answers)
    score, answered = next(scores(tasks, groups)), sort_records(records)
    for arm, ours in zip(significance.ARMS, situation.samples(answers), strict=True):
        theirs = sample(answered, arm.name, score)
        assert (theirs.strata, theirs.exact, theirs.shares) == (ours.strata, ours.exact, ours.shares)
        assert theirs.values.tolist() == pytest.approx(ours.values) and theirs.weights == pytest.approx(ours.weights)


def test_a_tally_counts_what_was_said():
    few = next(s for s in SITUATIONS if s.name == "fractions" and s.sizes == (9,))
    found = significance.tally(few, 20, 0)
    assert found.split == 0 and found.held_none >= 20 - found.called and 0 < found.detectable < 1
    assert len(found.row(few)) == len(significance.HEAD)


def test_an_end_of_which_nothing_is_known_excludes_nothing():
    assert significance.holds(float("nan"), float("inf"), 5.0) and significance.holds(-1, 1, 1)
    assert not significance.holds(0.1, float("nan"), 0.0) and not significance.holds(-1, -0.1, 0.0)
