"""The race: its promises on made-up scores, by enumeration where that can be done, and on recorded grids."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import search as benchmark

from rvdist.report.statistics import race as search
from rvdist.report.statistics.race import Race, split


def run(race, grid):
    """The outcome and the rounds that were asked for; `grid` maps tasks to scores, [candidate, document]."""
    asked = []
    while (turn := race.next()) is not None:
        asked.append(turn)
        documents, racing = turn
        race.tell({one: [grid[task][one, document] for task, document in documents] for one in racing})
    return race.outcome, asked


def race_on(grid, **settings):
    count = len(next(iter(grid.values())))
    settings = {"round_size": 16} | settings
    return Race(range(count), {task: range(x.shape[1]) for task, x in grid.items()}, **settings)


def coins(means, documents, seed=0):
    return (np.random.default_rng(seed).random((len(means), documents)) < np.array(means)[:, None]).astype(float)


def test_the_better_one_wins_and_the_others_are_accounted_for():
    grid = {"a": coins([0.2, 0.8, 0.5], 400), "b": coins([0.3, 0.7, 0.4], 100)}
    outcome, asked = run(race_on(grid), grid)
    assert outcome.best == 1 and outcome.tied == () and outcome.over
    assert {out.candidate for out in outcome.eliminated} == {0, 2} and {out.by for out in outcome.eliminated} == {1}
    assert all(out.evidence >= out.bound == pytest.approx(2 / 0.05) for out in outcome.eliminated)
    assert outcome.rounds == len(asked) == max(out.round for out in outcome.eliminated)
    assert outcome.samples == sum(len(documents) * len(racing) for documents, racing in asked)
    assert outcome.full_grid == 3 * 500 and outcome.samples < 500
    for out in outcome.eliminated:
        assert [out.candidate in racing for _, racing in asked] == [k < out.round for k in range(len(asked))]


def test_documents_are_shared_once_each_and_in_a_seeded_order():
    grid = {"a": np.ones((3, 40)), "b": np.ones((3, 10))}
    outcome, asked = run(race_on(grid, seed=3), grid)
    shown = [document for documents, _ in asked for document in documents]
    assert sorted(shown) == [("a", k) for k in range(40)] + [("b", k) for k in range(10)]
    assert [len(documents) for documents, _ in asked] == [16, 16, 16, 2]
    assert (outcome, asked) == run(race_on(grid, seed=3), grid)
    assert asked != run(race_on(grid, seed=4), grid)[1]


def test_equals_are_told_apart_by_nothing_but_their_place_and_reported_as_tied():
    grid = {"a": np.tile(coins([0.7], 200), (4, 1))}
    outcome, _ = run(race_on(grid), grid)
    assert outcome.best == 0 and outcome.tied == (1, 2, 3) and not outcome.eliminated
    assert outcome.samples == outcome.full_grid == 800
    tolerant, _ = run(race_on(grid, tolerance=0.05), grid)
    assert tolerant.best == 0 and tolerant.tied == (1, 2, 3) and tolerant.samples < 400


def test_one_candidate_needs_no_sample():
    race = Race(["only"], {"a": ["document"]}, round_size=1)
    assert race.next() is None and race.outcome.best == "only" and race.outcome.samples == 0
    with pytest.raises(ValueError, match="over"):
        race.tell({})


def test_a_race_to_the_last_document_knows_the_means():
    grid = {"a": coins([0.5, 0.52, 0.51], 90, seed=1), "b": coins([0.5, 0.5, 0.5], 30, seed=2)}
    outcome, _ = run(race_on(grid, confidence=1 - 1e-12), grid)
    means = np.mean([x.mean(1) for x in grid.values()], axis=0)
    assert outcome.samples == outcome.full_grid and outcome.best == means.argmax()
    assert list(outcome.means.values()) == pytest.approx(means)


def test_a_race_may_be_stopped_at_any_time():
    grid = {"a": coins([0.6, 0.5], 300)}
    race = race_on(grid)
    assert race.outcome.best == 0 and race.outcome.tied == (1,) and not race.outcome.over
    documents, racing = race.next()
    race.tell({one: grid["a"][one, [document for _, document in documents]] for one in racing})
    assert race.outcome.samples == 32 and not race.outcome.over


def test_small_tasks_weigh_as_much_as_large_ones():
    """Candidate 0 wins task a by a little, candidate 1 the small task b by much: the mean over tasks is what counts."""
    a, b = np.zeros((2, 900)), np.zeros((2, 30))
    a[0, :300], b[1, :20] = 1, 1
    outcome, asked = run(race_on({"a": a, "b": b}), {"a": a, "b": b})
    assert outcome.best == 1
    first = [task for documents, _ in asked for task, _ in documents][:30]
    assert 5 < first.count("b") < 25


@pytest.mark.parametrize(
    ("tasks", "tolerance", "average"),
    [
        ({"a": [1, 0, -1, 0.5, -0.5]}, 0.0, 1.0),
        ({"a": [1, -1, 0.5], "b": [-0.5, 1 / 6]}, 0.0, 1.0),
        ({"a": [1], "b": [-1, -1, -1, -1]}, 0.0, 1.0),
        ({"a": [1, -1, -0.5, 0, -0.75]}, 0.25, 1.0),
        ({"a": [-0.5, -0.5, 0.25], "b": [0, -0.5]}, 0.25, 1.0),
        ({"a": [1, -1, -1, 0, 0]}, 0.0, 0.95),
        ({"a": [1, 0, 0, 0, 0]}, 0.0, 1e6),
    ],
)
def test_evidence_for_what_is_not_so_is_at_most_one_on_average(monkeypatch, tasks, tolerance, average):
    """Exactly, over all orders of five documents with their chances: so Ville's inequality holds. Less than one where
    the first candidate is worse than the hypothesis says, more only where it is better."""
    weights = np.array([1 / len(own) / len(tasks) for own in tasks.values() for _ in own])
    grid = {task: np.array([np.maximum(own, 0), np.maximum(-np.array(own), 0)]) for task, own in tasks.items()}
    expected = np.zeros(5)
    for order in itertools.permutations(range(5)):
        keys = np.argsort(order) * weights  # divided by the weights, they sort into this order
        monkeypatch.setattr(search.np.random, "default_rng", lambda _, keys=keys: _Keys(keys))
        race = race_on(grid, round_size=1, confidence=1 - 1e-15, tolerance=tolerance)
        drawn = weights[list(order)]
        chance = np.prod(drawn / drawn[::-1].cumsum()[::-1])
        for step in range(5):
            if (turn := race.next()) is not None:  # else its evidence stays
                [(task, document)], _ = turn
                race.tell({one: [grid[task][one, document]] for one in (0, 1)})
            expected[step] += chance * race._evidence(1)[0, 1]
    if average <= 1:
        assert (expected <= average + 1e-9).all()
        assert expected[0] == pytest.approx(average) or average < 1
    else:
        assert expected[-1] > average


class _Keys:
    def __init__(self, keys):
        self.keys = keys

    def exponential(self, size):
        assert size == len(self.keys)
        return self.keys


@pytest.mark.parametrize("means", [[0.5] * 5, [0.9] * 3 + [0.88] * 2, [0.02] * 8])
def test_the_best_is_kept_and_the_choice_good_as_often_as_promised(means):
    """At a confidence of 0.8, to see the errors; raced to the end: an elimination at any time is an error, which is
    what stopping at the worst time could show. All bests are equally good: that is when errors are likeliest."""
    lost = far = 0
    for seed in range(200):
        grid = {"a": coins(means, 150, seed), "b": coins(means, 50, 1000 + seed)}
        for x in grid.values():  # exactly equal means: the second of each pair is the first, shuffled
            for one in range(1, len(x)):
                if means[one] == means[0]:
                    x[one] = np.random.default_rng([seed, one]).permutation(x[0])
        truth = np.mean([x.mean(1) for x in grid.values()], axis=0).round(12)
        outcome, _ = run(race_on(grid, round_size=40, confidence=0.8, seed=seed), grid)
        lost += int(truth.argmax()) in {out.candidate for out in outcome.eliminated}
        tolerant, _ = run(race_on(grid, round_size=40, confidence=0.8, seed=seed, tolerance=0.05), grid)
        far += truth.max() - truth[tolerant.best] > 0.05
    assert lost <= 0.2 * 200 and far <= 0.2 * 200


def test_the_documents_are_parted_by_task_and_seed():
    tasks = {"a": list(range(100)), "b": list("xyz")}
    found, held = split(tasks, 0.2, seed=1)
    assert [len(own) for own in (*found.values(), *held.values())] == [80, 2, 20, 1]
    assert all(sorted(found[task] + held[task]) == own for task, own in tasks.items())
    assert (found, held) == split(tasks, 0.2, seed=1) != split(tasks, 0.2, seed=2)
    with pytest.raises(ValueError, match="task a has 1 documents"):
        split({"a": [1]}, 0.2, seed=1)


@pytest.mark.parametrize(
    ("candidates", "tasks", "settings"),
    [
        ([], {"a": [1]}, {}),
        ([1, 1], {"a": [1]}, {}),
        ([1, 2], {}, {}),
        ([1, 2], {"a": []}, {}),
        ([1, 2], {"a": [1]}, {"round_size": 0}),
        ([1, 2], {"a": [1]}, {"confidence": 1.0}),
        ([1, 2], {"a": [1]}, {"tolerance": -0.1}),
    ],
)
def test_a_race_that_cannot_be_is_refused(candidates, tasks, settings):
    with pytest.raises(ValueError, match="a race needs"):
        Race(candidates, tasks, **({"round_size": 8} | settings))


@pytest.mark.parametrize(
    "scores", [{0: [1.0]}, {0: [1.0], 1: [1.0, 1.0]}, {0: [1.0], 1: [2.0]}, {0: [1], 1: [math.nan]}]
)
def test_scores_that_are_not_of_this_round_are_refused(scores):
    race = Race([0, 1], {"a": [1, 2]}, round_size=1)
    with pytest.raises(ValueError, match="score"):
        race.tell(scores)


def check_replays(tolerance, count):
    """The best of the grid, or one that the whole grid cannot tell from it, in 95 % of replays; half of the samples."""
    families = benchmark.recorded()
    assert len(families) == 3
    for family, grid in families.items():
        replays = benchmark.replay(grid, partial(benchmark.race, tolerance), count)
        assert np.mean([one.tied for one in replays]) >= 0.95, family
        assert np.mean([one.loss <= tolerance + 1e-9 for one in replays]) >= 0.95, family
        assert np.median([one.cost for one in replays]) <= 0.5, family


@pytest.mark.heavy
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_replays_of_recorded_grids(tolerance):
    check_replays(tolerance, 50)


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_a_thousand_replays_of_recorded_grids(tolerance):
    check_replays(tolerance, 1000)


def test_a_candidate_without_a_score_is_withdrawn_and_the_others_race_on():
    race = Race("abc", {"t": list(range(40))}, round_size=10)
    documents, candidates = race.next()
    assert candidates == ["a", "b", "c"]
    race.withdraw("a")
    assert race.next() == (documents, ["b", "c"])
    race.tell({"b": [0.2] * 10, "c": [0.4] * 10})
    assert race.outcome.means.keys() == {"b", "c"} and race.outcome.best == "c"
    race.withdraw("c")
    assert race.next() is None and race.outcome.best == "b" and race.outcome.tied == ()
