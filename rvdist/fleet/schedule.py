"""The schedule: which slice an engine gets next. It is told what happens and when, and only decides.

Knows no Ray, no vLLM and no clock, so that a simulation can drive it as the fleet does. Slices are cut before it is
asked anything: who answers one, and when, never changes what is in it.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rvdist.fleet.request import Generate, Request
from rvdist.point import WeightPoint

LETHAL = 2  # engines that may die on a slice before it is given up
_CHARACTERS_PER_TOKEN = 4
_FIRST_RATE = 1e-3  # seconds a token, until a slice has been timed


@dataclass(frozen=True)
class Slice:
    """The requests `begin` to `end` of a task at one point. `work` guesses what they cost, in tokens."""

    point: WeightPoint
    task: str
    begin: int
    end: int
    work: float


def cut(point: WeightPoint, requests: Mapping[str, Sequence[Request]], slice_size: int) -> list[Slice]:
    """The slices of one point: requests of one task and kind, in order, at most `slice_size` together. So another
    task leaves those of all others alone, and more requests of a task all but its last."""
    slices = []
    for task, asked in requests.items():
        begin = 0
        while begin < len(asked):
            end = begin + 1
            while end < min(len(asked), begin + slice_size) and type(asked[end]) is type(asked[begin]):
                end += 1
            slices.append(Slice(point, task, begin, end, sum(map(_work, asked[begin:end]))))
            begin = end
    return slices


def _work(request: Request) -> float:
    if isinstance(request, Generate):
        return len(request.prompt) / _CHARACTERS_PER_TOKEN + request.max_tokens
    return (len(request.context) + len(request.continuation)) / _CHARACTERS_PER_TOKEN


class Schedule:
    """Hands the slices to engines, which are numbers here, so that swaps are few and all end together.

    An engine stays at its point while there is work, then takes a point that no other engine is at, then helps where
    most is left: but only with a slice that it has done, its swap included, before the engines there would have done
    everything without it. What slices and swaps take is learned from those that are finished. `home` is the
    point of an engine that was just started.
    """

    def __init__(self, slices: Iterable[Slice], home: WeightPoint | None = None) -> None:
        self._home = home
        self._waiting: dict[WeightPoint, dict[str, list[Slice]]] = defaultdict(lambda: defaultdict(list))
        for piece in slices:
            self._put(piece)
        self._at: dict[int, WeightPoint | None] = {}
        self._busy: dict[int, tuple[Slice, float]] = {}  # and when it should be done
        self._deaths: Counter[Slice] = Counter()
        self._seconds: dict[object, float] = defaultdict(float)
        self._work: dict[object, float] = defaultdict(float)
        self._swaps = [0.0, 0.0]  # how many, and their seconds
        self.lethal: list[Slice] = []

    @property
    def over(self) -> bool:
        """Nothing waits and nobody works."""
        return not self._busy and not any(map(self.left, self._waiting))

    def join(self, engine: int, at: WeightPoint | None = None) -> None:
        """A new engine, or one that is known to be `at` a point."""
        self._at[engine] = at

    def leave(self, engine: int) -> None:
        """The engine is gone; if it was working, its slice goes back whole, or among the `lethal`."""
        del self._at[engine]
        if engine not in self._busy:
            return
        piece, _ = self._busy.pop(engine)
        self._deaths[piece] += 1
        if self._deaths[piece] < LETHAL:
            self._put(piece)
        else:
            self.lethal.append(piece)

    def take(self, engine: int, now: float) -> Slice | None:
        """What an idle engine does next. None: nothing that others will not have done sooner; ask again later,
        since they may be late."""
        here = self._at[engine]
        piece = self._choose(engine, here, now)
        if piece is None:
            return None
        self._waiting[piece.point][piece.task].pop()
        self._at[engine] = piece.point
        self._busy[engine] = (piece, now + self._swap(here, piece.point) + self._cost(piece))
        return piece

    def finish(self, engine: int, swap: float, seconds: float) -> None:
        """The engine has answered its slice in so many seconds, after a `swap` of so many."""
        piece, _ = self._busy.pop(engine)
        for key in _kinds(piece):
            self._seconds[key] += seconds
            self._work[key] += piece.work
        if swap > 0:
            self._swaps[0] += 1
            self._swaps[1] += swap

    def left(self, point: WeightPoint) -> int:
        """How many slices of a point wait."""
        return sum(map(len, self._waiting.get(point, {}).values()))

    def seconds_left(self, now: float) -> float | None:
        """What is still to be done, shared by all engines; None before anything was timed."""
        if not self._at or not self._work:
            return None
        busy = sum(self._free(engine, now) for engine in self._busy)
        return (busy + sum(map(self._left, self._waiting))) / len(self._at)

    def _put(self, piece: Slice) -> None:
        insort(self._waiting[piece.point][piece.task], piece, key=lambda other: other.work)

    def _choose(self, engine: int, here: WeightPoint | None, now: float) -> Slice | None:
        if here is not None and self.left(here):
            return next(self._longest(here))
        left = {point: self._left(point) for point in self._waiting if self.left(point)}
        others: dict[WeightPoint, list[float]] = defaultdict(list)
        for other, point in self._at.items():
            if other != engine and point is not None:
                others[point].append(self._free(other, now))
        if untouched := [point for point in left if point not in others]:
            fresh = here is None
            return next(self._longest(max(untouched, key=lambda point: (fresh and point == self._home, left[point]))))
        for point in sorted(left, key=lambda point: left[point] / (len(others[point]) + 1), reverse=True):
            without = self._seconds_without(point, others[point])
            for piece in self._longest(point):
                if self._swap(here, point) + self._cost(piece) < without:
                    return piece
        return None

    def _longest(self, point: WeightPoint) -> Iterator[Slice]:
        """The longest waiting slice of each task, the longest of all first."""
        return iter(sorted((waiting[-1] for waiting in self._waiting[point].values() if waiting), key=self._cost)[::-1])

    def _seconds_without(self, point: WeightPoint, free: Iterable[float]) -> float:
        """When engines that are `free` at these times will have done all that waits at `point`, longest first."""
        times = list(free)
        heapq.heapify(times)
        costs = [self._cost(piece) for waiting in self._waiting[point].values() for piece in waiting]
        for cost in sorted(costs, reverse=True):
            heapq.heapreplace(times, times[0] + cost)
        return max(times)

    def _free(self, engine: int, now: float) -> float:
        """In how many seconds an engine should be idle. One that is late will be late by as much again."""
        return abs(self._busy[engine][1] - now) if engine in self._busy else 0.0

    def _left(self, point: WeightPoint) -> float:
        """Seconds of one engine for all that waits at a point."""
        return sum(
            self._rate(waiting[0]) * sum(piece.work for piece in waiting)
            for waiting in self._waiting[point].values()
            if waiting
        )

    def _swap(self, here: WeightPoint | None, point: WeightPoint) -> float:
        count, seconds = self._swaps
        return seconds / count if count and point != (here or self._home) else 0.0

    def _cost(self, piece: Slice) -> float:
        return piece.work * self._rate(piece)

    def _rate(self, piece: Slice) -> float:
        """Seconds a token, from the finished slices most like it: of its point and task, of its task, or any."""
        key = next((key for key in _kinds(piece) if key in self._work), None)
        return _FIRST_RATE if key is None else self._seconds[key] / self._work[key]


def _kinds(piece: Slice) -> tuple[object, ...]:
    return (piece.point, piece.task), piece.task, ()
