"""How full an engine's batches are: the share of its time in which it answers as many requests as it can at once.

    python benchmarks/batches.py [--rounds 3] [--model DIR]

Four parts, into benchmarks/README.md: a real engine of the pocket family that takes 32 at once, asked what answers of
very different lengths; the fleet with a real engine and small slices, with and without the next slice held; a virtual
engine with lengths as those of a reasoning model; and a sweep of such lengths on up to 64 of them. "Before" is each
task in slices of its own.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from schedule import simulate
from tables import write_table

from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.arguments import EngineSettings
from rvdist.evaluate.fleet.schedule import Slice, cut
from rvdist.evaluate.request import Generate

ROOT = Path(__file__).resolve().parent.parent
TARGET = str(ROOT / "rvdist" / "pocket" / "target")
WIDTH = 32
SETTINGS = EngineSettings(max_model_len=512, kv_cache_gib=0.25, max_num_seqs=WIDTH)
Requests = Mapping[str, Sequence[Generate]]

# The virtual engine: seconds of a step, and more for each that is answered in it; how many it takes at once.
STEP, EACH, VIRTUAL_WIDTH = 8e-3, 3e-5, 256


def lengths(count: int, middle: float, most: int, seed: int) -> list[int]:
    """Drawn, with a long tail: most are short, a few as long as they may be."""
    drawn = random.Random(seed)
    return [max(1, min(most, round(drawn.lognormvariate(0, 0.9) * middle))) for _ in range(count)]


def tasks(number: int, each: int, middle: float, most: int) -> Requests:
    """So many tasks; how long an answer is, its request says."""
    drawn = iter(lengths(number * each, middle, most, number))
    return {
        f"t{n}": [Generate(f"Q: {n} + {k} = ?\nA: {k}", next(drawn), temperature=1.0) for k in range(each)]
        for n in range(number)
    }


def separate(point: WeightPoint, requests: Requests, slice_size: int) -> list[Slice]:
    """As slices were cut before: each task by itself."""
    return [piece for task, asked in requests.items() for piece in cut(point, {task: asked}, slice_size)]


def on_an_engine(engine: Any, batches: Sequence[Sequence[Generate]], width: int = WIDTH) -> tuple[float, float]:
    """Seconds of CPU of vLLM's steps, and the share of them in which `width` requests were under way."""
    core = engine._llm.llm_engine
    own, spent, full = core.step, 0.0, 0.0

    def step() -> Any:
        nonlocal spent, full
        busy, began = core.get_num_unfinished_requests(), time.process_time()
        try:
            return own()
        finally:
            took = time.process_time() - began  # it has one thread, and the machine other work
            spent += took
            full += took * (busy >= width)

    core.step = step
    try:
        for batch in batches:
            engine.answer(batch)
    finally:
        del core.step
    return spent, full / spent


def virtually(batches: Sequence[Sequence[Generate]], width: int = VIRTUAL_WIDTH) -> tuple[float, float]:
    """The same on the virtual engine, which takes the longest prompts first; here they are alike."""
    spent = full = 0.0
    for batch in batches:
        waiting = [request.max_tokens for request in batch][::-1]
        running: list[int] = []
        while waiting or running:
            while waiting and len(running) < width:
                running.append(waiting.pop())
            steps = min(running)
            took = steps * (STEP + EACH * len(running))
            spent += took
            full += took * (len(running) == width)
            running = [left - steps for left in running if left > steps]
    return spent, full / spent


def cases(number: int, each: int, middle: float, most: int, sizes: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """What is cut how, and the batches."""
    point, requests = WeightPoint(TARGET), tasks(number, each, middle, most)
    if number > 1:
        size = sizes[0]
        yield (
            f"{number} tasks of {each}, slices of {size}, before",
            [piece.take(requests) for piece in separate(point, requests, size)],
        )
    for size in sizes:
        yield (
            f"{number} {'tasks' if number > 1 else 'task'} of {each}, slices of {size}",
            [piece.take(requests) for piece in cut(point, requests, size)],
        )


def real(rounds: int) -> list[str]:
    from rvdist.evaluate.fleet.engine import Engine

    engine = Engine(TARGET, SETTINGS)
    chosen = [
        *cases(27, 2, 30, 300, [256]),
        *cases(27, 20, 40, 400, [256]),
        *cases(1, 512, 40, 400, [32, 64, 256, 512]),
    ]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in chosen}
    for _ in range(rounds):
        for name, batches in chosen:
            found[name].append(on_an_engine(engine, batches))
            print(name, found[name][-1], flush=True)
    lines = []
    for name, batches in chosen:
        seconds, full = (median(values) for values in zip(*found[name], strict=True))
        lines.append(f"| {name} | {len(batches)} | {seconds:.1f} | {full:.0%} |")
    return lines


def real_model(target: Path) -> list[str]:
    """Answers of very different lengths of a real model, by the size of slices: seconds of CPU, and full steps."""
    from rvdist.evaluate.fleet.engine import Engine

    width, count = 16, 128
    engine = Engine(str(target), EngineSettings(max_model_len=512, kv_cache_gib=0.5, max_num_seqs=width))
    drawn = lengths(count, 24, 240, 7)
    requests = {"t": [Generate(f"Problem {k}: tell a story.\n", length) for k, length in enumerate(drawn)]}
    lines = [
        f"{count} requests of at most {max(drawn)} tokens (median {sorted(drawn)[count // 2]}), {width} at once.",
        "",
        f"| slices of | batches | s of CPU in vLLM's steps | of them with {width} under way |",
        "|---|---|---|---|",
    ]
    for size in (16, 32, 64, 128):
        batches = [piece.take(requests) for piece in cut(WeightPoint(TARGET), requests, size)]
        seconds, full = on_an_engine(engine, batches, width)
        lines.append(f"| {size} | {len(batches)} | {seconds:.1f} | {full:.0%} |")
        print(lines[-1], flush=True)
    return lines


def through_the_fleet(rounds: int) -> list[str]:
    """One engine, slices of 8 short answers: how much of its time it answers."""
    import ray

    from rvdist.core import cluster
    from rvdist.evaluate.fleet import schedule
    from rvdist.evaluate.fleet.fleet import Fleet

    cluster.connect("local")
    fleet = Fleet(TARGET, replace(SETTINGS, max_num_seqs=None), count=1, cpus=1.0)
    requests = {"t": [Generate(f"Q: {k} + 1 = ?\nA:", 8, temperature=1.0) for k in range(400)]}
    slices, deep = cut(WeightPoint(TARGET), requests, 8), schedule._DEEP
    fleet.answer(slices[:20], requests)
    found: dict[int, list[float]] = {deep: [], 10**9: []}
    for _ in range(rounds):
        for schedule._DEEP in found:
            fleet.answer(slices, requests)
            found[schedule._DEEP].append(fleet.stats.utilisation)
    fleet.stop()
    ray.shutdown()
    print(found, flush=True)
    return [
        f"| {name} | {median(found[how]):.1%} |"
        for name, how in (("each slice when the last is answered", 10**9), ("the next slice held", deep))
    ]


def simulated() -> list[str]:
    lines = []
    for number, each, sizes in ((27, 2, [256]), (27, 40, [256, 1024]), (1, 4096, [256, 512, 1024, 2048, 4096])):
        for name, batches in cases(number, each, 1500, 8192, sizes):
            spent, full = virtually(batches)
            tokens = sum(request.max_tokens for batch in batches for request in batch)
            ideal = tokens / VIRTUAL_WIDTH * (STEP + EACH * VIRTUAL_WIDTH)
            lines.append(f"| {name} | {len(batches)} | {spent:.0f} | {full:.0%} | {spent / ideal:.2f} |")
    return lines


def by_sweep() -> list[str]:
    """A sweep on virtual engines by the fleet's own schedule: its makespan beside the time in which they would make as
    many tokens with batches that are always full."""
    lines = [
        "| at once | slices of | slices | 1 engine: × always full | 4 engines | 16 | 64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for width in (256, 1024):
        for size in (256, 512, 1024, 2048):
            seconds, tokens = dict[Slice, float](), 0
            for p in range(17):
                requests: dict[str, list[Generate]] = {}
                for t, count in enumerate((1319, 500, 164)):
                    drawn = lengths(count, 1500, 8192, 100 * p + t)
                    requests[f"t{t}"] = [Generate(f"{t} {k}", length) for k, length in enumerate(drawn)]
                    tokens += sum(drawn)
                guessed = {name: [replace(one, max_tokens=8192) for one in own] for name, own in requests.items()}
                for piece in cut(WeightPoint(f"point {p}"), guessed, size):
                    seconds[piece], _ = virtually([piece.take(requests)], width)
            ideal = tokens / width * (STEP + EACH * width)
            cells = [
                f"{simulate(seconds, [0.0] * engines, 3.0).makespan * engines / ideal:.2f}"
                for engines in (1, 4, 16, 64)
            ]
            lines.append(f"| {width} | {size} | {len(seconds)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a real model, into a table of its own")
    given = parser.parse_args()
    rounds = given.rounds
    if given.model:
        lines = real_model(given.model)
        print("\n".join(lines))
        write_table("batches.py --model", lines)
        return
    write_table("batches.py, a sweep", lines := by_sweep())
    print("\n".join(lines))
    fleet = through_the_fleet(rounds)
    lines = [
        "| real engine, 32 at once | batches | s of CPU in vLLM's steps | of them with 32 under way |",
        "|---|---|---|---|",
        *real(rounds),
        "",
        "| real engine through the fleet, 50 slices of 8 | of its time it answers |",
        "|---|---|",
        *fleet,
        "",
        "| virtual engine, 256 at once, up to 8,192 tokens | batches | s | of them with 256 under way | × a batch "
        "that is always full |",
        "|---|---|---|---|---|",
        *simulated(),
    ]
    print("\n".join(lines))
    write_table("batches.py", lines)


if __name__ == "__main__":
    main()
