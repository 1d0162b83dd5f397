"""Answers a second through the driver: 64 engines that answer at once, on real Ray, into a real sample cache.

    python benchmarks/driver.py [--engines 64] [--answers 262144] [--size 256]

A fake engine returns answers of a typical length without a model. What is left is the driver: the schedule, requests on
their way out, answers on their way in, the cache. Beside it what lm-eval's scoring takes of the same answers, in the
driver's process. Into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tables import write_table

from rvdist.core import cluster
from rvdist.core.log import Log
from rvdist.core.point import Arm, Term, Vector, WeightPoint
from rvdist.core.timing import Timing
from rvdist.evaluate.answers import Answering, Asked, answer
from rvdist.evaluate.asking import Asking
from rvdist.evaluate.fleet.arguments import versions
from rvdist.evaluate.fleet.fleet import Fleet
from rvdist.evaluate.fleet.schedule import Slice
from rvdist.evaluate.request import Answered, Completion, Generate, Loglikelihood, Progress, Request
from rvdist.evaluate.suite import Suite
from rvdist.evaluate.tokenizer import load_tokenizer

PROMPT, TEXT = "Q: what is the sum? " * 40, "First I add them, then I look again. " * 8  # 800 and 296 characters
TASKS, POINTS = 8, 16


class Instant:
    """An engine that has every answer at once."""

    def __init__(self, base: str, settings: Any) -> None:
        pass

    def info(self) -> dict[str, Any]:
        return versions()

    def answer(self, piece: Slice, requests: Sequence[Request]) -> Iterator[Progress | tuple[Answered, float]]:
        yield Answered(tuple(Completion(TEXT, "stop", 200, 74) for _ in requests), 0, 1e-3), 0.0


class Scorer:
    """Scores answers of the pocket family's tasks by lm-eval, again and again, in a thread beside as a command does."""

    def __init__(self) -> None:
        target = Path(__file__).resolve().parent.parent / "rvdist" / "pocket" / "target"
        self._suite, self._tokenizer = Suite.load(["pocket_sums", "pocket_choice"]), load_tokenizer(target, True)
        self._requests = self._suite.requests(self._tokenizer)
        self._answers: dict[str, list[Any]] = {
            task: [
                Completion("12 = 46", "stop", 9, 9) if isinstance(one, Generate) else Loglikelihood(-1.0, True, 2)
                for one in asked
            ]
            for task, asked in self._requests.items()
        }
        self._arm, self._over, self._rounds = Arm("baseline", WeightPoint(str(target)), alpha=0.0), True, 0
        self._thread: threading.Thread | None = None
        self._score()

    def _score(self) -> None:
        self._suite.score(self._arm, "digest", self._tokenizer, self._requests, self._answers, seed=0)

    def _run(self) -> None:
        while not self._over:
            self._score()
            self._rounds += 1

    def begin(self, wanted: bool) -> None:
        self._over, self._rounds = not wanted, 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self, seconds: float) -> float:
        """How many answers it scored a second."""
        rounds, self._over = self._rounds, True
        assert self._thread
        self._thread.join()
        return rounds * sum(map(len, self._requests.values())) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--answers", type=int, default=2**18)
    parser.add_argument("--size", type=int, default=256)
    given = parser.parse_args()
    each = given.answers // TASKS // POINTS
    requests = {f"t{t}": [Generate(f"{PROMPT}{t} {k}", 256) for k in range(each)] for t in range(TASKS)}
    vector = Vector("plus", "minus")
    points = {WeightPoint("base", (Term(p / 8, vector),)): Asked(f"digest {p}", f"{p}") for p in range(POINTS)}
    suite: Any = SimpleNamespace(versions=dict.fromkeys(requests, "1"))
    cluster.connect("local")
    began = time.perf_counter()
    fleet = Fleet("base", None, given.engines, cpus=1 / 64, actor=Instant)
    import ray

    while fleet.seats.started < given.engines:
        fleet.seats.tend()
        for ready in ray.wait(fleet.seats.pending, timeout=1.0)[0]:
            fleet.seats.hear(ready)
    print(f"{fleet.seats.started} engines up in {time.perf_counter() - began:.0f} s", flush=True)
    lines = []
    scorer = Scorer()
    for cached, scored in ((False, False), (True, False), (True, True)):
        scorer.begin(scored)
        with tempfile.TemporaryDirectory() as place:
            asking = Asking("serving", "tensors", suite, None, requests)
            answering = Answering(given.size, lambda: fleet, Path(place) if cached else None, {"engine": "fake"})
            began, used = time.perf_counter(), time.process_time()
            found = answer(asking, points, answering, Timing(), Log())
            wall, cpu = time.perf_counter() - began, time.process_time() - used
        count = sum(len(one.answers) for one in found.answers.values())
        assert count == TASKS * POINTS * each
        rate = scorer.end(wall)
        how = ("kept in the cache" if cached else "not kept") + (f", {rate:,.0f}/s scored beside" if scored else "")
        lines.append(f"| {how} | {count:,} | {wall:.1f} | {count / wall:,.0f} | {cpu:.1f} | {count / cpu:,.0f} |")
        print(lines[-1], flush=True)
    fleet.stop()
    ray.shutdown()
    text = [
        f"{given.engines} engines, slices of {given.size}, {POINTS} points, {os.cpu_count()} cores.",
        "",
        "| answers | how many | s | answers/s | s of the driver's CPU, scoring's too | answers a second of it |",
        "|---|---|---|---|---|---|",
        *lines,
    ]
    print("\n".join(text))
    write_table("driver.py", text)


if __name__ == "__main__":
    main()
