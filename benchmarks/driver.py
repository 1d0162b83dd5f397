"""Answers a second through the driver: 64 engines that answer at once, on real Ray, into a real sample cache, scored.

    python benchmarks/driver.py [--engines 64] [--answers 262144] [--size 256]

A fake engine returns answers of a typical length without a model. What is left is the driver: the schedule, requests
on their way out, answers on their way in, the cache, and lm-eval's scoring of every answer, in a thread of the driver's
and in processes of its own. Into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
from tables import write_table

from rvdist.core import cluster
from rvdist.core.log import Log
from rvdist.core.point import Arm, Term, Vector, WeightPoint
from rvdist.core.timing import Timing
from rvdist.evaluate import scorers
from rvdist.evaluate.answers import Answering, Answers, Asked, answer, answers_of
from rvdist.evaluate.asking import Asking
from rvdist.evaluate.fleet.arguments import versions
from rvdist.evaluate.fleet.fleet import Fleet
from rvdist.evaluate.fleet.schedule import Slice
from rvdist.evaluate.request import Answered, Completion, Progress, Request
from rvdist.evaluate.scorers import Scored, Scorers
from rvdist.evaluate.suite import Suite
from rvdist.evaluate.tokenizer import load_tokenizer

TARGET = Path(__file__).resolve().parent.parent / "rvdist" / "pocket" / "target"
PROMPT, TEXT = "Q: what is the sum? " * 40, "First I add them, then I look again. " * 8  # 800 and 296 characters
TASKS, POINTS = 8, 16
TASK = """task: t{number}
dataset_path: json
test_split: test
output_type: generate_until
dataset_kwargs: {{data_files: {{test: {file}}}}}
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: ["Q:"], max_gen_toks: 256}}
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (-?[0-9]+)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1}}
"""


class Ready:
    """What a fake says, made into bytes once: an engine on another machine takes no time of this one's for it."""

    def __init__(self, said: object) -> None:
        self._bytes = pickle.dumps(said)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self._bytes,)


class Instant:
    """An engine that has every answer at once."""

    def __init__(self, base: str, settings: Any) -> None:
        os.nice(19)
        self._said: dict[int, Ready] = {}

    def info(self) -> dict[str, Any]:
        return versions()

    def answer(self, piece: Slice, requests: Sequence[Request]) -> Iterator[Progress | tuple[Answered, float] | Ready]:
        count = len(requests)
        if count not in self._said:
            answers = tuple(Completion(f"{TEXT}#### {k}", "stop", 200, 74) for k in range(count))
            self._said[count] = Ready((Answered(answers, 0, 1e-3), 0.0))
        yield self._said[count]


def suite_of(folder: Path, each: int) -> Suite:
    """Tasks of so many problems."""
    for number in range(TASKS):
        file = folder / f"{number}.json"
        file.write_text(
            json.dumps([{"question": f"{PROMPT}{number} {k}", "answer": f"{k % 256}"} for k in range(each)])
        )
        (folder / f"{number}.yaml").write_text(TASK.format(number=number, file=file))
    return Suite.load([f"t{number}" for number in range(TASKS)], folder, chat=False)


def cpu_of(pool: Scorers | None) -> dict[str, float]:
    """Seconds of CPU so far: of the driver, of processes that score, of the engines, of all else that Ray started."""
    scoring = {process._process.pid for process in pool._processes} if pool else set[int]()
    spent = {"driver": time.process_time(), "scoring": 0.0, "engines": 0.0, "ray": 0.0}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            name = " ".join(process.cmdline())
            kind = "scoring" if process.pid in scoring else "engines" if "ray::Instant" in name else "ray"
            spent[kind] += sum(process.cpu_times()[:2])
    return spent


def through(fleet: Fleet, asking: Asking, size: int, cached: bool, scored: str) -> str:
    """A row of the table: all answered and, if they are to be, scored "here" or "beside"."""
    vector = Vector("plus", "minus")
    arms = {WeightPoint("base", (Term(p / 8, vector),)): Arm(f"alpha={p}", WeightPoint("base")) for p in range(POINTS)}
    points = {point: Asked(f"digest {arm.name}", arm.name) for point, arm in arms.items()}
    scorers._WORTH = 0 if scored == "beside" else 10**9
    with Scorers(1) if scored else nullcontext() as pool, tempfile.TemporaryDirectory() as place:
        answering = Answering(size, lambda: fleet, Path(place) if cached else None, {"engine": "fake"})
        futures: list[Future[Scored]] = []

        def score(arm: Arm, point: WeightPoint, answers: Answers) -> Scored:
            assert pool
            by_task, _ = answers_of(point, asking.requests, size, answers)
            return pool.score(asking, arm, "digest", by_task, 0)

        def complete(point: WeightPoint, answers: Answers) -> None:
            if pool:
                futures.append(pool.submit(score, arms[point], point, answers))

        if pool:  # as a command does while engines start
            pool.expect(asking)
            blank = {task: [Completion("", "stop", 9, 9)] * len(asked) for task, asked in asking.requests.items()}
            for _ in range(max(1, len(pool._processes))):
                pool.score(asking, arms[next(iter(arms))], "digest", blank, 0)
        before, began = cpu_of(pool), time.perf_counter()
        found = answer(asking, points, answering, Timing(), Log(), complete)
        answered = time.perf_counter() - began
        if pool:
            pool.take_part()
        records = sum(len(one.result()[1]) for one in futures)
        wall, after = time.perf_counter() - began, cpu_of(pool)
        processes = len(pool._processes) if pool else 0
    count = sum(len(one.answers) for one in found.answers.values())
    assert count == len(points) * sum(map(len, asking.requests.values())) and records == (count if scored else 0)
    how = ("kept in the cache" if cached else "not kept") + {
        "": "",
        "here": ", scored in a thread of the driver's",
        "beside": f", scored in {processes} process{'es' if processes > 1 else ''}",
    }[scored]
    cells = [how, f"{count:,}", f"{wall:.1f}", f"{count / wall:,.0f}", f"{wall - answered:.1f}"]
    cells += [f"{1e6 * (after[kind] - before[kind]) / count:.1f}" for kind in before]
    print("|", " | ".join(cells), "|", flush=True)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--answers", type=int, default=2**18)
    parser.add_argument("--size", type=int, default=256)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    cluster.connect("local")
    began = time.perf_counter()
    fleet = Fleet("base", None, given.engines, cpus=1 / 64, actor=Instant)
    import ray

    while fleet.seats.started < given.engines:
        fleet.seats.tend()
        for ready in ray.wait(fleet.seats.pending, timeout=1.0)[0]:
            fleet.seats.hear(ready)
    print(f"{fleet.seats.started} engines up in {time.perf_counter() - began:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        suite, tokenizer = suite_of(Path(folder), given.answers // TASKS // POINTS), load_tokenizer(TARGET, False)
        asking = Asking("serving", "tensors", suite, tokenizer, suite.requests(tokenizer))
        lines = [
            through(fleet, asking, given.size, cached, scored)
            for cached, scored in ((False, ""), (True, ""), (True, "here"), (True, "beside"))
        ]
    fleet.stop()
    ray.shutdown()
    text = [
        f"{given.engines} engines, slices of {given.size}, {POINTS} points, {os.cpu_count()} cores at a load of "
        f"{load:.0f} before.",
        "",
        "| answers | how many | s | answers/s | of it after the last answer, s | µs of CPU an answer: driver | "
        "processes that score | engines | Ray's own |",
        "|---|---|---|---|---|---|---|---|---|",
        *lines,
    ]
    print("\n".join(text))
    write_table("driver.py", text)


if __name__ == "__main__":
    main()
