"""From requests to answers at some points: first from the sample cache, then from the fleet. Knows no jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from rvdist.core.log import Log
from rvdist.core.point import WeightPoint
from rvdist.core.timing import Timing
from rvdist.evaluate.asking import Asking, Requests, with_repeat
from rvdist.evaluate.cache import FILE, SampleCache, slice_keys
from rvdist.evaluate.fleet.fleet import Fleet
from rvdist.evaluate.fleet.schedule import Slice, cut
from rvdist.evaluate.fleet.view import FleetView
from rvdist.evaluate.request import Answered
from rvdist.weights.checkpoint.directory import Checkpoint

Answers = dict[Slice, Answered]


@dataclass(frozen=True)
class Asked:
    """A point that is to answer: its digest, the `sources` that this is of, and what it is called while it does."""

    digest: str
    name: str
    sources: Collection[Checkpoint] = ()


@dataclass(frozen=True)
class Answering:
    """How points answer: at most `slice_size` requests together, on the `fleet` (in time), if they have to. `cache` is
    the directory of the sample cache, None without one; `identity` is what of the engines decides answers and is known
    before one is up; `resolved` what vLLM chose where such engines answered into the cache, which is `remember`ed where
    it was not known."""

    slice_size: int
    fleet: Callable[[], Fleet]
    cache: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, str] = field(default_factory=dict)
    remember: Callable[[Mapping[str, str]], None] = lambda chosen: None

    def decides(self, resolved: Mapping[str, str]) -> dict[str, Any]:
        """What of engines that chose this decides answers."""
        return {**self.identity, **({"resolved": dict(resolved)} if resolved else {})}


@dataclass(frozen=True)
class Collected:
    """Every answer there is. `fleet` is what gave them, None where all were known; it had an engine after `start`
    seconds. `cached` counts the requests that were answered before."""

    answers: Answers
    fleet: Fleet | None
    start: float
    cached: int


def answer(
    asking: Asking,
    points: Mapping[WeightPoint, Asked],
    answering: Answering,
    timing: Timing,
    log: Log,
    complete: Callable[[WeightPoint, Answers], None] = lambda point, answers: None,
) -> Collected:
    """The requests, answered at every point; what the cache has is not asked again. `complete` is told of each point
    that is answered, and of all that is so far. A point that the fleet refuses has no answers. Raises BadInput where a
    source has changed since it was digested: no answer that may be of what is there now is kept."""
    requests = asking.requests
    file = str(answering.cache / FILE) if answering.cache else None
    slices = [piece for point in points for piece in cut(point, requests, answering.slice_size)]
    with closing(SampleCache(answering.cache)) if answering.cache else nullcontext() as cache:
        keys: dict[Slice, str] = {}
        answered: Answers = {}
        digests = {point: asked.digest for point, asked in points.items()}
        if cache:
            with timing.phase("cache"):
                answered = _recall(cache, asking, slices, digests, answering)
                if asking.whole:
                    lacking = [piece for piece in slices if piece not in answered]
                    answered |= from_whole(asking.whole, lacking, requests, digests, answering, cache)
            if count := len(cache.damaged):
                log.say("note", f"note: {file}: {count} slices in it are damaged and count as not answered", "warning")
        todo = [piece for piece in slices if piece not in answered]
        left = Counter(piece.point for piece in todo)

        def keep(came: Mapping[Slice, Answered]) -> None:
            nonlocal keys
            for point in {piece.point for piece in came}:  # engines have read them by name, after they were digested
                for source in points[point].sources:
                    source.require_unchanged()
            asking.require_unchanged()
            if cache:
                if not keys.keys() >= came.keys():  # an engine is up by now, and what it chose is known
                    chosen = answering.resolved or fleet.seats.resolved
                    if chosen and not answering.resolved:
                        answering.remember(chosen)
                    keys = _keys(todo, asking, digests, answering.decides(chosen))
                cache.write(
                    (keys[piece], points[piece.point].digest, piece.kind, found) for piece, found in came.items()
                )
            answered.update(came)
            for piece in came:
                left[piece.point] -= 1
                if not left[piece.point]:
                    complete(piece.point, answered)

        for point in points:
            if not left[point]:
                complete(point, answered)
        cached = sum(piece.count for piece in answered)
        total = sum(piece.count for piece in slices)
        timing.count("requests", total - cached)
        timing.count("cached", cached)
        with timing.phase("evaluate"):
            if not todo:
                return Collected(answered, None, 0.0, cached)
            fleet = answering.fleet()
            was_up = fleet.seats.first_up is not None
            names = {point: asked.name for point, asked in points.items()}
            with FleetView(total, cached, names, log, file) as view:
                fleet.answer(todo, requests, keep, view.show)
            for point in points:
                if left[point]:  # refused: what is wrong there may be of a source that is another by now
                    for source in points[point].sources:
                        source.require_unchanged()
            return Collected(answered, fleet, 0.0 if was_up else fleet.seats.first_up or 0.0, cached)


def _keys(
    slices: Sequence[Slice], asking: Asking, digests: Mapping[WeightPoint, str], engine: Mapping[str, Any]
) -> dict[Slice, str]:
    return slice_keys(slices, asking.requests, digests, asking.suite.versions, engine)


def _recall(
    cache: SampleCache,
    asking: Asking,
    slices: Sequence[Slice],
    digests: Mapping[WeightPoint, str],
    answering: Answering,
) -> Answers:
    """The answers that the cache has to each slice: under its key, or under that of before it held what vLLM chose."""
    answers: Answers = {}
    for resolved in (answering.resolved, {}) if answering.resolved else ({},):
        keys = _keys([piece for piece in slices if piece not in answers], asking, digests, answering.decides(resolved))
        known = cache.read(list(keys.values()), {key: piece.take(asking.requests) for piece, key in keys.items()})
        answers |= {piece: known[key] for piece, key in keys.items() if key in known}
    return answers


def from_whole(
    whole: Asking,
    lacking: Sequence[Slice],
    requests: Requests,
    digests: Mapping[WeightPoint, str],
    answering: Answering,
    cache: SampleCache,
) -> Answers:
    """Those of the `lacking` slices, which ask of some documents, that slices of all documents have answered: every
    request of theirs at the same point, as an evaluation of the `whole` left it in the cache. A slice is taken from
    there whole or not at all. `lacking` has one point after the other."""
    sliced: Answers = {}
    for point, pieces in groupby(lacking, key=attrgetter("point")):
        known = _recall(cache, whole, cut(point, whole.requests, answering.slice_size), digests, answering)
        answers = {
            place: answer
            for piece, found in known.items()
            if not found.truncated  # of which one does not know whose they are
            for place, answer in zip(_places(piece), found.answers, strict=True)
        }
        for piece in pieces if answers else ():
            asked = zip(_places(piece), piece.take(requests), strict=True)
            own = [answers.get((task, whole.places[task].get(with_repeat(one), -1))) for (task, _), one in asked]
            if all(own):
                sliced[piece] = Answered(tuple(filter(None, own)), 0, 0.0)
    return sliced


def answers_of(
    point: WeightPoint, requests: Requests, slice_size: int, answered: Mapping[Slice, Answered]
) -> tuple[dict[str, list[Any]], int]:
    """A point's answers by task, in the order of the requests, and how many prompts were cut to fit."""
    answers: dict[str, list[Any]] = {task: [None] * len(asked) for task, asked in requests.items()}
    truncated = 0
    for piece in cut(point, requests, slice_size):
        for (task, place), answer in zip(_places(piece), answered[piece].answers, strict=True):
            answers[task][place] = answer
        truncated += answered[piece].truncated
    return answers, truncated


def _places(piece: Slice) -> list[tuple[str, int]]:
    """The task of each request of a slice, and where it is among that task's."""
    return [(part.task, place) for part in piece.parts for place in part.places]
