"""The schedule: which slice an engine gets next. It is told what happens and when, and only decides.

Knows no Ray, no vLLM and no clock, so that a simulation can drive it as the fleet does. Slices are cut before it is
asked anything: who answers one, and when, never changes what is in it.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rvdist.core.point import WeightPoint
from rvdist.evaluate.request import Request

LETHAL = 2  # engines that may die on a slice before it is given up
CHARACTERS_PER_TOKEN = 4
_MUCH = 4 / 3  # times as long: what an engine leaves its point's shorter slices for
_DEEP = 8  # slices for each engine at its point that let them hold one more than they answer
_FIRST_RATE = 1e-3  # seconds a token, until a slice has been timed


@dataclass(frozen=True)
class Part:
    """The requests `begin` to `end` of a task."""

    task: str
    begin: int
    end: int

    @property
    def places(self) -> range:
        """Where its requests are among the task's."""
        return range(self.begin, self.end)


@dataclass(frozen=True)
class Slice:
    """The requests of one batch at one point: a part of a task, or what is left of several. `work` guesses what they
    cost, in tokens."""

    point: WeightPoint
    parts: tuple[Part, ...]
    work: float

    @property
    def count(self) -> int:
        """How many requests it has."""
        return sum(len(part.places) for part in self.parts)

    @property
    def kind(self) -> str:
        """Whose requests it has: slices of one kind take equally long for what they are."""
        return " and ".join(part.task for part in self.parts)

    @property
    def name(self) -> str:
        """What it is called in a sentence."""
        first, *others = self.parts
        more = f" with {len(others)} more tasks" if others else ""
        return f"{first.task} {first.begin} to {first.end - 1}{more}"

    def take(self, requests: Mapping[str, Sequence[Request]]) -> list[Request]:
        """Its own of all `requests`, in order."""
        return [request for part in self.parts for request in requests[part.task][part.begin : part.end]]


def cut(point: WeightPoint, requests: Mapping[str, Sequence[Request]], slice_size: int) -> list[Slice]:
    """The slices of one point: requests of one kind, in order, at most `slice_size` together. Where there are that many
    of a task, they are of this task alone; what is left of each shares slices with what is left of the next. So another
    task leaves full slices alone, and so do more requests of a task."""
    slices: list[Slice] = []
    left: dict[type, list[tuple[Part, float]]] = {}
    for task, asked in requests.items():
        begin = 0
        while begin < len(asked):
            end = begin + 1
            while end < min(len(asked), begin + slice_size) and type(asked[end]) is type(asked[begin]):
                end += 1
            part, work = Part(task, begin, end), sum(map(_work, asked[begin:end]))
            if end - begin == slice_size:
                slices.append(Slice(point, (part,), work))
            else:
                left.setdefault(type(asked[begin]), []).append((part, work))
            begin = end
    for waiting in left.values():
        while waiting:
            count, together = 0, 0
            while together < len(waiting) and (count := count + len(waiting[together][0].places)) <= slice_size:
                together += 1
            parts, works = zip(*waiting[:together], strict=True)
            slices.append(Slice(point, parts, sum(works)))
            del waiting[:together]
    return slices


def _work(request: Request) -> float:
    return len(request.text) / CHARACTERS_PER_TOKEN + request.max_tokens


@dataclass
class _Tally:
    """What finished slices of some kind took."""

    seconds: float = 0.0
    work: float = 0.0


@dataclass
class _Pile:
    """The waiting slices of one kind at one point, the longest last. `tallies`: first of the slices most like them."""

    tallies: tuple[_Tally, _Tally, _Tally]
    slices: list[Slice] = field(default_factory=list)
    work: float = 0.0

    def put(self, piece: Slice) -> None:
        insort(self.slices, piece, key=lambda other: other.work)
        self.work += piece.work

    def take(self) -> Slice:
        piece = self.slices.pop()
        self.work -= piece.work
        return piece

    @property
    def rate(self) -> float:
        """Seconds a token."""
        for tally in self.tallies:
            if tally.work:
                return tally.seconds / tally.work
        return _FIRST_RATE

    @property
    def seconds(self) -> float:
        return self.work * self.rate if self.slices else 0.0

    @property
    def longest(self) -> float:
        return self.slices[-1].work * self.rate


class Schedule:
    """Hands the slices to engines, which are numbers here, so that swaps are few and all end together.

    An engine stays at its point while there is work, then takes a point that no other engine is at, then helps where
    most is left: but only with a slice that it has done, its swap included, before the engines there would have done
    everything without it. It leaves sooner only for a much longer slice at a point that is behind its own. While it
    answers it holds what it does next, where enough is left for all at its point. What slices and swaps take is learned
    from those that are finished. `home` is the point of an engine just started.
    """

    def __init__(self, slices: Iterable[Slice], home: WeightPoint | None = None) -> None:
        self._ids: dict[WeightPoint, int] = {}  # points are numbered: to hash one takes long
        self._piles: list[dict[str, _Pile]] = []  # by point and kind
        self._counts: dict[int, int] = {}  # at the points where there are slices: how many
        self._by_kind: dict[str, _Tally] = defaultdict(_Tally)
        self._total = _Tally()
        for piece in slices:
            self._put(piece)
        # Points of which no slice was ever taken, by their work at each task: those alike take equally long.
        self._alike = {
            point: frozenset((task, pile.work) for task, pile in self._piles[point].items()) for point in self._counts
        }
        self._untaken: dict[frozenset[tuple[str, float]], dict[int, None]] = {}
        for point, kind in self._alike.items():
            self._untaken.setdefault(kind, {})[point] = None
        self._home = None if home is None else self._id(home)
        self._at: dict[int, int | None] = {}
        self._busy: dict[int, tuple[Slice, float]] = {}  # and when it should be done
        self._held: dict[int, Slice] = {}
        self._deaths: Counter[Slice] = Counter()  # of engines at a slice; 0 where one may have been at another
        self._swaps = _Tally()  # its work: how many
        self._refused: set[int] = set()
        self.lethal: list[Slice] = []

    @property
    def over(self) -> bool:
        """Nothing waits and nobody works."""
        return not self._busy and not self._counts and not self._held

    def join(self, engine: int, at: WeightPoint | None = None) -> None:
        """A new engine, or one that is known to be `at` a point."""
        self._at[engine] = None if at is None else self._id(at)

    def leave(self, engine: int, raised: bool = False) -> list[Slice]:
        """The engine is gone; if it was working, its slice goes back whole, or among the `lethal`. One that held
        another may have been at that, its answers lost: unless it has `raised`, neither counts, and from then on no
        engine is given more beside them, so that it is known. Returns what it may have been at."""
        del self._at[engine]
        held = self._held.pop(engine, None)
        if held is not None and self._id(held.point) not in self._refused:
            self._put(held)
        if engine not in self._busy:
            return []
        piece, _ = self._busy.pop(engine)
        at = [piece] if held is None or raised else [piece, held]
        for one in at:
            self._deaths[one] += len(at) == 1
        if self._id(piece.point) in self._refused:
            return at
        if self._deaths[piece] < LETHAL:
            self._put(piece)
        else:
            self.lethal.append(piece)
        return at

    def take(self, engine: int, now: float) -> Slice | None:
        """What an idle engine does next. None: nothing that others will not have done sooner; ask again later,
        since they may be late."""
        here = self._at[engine]
        if engine in self._held:
            piece = self._held.pop(engine)
            self._busy[engine] = (piece, now + self._seconds(piece))
            return piece
        chosen = self._choose(engine, here, now)
        if chosen is None:
            return None
        point, pile = chosen
        seconds = self._swap(here, point) + pile.longest
        piece = self._pull(point, pile)
        self._at[engine] = point
        self._busy[engine] = (piece, now + seconds)
        return piece

    def hold(self, engine: int) -> Slice | None:
        """What a busy engine takes next: it is given that before it is idle. None: it has that, or too little waits at
        its point for all to end together."""
        here = self._at[engine]
        if here is None or engine in self._held or engine not in self._busy or not self._total.work:
            return None
        if self._counts.get(here, 0) <= _DEEP * self._engines_at(here):
            return None
        pile = self._longest(here)[0]
        if self._deaths and (self._busy[engine][0] in self._deaths or pile.slices[-1] in self._deaths):
            return None
        self._held[engine] = self._pull(here, pile)
        return self._held[engine]

    def after(self, engine: int) -> Slice | None:
        """What it will hold next, as far as one can say: its prompts may be made ready."""
        here = self._at[engine]
        if here is None or here not in self._counts:
            return None
        waiting = self._longest(here)[0].slices
        return waiting[max(0, len(waiting) - self._engines_at(here))]

    def _engines_at(self, point: int) -> int:
        return sum(at == point for at in self._at.values())

    def _pull(self, point: int, pile: _Pile) -> Slice:
        piece = pile.take()
        self._touch(point)
        self._counts[point] -= 1
        if not self._counts[point]:
            del self._counts[point]
        return piece

    def _seconds(self, piece: Slice) -> float:
        return piece.work * self._pile(piece).rate

    def due(self, engine: int) -> float:
        """When the engine should have answered its slice."""
        return self._busy[engine][1]

    def finish(self, engine: int, swap: float, seconds: float) -> None:
        """The engine has answered its slice in so many seconds, after a `swap` of so many."""
        piece, _ = self._busy.pop(engine)
        for tally in self._pile(piece).tallies:
            tally.seconds += seconds
            tally.work += piece.work
        self._tally_swap(swap)

    def refuse(self, engine: int, swap: float) -> list[Slice]:
        """The engine has no answers at the point of its slice, after a `swap` of so many seconds: nobody is asked at
        that point again, but for the slices that engines have been given. Returns what waited there."""
        piece, _ = self._busy.pop(engine)
        point = self._id(piece.point)
        self._refused.add(point)
        waiting = [other for pile in self._piles[point].values() for other in pile.slices]
        self._piles[point].clear()
        self._touch(point)
        self._counts.pop(point, None)
        self._tally_swap(swap)
        return waiting

    def _tally_swap(self, swap: float) -> None:
        if swap > 0:
            self._swaps.work += 1
            self._swaps.seconds += swap

    def left(self, point: WeightPoint) -> int:
        """How many slices of a point wait."""
        return self._counts.get(self._id(point), 0)

    def _id(self, point: WeightPoint) -> int:
        if point not in self._ids:
            self._ids[point] = len(self._piles)
            self._piles.append({})
        return self._ids[point]

    def _pile(self, piece: Slice) -> _Pile:
        piles = self._piles[self._id(piece.point)]
        kind = piece.kind
        if kind not in piles:
            piles[kind] = _Pile((_Tally(), self._by_kind[kind], self._total))
        return piles[kind]

    def _put(self, piece: Slice) -> None:
        self._pile(piece).put(piece)
        point = self._id(piece.point)
        self._counts[point] = self._counts.get(point, 0) + 1

    def _waiting(self) -> dict[int, float]:
        """The points where slices wait, and the seconds that one engine would need for them."""
        return {point: sum(pile.seconds for pile in self._piles[point].values()) for point in sorted(self._counts)}

    def _choose(self, engine: int, here: int | None, now: float) -> tuple[int, _Pile] | None:
        if not self._counts:
            return None
        alone = all(at != here for other, at in self._at.items() if other != engine)
        if here is not None and here in self._counts and alone:  # whatever waits at other points, which may be many
            return here, self._longest(here)[0]
        others: dict[int, list[float]] = defaultdict(list)  # when the other engines at each point are free
        for other, point in self._at.items():
            if other != engine and point is not None:
                others[point].append(self._free(other, now))
        if here is not None and here in self._counts:
            there = self._needier(here, self._waiting(), others)
            return there, self._longest(there)[0]
        if (free := self._longest_free(others, fresh=here is None)) is not None:
            return free, self._longest(free)[0]
        left = self._waiting()
        for there in sorted(left, key=lambda point: left[point] / (len(others[point]) + 1), reverse=True):
            without, swap = self._seconds_without(there, others[there]), self._swap(here, there)
            for pile in self._longest(there):
                if swap + pile.longest < without:
                    return there, pile
        return None

    def _longest_free(self, others: Mapping[int, object], fresh: bool) -> int | None:
        """Of the points where slices wait and no other engine is, the one that takes longest; for a fresh engine first
        the home. Not every point is looked at: of those that are alike, the first."""
        if fresh and self._home in self._counts and self._home not in others:
            return self._home
        begun = [point for point in self._counts if point not in self._alike]
        firsts = [next((point for point in alike if point not in others), None) for alike in self._untaken.values()]
        free = sorted(point for point in [*begun, *firsts] if point is not None and point not in others)
        return max(free, key=lambda point: sum(pile.seconds for pile in self._piles[point].values()), default=None)

    def _touch(self, point: int) -> None:
        """A slice of the point is taken, or none ever will be."""
        if (kind := self._alike.pop(point, None)) is not None:
            del self._untaken[kind][point]
            if not self._untaken[kind]:
                del self._untaken[kind]

    def _needier(self, here: int, left: Mapping[int, float], others: Mapping[int, Sequence[float]]) -> int:
        """Where an engine goes that has work at hand: elsewhere only for a much longer slice, which would start too
        late if it waited until all is done here, and only if those it leaves are done before those it helps."""
        longest = {point: self._longest(point)[0].longest for point in left}
        staying = others.get(here, ())
        longer = [point for point in left if longest[point] > _MUCH * longest[here]]
        if not staying or not longer:
            return here

        def with_one_more(point: int) -> float:
            return (sum(others.get(point, ())) + left[point]) / (len(others.get(point, ())) + 1)

        there = max(longer, key=with_one_more)
        without = (sum(staying) + left[here]) / len(staying)
        return there if without + self._swap(here, there) < with_one_more(there) else here

    def _longest(self, point: int) -> list[_Pile]:
        """The piles where slices wait, that with the longest of all first."""
        waiting = [pile for pile in self._piles[point].values() if pile.slices]
        return sorted(waiting, key=lambda pile: pile.longest, reverse=True)

    def _seconds_without(self, point: int, free: Iterable[float]) -> float:
        """When engines that are `free` at these times will have done all that waits at `point`, longest first."""
        times = list(free)
        heapq.heapify(times)
        costs = [piece.work * pile.rate for pile in self._piles[point].values() for piece in pile.slices]
        for cost in sorted(costs, reverse=True):
            heapq.heapreplace(times, times[0] + cost)
        return max(times)

    def _free(self, engine: int, now: float) -> float:
        """In how many seconds an engine should be idle. One that is late will be late by as much again."""
        late = abs(self._busy[engine][1] - now) if engine in self._busy else 0.0
        return late + (self._seconds(self._held[engine]) if engine in self._held else 0.0)

    def _swap(self, here: int | None, point: int) -> float:
        same = point == (self._home if here is None else here)
        return 0.0 if same or not self._swaps.work else self._swaps.seconds / self._swaps.work
