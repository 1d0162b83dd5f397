"""The schedule without engines: properties under chance, and recorded times on 64 engines of a virtual clock."""

import random

import pytest
import schedule as benchmark

from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.evaluate.fleet.schedule import Part, Schedule, Slice, cut
from rvdist.evaluate.request import Choice, Generate

HOME, ONE, TWO = (WeightPoint(name) for name in ("home", "one", "two"))


def slices(point, count, task="t", work=1000.0):
    return [Slice(point, (Part(task, k, k + 1),), work) for k in range(count)]


def test_slices_hold_one_kind_and_cover_everything_once():
    requests = {"a": [Generate("p", 1)] * 5, "b": [Choice("b", "c")] * 2 + [Generate("q", 1)]}
    found = cut(ONE, requests, 2)
    assert [[(part.task, part.begin, part.end) for part in piece.parts] for piece in found] == [
        [("a", 0, 2)], [("a", 2, 4)], [("b", 0, 2)], [("a", 4, 5), ("b", 2, 3)],
    ]  # fmt: skip
    assert [piece.count for piece in found] == [2] * 4
    assert (
        found[-1].take(requests) == [Generate("p", 1), Generate("q", 1)]
        and found[2].take(requests) == [Choice("b", "c")] * 2
    )
    assert sum(piece.work for piece in found) == sum(cut(ONE, requests, 1)[k].work for k in range(8))


def test_what_is_left_of_tasks_shares_slices_whole():
    """27 subsets of two documents are one batch; what is left of a task is never split."""
    subsets = {f"t{k:02}": [Generate(f"{k}", 1)] * 2 for k in range(27)}
    (one,) = cut(ONE, subsets, 64)
    assert [part.task for part in one.parts] == list(subsets) and one.name == "t00 0 to 1 with 26 more tasks"
    assert [piece.count for piece in cut(ONE, subsets, 5)] == [4] * 13 + [2]


def test_another_task_or_more_requests_leave_full_slices_alone():
    few = {"a": [Generate("p", 1)] * 5}
    assert set(cut(ONE, few, 2)) < set(cut(ONE, {"z": [Choice("b", "c")], **few}, 2))
    for more in ({"a": [Generate("p", 1)] * 7}, {"z": [Generate("p", 1)] * 3, **few}):
        assert set(cut(ONE, few, 2)[:-1]) < set(cut(ONE, more, 2))
        assert cut(ONE, few, 2)[-1] not in cut(ONE, more, 2)


def test_a_fresh_engine_begins_at_home_and_the_next_ones_spread():
    schedule = Schedule([*slices(ONE, 9), *slices(HOME, 3), *slices(TWO, 5)], home=HOME)
    found = []
    for engine in range(5):
        schedule.join(engine)
        found.append(schedule.take(engine, 0.0).point)
    assert found == [HOME, ONE, TWO, ONE, ONE]


def test_an_engine_stays_at_its_point_and_takes_the_longest_first():
    schedule = Schedule([*slices(ONE, 1, work=5.0), *slices(ONE, 1, "long", 9.0), *slices(TWO, 3, work=99.0)])
    schedule.join(0, ONE)
    assert schedule.take(0, 0.0).kind == "long"
    schedule.finish(0, 0.0, 1.0)
    assert schedule.take(0, 1.0).point == ONE
    schedule.finish(0, 0.0, 1.0)
    assert schedule.take(0, 2.0).point == TWO


def test_no_swap_for_a_tail_that_is_done_sooner_without_it():
    schedule = Schedule([*slices(ONE, 6), *slices(TWO, 2)])
    schedule.join(0)
    schedule.join(1)
    assert schedule.take(0, 0.0).point == ONE and schedule.take(1, 0.0).point == TWO
    schedule.finish(1, 2.5, 1.0)  # a swap takes 2.5 s, a slice 1 s
    assert schedule.take(1, 3.5).point == TWO
    schedule.finish(0, 2.5, 1.0)
    assert schedule.take(0, 3.5).point == ONE
    schedule.finish(1, 0.0, 1.0)
    assert schedule.take(1, 4.5).point == ONE, "four more slices take longer than a swap and a slice"
    schedule.finish(0, 0.0, 1.0)
    assert schedule.take(0, 4.5).point == ONE
    schedule.finish(0, 0.0, 1.0)
    assert schedule.take(0, 5.5).point == ONE
    schedule.join(2, TWO)
    assert schedule.take(2, 5.5) is None, "one slice, and engine 0 will be done with it in 2 s"
    assert schedule.take(2, 12.0).point == ONE, "but both are late"


def test_a_dead_engines_slice_goes_back_and_a_lethal_one_is_given_up():
    only = slices(ONE, 1)
    schedule = Schedule(only)
    for engine in (0, 1):
        assert not schedule.over
        schedule.join(engine)
        assert schedule.take(engine, 0.0) == only[0]
        assert schedule.left(ONE) == 0
        schedule.leave(engine)
    assert schedule.over and schedule.lethal == only


def test_an_idle_engine_may_leave():
    schedule = Schedule([])
    schedule.join(0)
    assert schedule.take(0, 0.0) is None
    schedule.leave(0)
    assert schedule.over and schedule.lethal == []


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_slice_is_answered_once(seed):
    chance = random.Random(seed)
    engines = chance.randint(1, 9)
    seconds = {
        piece: chance.choice([0.1, 1.0, 7.0]) * chance.lognormvariate(0, 0.7)
        for k in range(chance.randint(1, 6))
        for task in ("a", "b")
        for piece in slices(WeightPoint(f"p{k}"), chance.randint(0, 12), task, chance.uniform(1, 9))
    }
    if not seconds:
        return
    joins = [chance.choice([0.0, chance.uniform(0, 20)]) for _ in range(engines)]
    deaths = {chance.randrange(engines): chance.uniform(0, 20) for _ in range(chance.randint(0, 3))}
    poison = frozenset(chance.sample(sorted(seconds, key=repr), min(len(seconds), chance.randint(0, 2))))
    outcome = benchmark.simulate(seconds, joins, chance.choice([0.0, 0.5, 5.0]), deaths, poison)
    assert set(outcome.answers.values()) <= {1}
    assert outcome.answers.keys() | set(outcome.lethal) == seconds.keys()
    assert poison <= set(outcome.lethal) <= seconds.keys()
    assert not outcome.answers.keys() & set(outcome.lethal)
    assert len(outcome.lethal) - len(poison) <= len(deaths) // 2, "deaths of other causes do not add up to a culprit"
    assert 0 < outcome.busy <= outcome.lifetimes


def test_recorded_times_on_64_engines_end_near_the_bound():
    seconds, swap = benchmark.recorded()
    outcome = benchmark.simulate(seconds, [0.0] * 64, swap)
    assert outcome.makespan <= 1.07 * benchmark.lower_bound(seconds, [0.0] * 64, swap)
    assert outcome.swaps < 2 * 64 and outcome.busy / outcome.lifetimes > 0.9
    half = sum(seconds.values()) / 64 / 2
    joins = [0.0] * 32 + [half] * 32
    assert benchmark.simulate(seconds, joins, swap).makespan <= 1.07 * benchmark.lower_bound(seconds, joins, swap)


def test_swaps_as_dear_as_five_slices_cost_little_beside_those_that_cannot_be_saved():
    """Without any swap the bound would be a fifth less, and nothing could come near it."""
    seconds, _ = benchmark.recorded()
    swap, joins = 5 * sorted(seconds.values())[len(seconds) // 2], [0.0] * 64
    bound = benchmark.lower_bound(seconds, joins, swap)
    assert benchmark.simulate(seconds, joins, swap).makespan <= 1.15 * bound
    assert bound > 1.2 * benchmark.lower_bound(seconds, joins)


def test_a_busy_engine_holds_its_next_slice_where_many_wait():
    schedule = Schedule([*slices(ONE, 16), *slices(TWO, 16)])
    for engine, point in enumerate((ONE, TWO)):
        schedule.join(engine, point)
        schedule.take(engine, 0.0)
        assert schedule.hold(engine) is None, "nothing is known of what a slice takes"
    schedule.finish(0, 0.0, 1.0)
    taken = schedule.take(0, 1.0)
    held = schedule.hold(0)
    assert held.point == ONE and held != taken and schedule.hold(0) is None
    assert schedule.after(0).point == ONE and schedule.after(0) not in (held, taken) and schedule.left(ONE) == 13
    schedule.finish(0, 0.0, 1.0)
    assert schedule.take(0, 2.0) == held
    again = schedule.hold(0)
    schedule.leave(0)
    schedule.join(2, ONE)
    came = {schedule.take(2, 3.0)}
    while not schedule.over and (schedule.finish(2, 0.0, 1.0) or True):
        if (piece := schedule.take(2, 4.0)) is None or piece.point != ONE:
            break
        came.add(piece)
    assert {held, again} <= came and not schedule.lethal, "both came back, and one death is nobody's fault"
    few = Schedule(slices(ONE, 10))
    few.join(0, ONE)
    few.take(0, 0.0)
    few.finish(0, 0.0, 1.0)
    few.take(0, 1.0)
    assert few.hold(0) is None, "too few wait"


@pytest.mark.parametrize("raised", [False, True])
def test_an_engine_that_held_a_slice_may_have_died_at_that(raised):
    schedule = Schedule(slices(ONE, 16))
    schedule.join(0, ONE)
    schedule.take(0, 0.0)
    schedule.finish(0, 0.0, 1.0)
    taken, held = schedule.take(0, 1.0), schedule.hold(0)
    if raised:
        assert schedule.leave(0, raised=True) == [taken]
        schedule.join(1, ONE)
        while schedule.take(1, 2.0) != taken:
            schedule.finish(1, 0.0, 1.0)
        assert schedule.leave(1) == [taken] and schedule.lethal == [taken]
        return
    assert schedule.leave(0) == [taken, held]
    for engine in (1, 2):
        schedule.join(engine, ONE)
        while (piece := schedule.take(engine, 2.0)) != held:
            ahead = schedule.hold(engine)
            assert ahead not in (taken, held) and (ahead is None or piece != taken)
            schedule.finish(engine, 0.0, 1.0)
        assert schedule.hold(engine) is None and schedule.lethal == []
        assert schedule.leave(engine) == [held]
    assert schedule.lethal == [held], "and not the one before it, at which no engine died"


def test_what_an_engine_holds_of_a_refused_point_is_its_own():
    schedule = Schedule(slices(ONE, 16))
    schedule.join(0, ONE)
    schedule.take(0, 0.0)
    schedule.finish(0, 0.0, 1.0)
    schedule.take(0, 1.0)
    held = schedule.hold(0)
    assert held and len(schedule.refuse(0, 0.0)) == 13
    assert not schedule.over and schedule.take(0, 2.0) == held
    assert schedule.refuse(0, 0.0) == [] and schedule.over


def test_the_bound():
    one, two = slices(ONE, 2)
    assert benchmark.lower_bound({one: 1.0, two: 3.0}, [0.0]) == 4.0
    assert benchmark.lower_bound({one: 1.0, two: 3.0}, [0.0, 0.0]) == 3.0
    assert benchmark.lower_bound({one: 3.0, two: 3.0}, [0.0, 2.0]) == 4.0
    assert benchmark.lower_bound({one: 3.0, two: 3.0}, [0.0, 9.0]) == 6.0
    assert benchmark.lower_bound({one: 3.0, two: 3.0}, [0.0, 2.0], 0.5) == 4.5


def test_a_refused_point_is_asked_no_more():
    """Neither what waits there, nor what an engine had of it that dies; the others go on."""
    schedule = Schedule(slices(ONE, 6) + slices(TWO, 6))
    for engine in range(3):
        schedule.join(engine)
    taken = [schedule.take(engine, 0.0) for engine in range(3)]
    bad = taken[2].point
    other = next(engine for engine in (0, 1) if taken[engine].point == bad)
    schedule.refuse(2, 0.5)
    schedule.leave(other)
    left = 1 - other
    schedule.finish(left, 0.0, 1.0)
    asked = 1
    while piece := schedule.take(left, 1.0):
        assert piece.point != bad
        schedule.finish(left, 0.0, 1.0)
        asked += 1
    assert asked == 6 and schedule.over and not schedule.lethal and schedule.left(bad) == 0


def test_of_many_points_the_one_is_chosen_that_a_look_at_all_of_them_finds(monkeypatch):
    choose, chosen = Schedule._longest_free, []

    def compare(self, others, fresh):
        found = choose(self, others, fresh)
        left = {point: seconds for point, seconds in self._waiting().items() if point not in others}
        best = max(left, key=lambda point: (fresh and point == self._home, left[point]), default=None)
        chosen.append(found)
        assert found == best
        return found

    monkeypatch.setattr(Schedule, "_longest_free", compare)
    drawn = random.Random(0)
    for _ in range(20):
        points = [WeightPoint("base", (Term(k / 100, Vector("plus", "minus")),)) for k in range(30)]
        seconds = {
            Slice(point, (Part(task, k, k + 1),), work := drawn.choice([10.0, 10.0, 77.0])): work / 50
            for point in points
            for task in ("a", "b")
            for k in range(drawn.randrange(4))
        }
        benchmark.simulate(seconds, [drawn.random() for _ in range(drawn.randrange(1, 9))], 0.1, {0: 0.5})
    assert len(set(chosen)) > 20
