"""The schedule on more engines than there are: recorded times of real slices, dealt out by the fleet's own Schedule to
engines of a virtual clock. `python benchmarks/schedule.py` prints the table of benchmarks/README.md; `--record RUN …`
first writes the times anew, from the directories of equal runs, each with a sample cache of its own in `cache`.
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
from statistics import median

from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.schedule import Part, Schedule, Slice

TIMES = Path(__file__).with_name("schedule.json")
_WORK = {"pocket_sums": 2361.0, "pocket_choice": 766.0, "pocket_control": 780.0}  # guessed beforehand: see cut
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
        for busy in working:
            schedule.hold(busy)
        if len(working) < len(engines) and not asked and not schedule.over:
            asked = True
            heapq.heappush(events, (now + _ASK_AGAIN, -1, "ask", (0.0, 0.0)))
    outcome.lifetimes += sum(outcome.makespan - joined for joined, _ in engines.values())
    outcome.lethal = schedule.lethal
    return outcome


def lower_bound(seconds: Mapping[Slice, float], joins: Sequence[float], swap: float = 0.0) -> float:
    """No schedule ends sooner: every engine swaps once, since none joins at a point, then works from there until all is
    done, or the first one at the longest slice."""
    left, end = sum(seconds.values()), 0.0
    for k, joined in enumerate(ordered := sorted(at + swap for at in joins)):
        following = ordered[k + 1] if k + 1 < len(ordered) else float("inf")
        end = joined + left / (k + 1)
        if end <= following:
            break
        left -= (k + 1) * (following - joined)
    return max(end, ordered[0] + max(seconds.values()))


def in_order(seconds: Mapping[Slice, float], engines: int, swap: float) -> Outcome:
    """What the schedule is compared with: the next slice of the list to whoever is idle."""
    outcome = Outcome()
    free: list[tuple[float, int, WeightPoint | None]] = [(0.0, engine, None) for engine in range(engines)]
    for piece, took in seconds.items():
        at, engine, point = free[0]
        outcome.swaps += point != piece.point
        end = at + took + swap * (point != piece.point)
        heapq.heapreplace(free, (end, engine, piece.point))
        outcome.makespan = max(outcome.makespan, end)
    return outcome


def recorded() -> tuple[dict[Slice, float], float]:
    """The recorded slices with their seconds, and the seconds of a swap."""
    found = json.loads(TIMES.read_text())
    slices = {
        Slice(WeightPoint(f"point {point}"), (Part(task, k, k + 1),), _WORK[task]): seconds
        for point, tasks in enumerate(found["seconds"])
        for task, times in tasks.items()
        for k, seconds in enumerate(times)
    }
    return slices, found["swap"]


def record(runs: Sequence[Path]) -> None:
    """Keeps the times of a finished run's slices, for each point by task: the median of several runs of the same."""
    times: dict[str, dict[str, dict[str, list[float]]]] = {}  # by point, task and slice
    swaps = []
    for run in runs:
        cache = sqlite3.connect(run / "cache" / "samples.sqlite")
        for key, point, task, seconds in cache.execute("SELECT key, point, task, seconds FROM slices ORDER BY rowid"):
            times.setdefault(point, {}).setdefault(task, {}).setdefault(key, []).append(seconds)
        timing = json.loads((run / "timing.json").read_text())
        swaps.append(timing["phases"]["swap"] / timing["fleet"]["swaps"])
    seconds = [
        {task: [round(median(found), 3) for found in slices.values()] for task, slices in tasks.items()}
        for tasks in times.values()
    ]
    TIMES.write_text(json.dumps({"swap": round(median(swaps), 3), "seconds": seconds}).replace("{", "\n{") + "\n")


def table(seconds: Mapping[Slice, float], swap: float, engines: int = 64) -> str:
    """The README's table. Late engines come when all would be half done; the dying ones go one after another."""
    half = sum(seconds.values()) / engines / 2
    typical = sorted(seconds.values())[len(seconds) // 2]
    at_once = [0.0] * engines
    late = [0.0] * (engines // 2) + [half] * (engines // 2)
    deaths = {engine: half * (engine + 1) / 4 for engine in range(8)}
    lines = [
        "| what | bound without swaps, s | with the first ones, s | makespan, s | × without | × with | utilisation | "
        "swaps | in order: × with | swaps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, joins, cost, dying in (
        ("all there", at_once, swap, {}),
        ("swaps as long as five slices", at_once, 5 * typical, {}),
        ("half of them late", late, swap, {}),
        ("8 die", at_once, swap, deaths),
    ):
        found, least = simulate(seconds, joins, cost, dying), lower_bound(seconds, joins)
        bound = lower_bound(seconds, joins, cost)
        plain = in_order(seconds, engines, cost) if joins is at_once and not dying else None
        naive = f"{plain.makespan / bound:.2f} | {plain.swaps}" if plain else " | "
        lines.append(
            f"| {name} | {least:.2f} | {bound:.2f} | {found.makespan:.2f} | {found.makespan / least:.2f} | "
            f"{found.makespan / bound:.2f} | "
            f"{found.busy / found.lifetimes:.0%} | {found.swaps} | {naive} |"
        )
    points = len({piece.point for piece in seconds})
    return (
        f"{len(seconds)} slices of {points} points and {len({piece.kind for piece in seconds})} tasks, "
        f"{sum(seconds.values()):.0f} s together, longest {max(seconds.values()):.2f} s, median {typical:.2f} s; "
        f"a swap takes {swap:.3f} s; {engines} engines.\n\n" + "\n".join(lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, nargs="+", metavar="RUN", help="write the recorded times anew")
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record)
    print(table(*recorded()))


if __name__ == "__main__":
    main()
