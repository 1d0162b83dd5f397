"""The schedule on more engines than there are: recorded times of real slices, dealt out by the fleet's own Schedule to
engines of a virtual clock. `python benchmarks/schedule.py` prints the table of benchmarks/README.md;
`--record CACHE` writes the times anew from the sample cache of a run.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rvdist.fleet.schedule import Schedule, Slice
from rvdist.point import WeightPoint

TIMES = Path(__file__).with_name("schedule.json")
_ASK_AGAIN = 0.05  # seconds, for an engine that had better wait


@dataclass
class Outcome:
    """`busy` and `lifetimes` in seconds, summed over engines; `answers` says how often each slice was answered."""

    makespan: float = 0.0
    busy: float = 0.0
    lifetimes: float = 0.0
    swaps: int = 0
    answers: Counter[Slice] = field(default_factory=Counter)
    lethal: list[Slice] = field(default_factory=list)


def simulate(
    seconds: Mapping[Slice, float],
    joins: Sequence[float],
    swap: float,
    deaths: Mapping[int, float] | None = None,
    poison: frozenset[Slice] = frozenset(),
) -> Outcome:
    """What becomes of slices that take so many `seconds` each, when engine k joins at `joins[k]`. An engine dies at
    its time in `deaths`, or half-way through a slice of `poison`, and another one takes its place at once."""
    schedule, outcome = Schedule(seconds), Outcome()
    events: list[tuple[float, int, str, tuple[float, float]]] = [
        (at, engine, "join", (0.0, 0.0)) for engine, at in enumerate(joins)
    ]
    events += [(at, engine, "die", (0.0, 0.0)) for engine, at in (deaths or {}).items()]
    heapq.heapify(events)
    engines: dict[int, tuple[float, WeightPoint | None]] = {}  # when it joined and where it is
    working: dict[int, Slice] = {}
    number, asked = len(joins), False
    while not schedule.over:
        now, engine, event, (swapped, took) = heapq.heappop(events)
        if event == "ask":
            asked = False
        elif event == "join":
            engines[engine] = (now, None)
            schedule.join(engine)
        elif engine not in engines:
            continue
        elif event == "done":
            schedule.finish(engine, swapped, took)
            outcome.answers[working.pop(engine)] += 1
            outcome.busy += swapped + took
        elif event == "die":
            schedule.leave(engine)
            working.pop(engine, None)
            outcome.lifetimes += now - engines.pop(engine)[0]
            heapq.heappush(events, (now, number, "join", (0.0, 0.0)))
            number += 1
        outcome.makespan = now
        for idle in [one for one in engines if one not in working]:
            piece = schedule.take(idle, now)
            if piece is None:
                continue
            joined, at = engines[idle]
            cost = swap if at != piece.point else 0.0
            engines[idle] = (joined, piece.point)
            outcome.swaps += at != piece.point
            working[idle] = piece
            ends = (
                (now + (cost + seconds[piece]) / 2, "die") if piece in poison else (now + cost + seconds[piece], "done")
            )
            heapq.heappush(events, (ends[0], idle, ends[1], (cost, seconds[piece])))
        if len(working) < len(engines) and not asked and not schedule.over:
            asked = True
            heapq.heappush(events, (now + _ASK_AGAIN, -1, "ask", (0.0, 0.0)))
    outcome.lifetimes += sum(outcome.makespan - joined for joined, _ in engines.values())
    outcome.lethal = schedule.lethal
    return outcome


def lower_bound(seconds: Mapping[Slice, float], engines: int) -> float:
    """No schedule ends sooner: all work shared evenly, or the longest slice."""
    return max(sum(seconds.values()) / engines, *seconds.values())


def recorded() -> tuple[dict[Slice, float], float]:
    """The recorded slices with their seconds, and the seconds of a swap."""
    found = json.loads(TIMES.read_text())
    slices, begin = {}, Counter[tuple[int, str]]()
    for point, task, count, seconds in found["slices"]:
        start = begin[point, task]
        begin[point, task] += count
        work = count * found["work"][task]
        slices[Slice(WeightPoint(f"point {point}"), task, start, start + count, work)] = seconds
    return slices, found["swap"]


def record(cache: Path, swap: float, work: Mapping[str, float]) -> None:
    """Keeps the times of a finished run's slices; `work` is a task's guess for one request."""
    rows = sqlite3.connect(cache / "samples.sqlite").execute(
        "SELECT point, task, json_array_length(answers), seconds FROM slices ORDER BY rowid"
    )
    points: dict[str, int] = {}
    slices = [
        [points.setdefault(point, len(points)), task, count, round(seconds, 4)] for point, task, count, seconds in rows
    ]
    text = json.dumps({"swap": swap, "work": work, "slices": slices}).replace("], [", "],\n[")
    TIMES.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, metavar="CACHE", help="a run's cache.dir: write its times anew")
    parser.add_argument("--swap", type=float, help="with --record: the seconds of a swap, as the run's timing.json has")
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record, arguments.swap)
        return


if __name__ == "__main__":
    main()
