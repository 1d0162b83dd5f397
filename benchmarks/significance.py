"""What verdicts and intervals are worth, where the truth is known: simulated arms, equal ones and ones that differ.

    python benchmarks/significance.py [--rounds N] [--older CHECKOUT]
    python benchmarks/significance.py --verdicts [--rounds N]

Each situation is drawn anew in every round: two arms that are alike, then two of which one is better by the change
that the report says it could have seen. Counted are verdicts on equal arms, intervals that hold the truth, and verdicts
where there was something to see. N (2,000) rounds of 0/1 scores asked once, a fifth of it of all others; a Monte Carlo
standard error is at most √(0.25/rounds). Then reports of seventeen equal arms, and the seconds of a whole report on
100,000 records, beside reading their JSON and nothing else. CHECKOUT is a working tree of commit 932cee4, whose test
was a bootstrap: its report on the same records. Seeds are fixed. With CHECKOUT the tables
go to benchmarks/README.md. The second command asks how often each verdict is wrong where it is easiest to be wrong, and
writes that table there alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_1samp
from tables import write_table

from rvdist.core import point, record
from rvdist.core.point import Arm, WeightPoint
from rvdist.core.record import Record, TaskInfo, write_records
from rvdist.report import findings, report
from rvdist.report.statistics import compare as statistics
from rvdist.report.statistics.compare import (
    SEEN,
    Comparison,
    compare,
    compare_discordant,
    detectable_effects,
    holm,
    rooms,
    score_interval,
    within,
)
from rvdist.report.statistics.sample import Sample, Score
from rvdist.report.statistics.sweep import confirm
from rvdist.report.summary import MARGIN, GroupInfo

ROOT = Path(__file__).resolve().parent.parent
PAIR = ("score", "none")
ARMS = [Arm(name, WeightPoint(name), "plain", None) for name in ("baseline", "arm")]
LEVEL, ARMS_OF_A_REPORT = 0.05, 17
Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, float], tuple[Floats, Floats]]  # documents, change → [document, repeat] × 2


# ---------------------------------------------------------------- arms whose truth is known


def binary(share: float, changed: float = 0.2) -> Draw:
    """0/1 scores: so many documents right, and so many that change (more where the change needs it)."""

    def draw(rng: np.random.Generator, n: int, change: float) -> tuple[Floats, Floats]:
        theirs, chance = rng.random(n) < share, rng.random(n)
        moving = max(changed, abs(change))
        falls = theirs & (chance < (moving - change) / 2 / share)
        rises = ~theirs & (chance < (moving + change) / 2 / (1 - share))
        return theirs[:, None] * 1.0, ((theirs & ~falls) | rises)[:, None] * 1.0

    return draw


def repeated(rng: np.random.Generator, n: int, change: float) -> tuple[Floats, Floats]:
    """Four answers a document, which is hard, middling or easy: 0.5 in the mean."""
    ease = rng.choice([0.3, 0.5, 0.7], n)[:, None]
    return (rng.random((n, 4)) < ease) * 1.0, (rng.random((n, 4)) < ease + change) * 1.0


def fractional(rng: np.random.Generator, n: int, change: float) -> tuple[Floats, Floats]:
    """Parts of a point, as F1 gives: 0, 1, or between, 0.5 in the mean; half of the answers change, some to 1."""

    def some() -> Floats:
        return np.where(rng.random(n) < 0.4, rng.beta(2, 2, n), (rng.random(n) < 0.5) * 1.0)

    theirs = some()
    ours = np.where(rng.random(n) < 0.5, some(), theirs)
    return theirs[:, None], np.where(rng.random(n) < 2 * change, 1.0, ours)[:, None]


def skewed(rng: np.random.Generator, n: int, change: float) -> tuple[Floats, Floats]:
    """Lognormal scores without bounds in both arms: differences are symmetric."""
    theirs, ours = rng.lognormal(size=(2, n, 1))
    return theirs, ours + change


def lopsided(rng: np.random.Generator, n: int, change: float) -> tuple[Floats, Floats]:
    """Differences that are lognormal, zero in the mean: most documents lose a little, few gain much."""
    theirs, differences = rng.lognormal(size=(2, n, 1))
    return theirs, theirs + differences - math.exp(0.5) + change


@dataclass(frozen=True)
class Situation:
    """`draws` are those of the members of a group, each of so many documents; of a task there is one."""

    name: str
    sizes: tuple[int, ...]
    draws: tuple[Draw, ...]
    score: float  # what is true of the baseline
    shares: bool = True  # every answer scores 0 or 1
    by_size: bool = True

    @property
    def exact(self) -> bool:
        return len(self.sizes) == 1 and self.shares and self.name.startswith("0/1, asked once")

    def weights(self) -> Floats:
        each = 1.0 if self.by_size else sum(self.sizes) / (len(self.sizes) * np.array(self.sizes))
        return np.repeat(np.broadcast_to(each, len(self.sizes)), self.sizes)

    def answers(self, rng: np.random.Generator, change: float) -> list[tuple[Floats, Floats]]:
        return [draw(rng, n, change) for draw, n in zip(self.draws, self.sizes, strict=True)]

    def samples(self, answers: list[tuple[Floats, Floats]]) -> list[Sample]:
        """The baseline's, and the arm's."""
        return [
            Sample(
                documents=(),
                values=np.concatenate([answer.mean(1) for answer in of]),
                weights=self.weights(),
                strata=self.sizes,
                exact=self.exact,
                shares=self.shares,
                point="",
                seeds=frozenset([0]),
            )
            for of in zip(*answers, strict=True)
        ]

    def report(self, answers: list[tuple[Floats, Floats]]) -> tuple[list[Record], list[TaskInfo], list[GroupInfo]]:
        """The same as records, and what they are records of."""
        tasks = [TaskInfo(f"task {i:02}", "1", (PAIR,), PAIR, {"score": True}) for i in range(len(self.sizes))]
        groups = [GroupInfo("group", tuple(task.name for task in tasks), (PAIR,), self.by_size)]
        records = [
            made_record(arm.name, task.name, document, seed, float(score))
            for task, both in zip(tasks, answers, strict=True)
            for arm, of in zip(ARMS, both, strict=True)
            for document, scores in enumerate(of)
            for seed, score in enumerate(scores)
        ]
        return records, tasks, groups if len(tasks) > 1 else []

    def detectable(self, rng: np.random.Generator) -> float:
        """What the report says it could have seen, of equal arms."""
        records, tasks, groups = self.report(self.answers(rng, 0.0))
        found = detectable_effects(ARMS, records, tasks, "baseline", groups)
        return found["group" if groups else tasks[0].name, "arm"]


def made_record(arm: str, task: str, document: int, seed: int, score: float, text: str = "") -> Record:
    doc = f"{task}-{document:05}"
    return Record(arm, arm, None, "plain", task, "none", seed, document, doc, {"score": score}, text, "5", text, "5")


def situations() -> Iterator[Situation]:
    for n in (50, 200, 1300):
        yield Situation("0/1, asked once", (n,), (binary(0.6),), 0.6)
    yield Situation("0/1, asked once, 2 % change", (1300,), (binary(0.6, 0.02),), 0.6)
    for n in (50, 200, 1300):
        yield Situation("0/1, asked four times", (n,), (repeated,), 0.5)
    for n in (9, 50, 200, 1300):
        yield Situation("fractions", (n,), (fractional,), 0.5, shares=False)
    for n in (5, 8, 50, 200, 1300):
        yield Situation("lognormal scores", (n,), (skewed,), math.exp(0.5), shares=False)
    for n in (16, 50, 200, 1300):
        yield Situation("lognormal differences", (n,), (lopsided,), math.exp(0.5), shares=False)
    shares = (0.75, 0.5, 0.3)
    three = tuple(map(binary, shares))
    yield Situation("group of 27, by size", (10,) * 27, three * 9, float(np.mean(shares)))
    yield Situation("group of 3, by size", (10, 40, 150), three, float(np.average(shares, weights=(10, 40, 150))))
    yield Situation("group of 3, mean of means", (10, 40, 150), three, float(np.mean(shares)), by_size=False)
    yield Situation("the same, of fractions", (10, 40, 150), (fractional,) * 3, 0.5, shares=False, by_size=False)
    yield Situation("the same, one of 2 documents", (2, 50, 200), three, float(np.mean(shares)), by_size=False)


# ---------------------------------------------------------------- what is said of them


@dataclass
class Tally:
    """Counts of one situation; `split` counts comparisons whose interval, p value and verdict disagree."""

    rounds: int
    called: int = 0
    strictly: int = 0
    by_t: int = 0
    held_none: int = 0
    held_change: int = 0
    held_score: int = 0
    seen: int = 0
    split: int = 0
    detectable: float = math.nan

    def row(self, situation: Situation) -> list[str]:
        def share(count: int) -> str:
            return f"{100 * count / self.rounds:.1f}%"

        by_t = share(self.by_t) if len(situation.sizes) == 1 else ""
        n = " + ".join(map(str, situation.sizes)) if len(situation.sizes) < 9 else "27 × 10"
        return [
            situation.name, n, f"{self.rounds:,}", share(self.called), by_t, share(self.strictly),
            share(self.held_none), share(self.held_change), share(self.held_score), f"{self.detectable:.3f}",
            share(self.seen),
        ]  # fmt: skip


HEAD = [
    "scores", "documents", "rounds", "equal arms called at .05", "by a t test", "at .05/17", "interval held 0",
    "held the change", "score's interval held", "said to be seen", "seen",
]  # fmt: skip


def holds(low: float, high: float, truth: float) -> bool:
    """An end of which nothing is known excludes nothing."""
    return not (low > truth + 1e-12 or high < truth - 1e-12)


def disagrees(found: Comparison) -> bool:
    excludes = found.low > 0 or found.high < 0
    said = found.verdict(True) != "no detectable difference"
    return not excludes == said == (found.p_value < LEVEL)


def tally(situation: Situation, rounds: int, seed: int) -> Tally:
    rng = np.random.default_rng([seed, 0])
    found = Tally(rounds)
    found.detectable = change = float(np.median([situation.detectable(rng) for _ in range(25)]))
    for _ in range(rounds):
        theirs, ours = situation.samples(situation.answers(rng, 0.0))
        none = compare(ours, theirs)
        found.called += none.p_value < LEVEL
        found.strictly += none.p_value < LEVEL / ARMS_OF_A_REPORT
        found.held_none += holds(none.low, none.high, 0.0)
        found.held_score += holds(*score_interval(theirs), situation.score)
        if len(situation.sizes) == 1 and (differences := ours.values - theirs.values).any():
            found.by_t += ttest_1samp(differences, 0.0).pvalue < LEVEL
        theirs, ours = situation.samples(situation.answers(rng, change))
        some = compare(ours, theirs)
        found.seen += some.p_value < LEVEL
        found.held_change += holds(some.low, some.high, change)
        found.split += disagrees(none) + disagrees(some)
    return found


def equal_reports(n: int, draw: Draw, shares: bool, rounds: int) -> float:
    """The share of reports of equal arms, a baseline and seventeen, in which some arm differs after Holm."""
    rng, wrong = np.random.default_rng([n, 1]), 0
    situation = Situation("0/1, asked once", (n,), (draw,), math.nan, shares)
    for _ in range(rounds):
        baseline = situation.samples(situation.answers(rng, 0.0))[0]
        others = [situation.samples(situation.answers(rng, 0.0))[0] for _ in range(ARMS_OF_A_REPORT)]
        wrong += min(holm([compare(other, baseline).p_value for other in others])) < LEVEL
    return wrong / rounds


# ---------------------------------------------------------------- how often each verdict is wrong

SIZES = (60, 200, 600, 1300)
QUESTION = Score("task", *PAIR, True, True)
Wrong = Callable[[np.random.Generator, int], bool]  # of so many documents, drawn once


def drawn(values: Floats, name: str = "") -> Sample:
    documents = tuple(f"{name}{k}" for k in range(len(values)))
    return Sample(documents, values, np.ones(len(values)), (len(values),), True, True, "", frozenset([0]))


def pair(rng: np.random.Generator, n: int, draw: Draw, change: float) -> tuple[Sample, Sample]:
    """An arm and its baseline."""
    theirs, ours = draw(rng, n, change)
    return drawn(ours[:, 0]), drawn(theirs[:, 0])


def differs(rng: np.random.Generator, n: int) -> bool:
    """Equal arms, one document in five changes: better or worse."""
    return compare(*pair(rng, n, binary(0.6), 0.0)).p_value < LEVEL


def equals(changed: float) -> Wrong:
    """Arms that differ by the margin itself: equivalent. So many documents change."""

    def said(rng: np.random.Generator, n: int) -> bool:
        found = compare(*pair(rng, n, binary(0.6, changed), MARGIN))
        return within(found.low, found.high, MARGIN)

    return said


def hides(rng: np.random.Generator, n: int) -> bool:
    """A baseline with twice the room that is asked for, in the mean: cannot be seen."""
    return rooms(drawn((rng.random(n) >= 2 * SEEN / n) * 1.0))["rise"] < SEEN


def grid(rng: np.random.Generator, n: int, arms: int = ARMS_OF_A_REPORT) -> tuple[Sample, list[Sample], list[Arm]]:
    """A baseline and arms along α that are all equal to it, one document in five changing."""
    theirs = rng.random(n) < 0.6
    line = [Arm(f"{k}", WeightPoint(f"{k}"), "plain", k / arms) for k in range(1, arms + 1)]
    ours = []
    for _ in line:
        chance = rng.random(n)
        ours.append(drawn(np.where(theirs, chance >= 0.1 / 0.6, chance < 0.1 / 0.4) * 1.0))
    return drawn(theirs * 1.0), ours, line


def confirms(rng: np.random.Generator, n: int) -> bool:
    """The best of 17 equal arms: confirmed, or worse, on the documents that did not choose it."""
    baseline, ours, line = grid(rng, n)
    found = confirm(line, ours, baseline, QUESTION)
    return found is not None and found.found.p_value < LEVEL


def only_format(rng: np.random.Generator, n: int) -> bool:
    """One answer in ten comes into the asked format, and is right then; of the others the margin itself is gained."""
    up, down, formatted, _ = rng.multinomial(n, (0.03, 0.01, 0.1, 0.86))
    left, whole = compare_discordant(int(up), int(down), n), compare_discordant(int(up + formatted), int(down), n)
    return whole.p_value < LEVEL and within(left.low, left.high, MARGIN)


VERDICTS: dict[str, Wrong] = {
    "better or worse: equal arms": differs,
    "equivalent: 2 points apart, 2 % of documents change": equals(0.02),
    "equivalent: 2 points apart, 5 % change": equals(0.05),
    "equivalent: 2 points apart, 20 % change": equals(0.2),
    "cannot be seen: room for 12 documents": hides,
    "the best α confirmed: 17 equal arms": confirms,
    "only format: the margin is gained besides": only_format,
}


def verdict_errors(rounds: int) -> Iterator[list[str]]:
    """A row for each verdict: how often it is said where it is wrong, by the number of documents."""
    for i, (name, wrong) in enumerate(VERDICTS.items()):
        row = [name]
        for n in SIZES:
            rng = np.random.default_rng([n, i])
            row.append(f"{100 * sum(wrong(rng, n) for _ in range(rounds)) / rounds:.1f}%")
        yield row


def winners(rounds: int) -> Iterator[list[str]]:
    """What the best of 17 equal arms is said to gain where it was chosen and where it was not, and how often the
    intervals hold the truth, which is nothing."""
    told: dict[str, list[str]] = {"chosen there: gain": [], "interval holds": [], "elsewhere: gain": [], "it holds": []}
    for n in SIZES:
        rng = np.random.default_rng([n, 99])
        flattered, honest = [], []
        for _ in range(rounds):
            baseline, ours, line = grid(rng, n)
            flattered.append(compare(max(ours, key=lambda one: one.score), baseline))
            if one := confirm(line, ours, baseline, QUESTION):
                honest.append(one.found)
        for names, found in ((list(told)[:2], flattered), (list(told)[2:], honest)):
            held = sum(holds(one.low, one.high, 0.0) for one in found) / rounds
            told[names[0]].append(f"{100 * float(np.mean([one.delta for one in found])):+.1f}")
            told[names[1]].append(f"{100 * held:.1f}%")
    yield from ([name, *cells] for name, cells in told.items())


# ---------------------------------------------------------------- seconds of a report

OLDER = ["record", "point", "report.statistics", "report.findings", "report.report"]
MODULES = [module.__name__.removeprefix("rvdist.") for module in (record, point, statistics, findings, report)]
REPORT = """
import json, sys, time
from importlib import import_module
from pathlib import Path
sys.path.insert(0, sys.argv[1])
record, point, sums, findings, report = (import_module("rvdist." + name) for name in json.loads(sys.argv[2]))
assert record.__file__.startswith(sys.argv[1]), record.__file__
place = Path(sys.argv[3])
start = time.perf_counter(), time.process_time()
def lap(what):
    global start
    now = time.perf_counter(), time.process_time()
    times[what] = [now[0] - start[0], now[1] - start[1]]
    start = now
times = {}
records = list(record.read_records(place / "records.jsonl"))
lap("read")
said = json.loads((place / "tasks.json").read_text())
tasks = [record.TaskInfo(name, "1", (("score", "none"),), ("score", "none"), {"score": True}) for name in said["tasks"]]
arms = [point.Arm(name, point.WeightPoint(name), "plain", None) for name in said["arms"]]
rows = sums.summarise(arms, records, tasks, arms[0].name)
lap("scores")
out = place / "out"
out.mkdir(exist_ok=True)
making = findings.Making("A report", "command", {arm.name: arm.name for arm in arms})
report.write_report(out, findings.Findings(arms, rows, records, tasks), making)
lap("files")
print(json.dumps(times))
"""


def write_experiment(place: Path, arms: int, documents: int) -> tuple[int, int]:
    """`arms` on three tasks of 0/1 scores, one of fractions, one of lognormal ones: how many records and bytes."""
    rng = np.random.default_rng(0)
    draws = {f"binary {i}": binary(0.6) for i in range(3)} | {"fractions": fractional, "lognormal": skewed}
    names = ["baseline", *(f"arm {i}" for i in range(1, arms))]
    records = []
    for task, draw in draws.items():
        for i, name in enumerate(names):
            scores = draw(rng, documents, 0.1 * (i % 2))[1][:, 0]
            text = "So the answer is 5. " * 15
            records += [made_record(name, task, k, 0, float(score), text) for k, score in enumerate(scores)]
    write_records(place / "records.jsonl", records)
    (place / "tasks.json").write_text(json.dumps({"tasks": list(draws), "arms": names}))
    return len(records), (place / "records.jsonl").stat().st_size


def report_seconds(tree: Path, place: Path) -> dict[str, tuple[float, float]]:
    """What the report of the code in `tree` takes in a process of its own: seconds, and of those of CPU."""
    modules = json.dumps(MODULES if tree == ROOT else OLDER)
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", REPORT, str(tree), modules, str(place)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return {phase: tuple(both) for phase, both in json.loads(done.stdout.splitlines()[-1]).items()}


def time_reports(trees: Sequence[Path], place: Path, arms: int = 20, documents: int = 1000) -> list[str]:
    count, nbytes = write_experiment(place, arms, documents)
    start = time.perf_counter(), time.process_time()
    with (place / "records.jsonl").open("rb") as file:
        for line in file:
            json.loads(line)
    floor = time.perf_counter() - start[0], time.process_time() - start[1]
    rounds = [[report_seconds(tree, place) for tree in trees] for _ in range(2)]
    table = []
    for name, taken in zip(["rvdist", "the bootstrap of 932cee4"], zip(*rounds, strict=True), strict=False):
        best = {phase: min(one[phase] for one in taken) for phase in taken[0]}
        whole = [sum(both[i] for both in best.values()) for i in (0, 1)]
        phases = [f"{wall:.1f} ({cpu:.1f})" for wall, cpu in best.values()]
        table.append([name, f"{whole[0]:.1f} ({whole[1]:.1f})", f"{whole[1] / floor[1]:.1f}", *phases])
    floors = ["reading the JSON", f"{floor[0]:.1f} ({floor[1]:.1f})", "1.0", "", "", ""]
    said = (
        f"{count:,} records ({arms} arms, five tasks of {documents:,} documents, {nbytes / 1e6:.0f} MB), the faster of "
        "two runs in turn, each in a process of its own, without its imports: seconds, and in brackets those of CPU."
    )
    head = ["report", "whole", "× the CPU of reading", "read records", "scores, intervals, tests", "all that is shown"]
    return [said, "", *markdown(head, [floors, *table])]


# ---------------------------------------------------------------- the tables


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000, help="of 0/1 scores asked once; a fifth of it of others")
    parser.add_argument("--older", type=Path, metavar="CHECKOUT", help="of commit 932cee4, whose report is timed, too")
    parser.add_argument("--verdicts", action="store_true", help="how often each verdict is wrong, and nothing else")
    arguments = parser.parse_args()
    if arguments.verdicts:
        head = [f"{n:,} documents" for n in SIZES]
        lines = markdown(["said wrongly", *head], list(verdict_errors(arguments.rounds)))
        lines += ["", *markdown(["the best of 17 equal arms", *head], list(winners(arguments.rounds)))]
        print(*lines, sep="\n")
        write_table("significance.py --verdicts", lines)
        return
    rows, split, total = [], 0, 0
    for i, situation in enumerate(situations()):
        found = tally(situation, arguments.rounds // (1 if situation.exact else 5), i)
        split, total = split + found.split, total + 2 * found.rounds
        rows.append(found.row(situation))
        print(*rows[-1], sep=" | ", flush=True)
    lines = markdown(HEAD, rows)
    lines += ["", f"Interval, p value and verdict disagree in {split:,} of {total:,} comparisons.", ""]
    kinds = (("0/1", 200, binary(0.6), True), ("lognormal", 3, skewed, False), ("lognormal", 9, skewed, False))
    rounds = max(1, arguments.rounds // 10)
    wrong = [
        f"{name} scores of {n:,} documents {100 * equal_reports(n, draw, shares, rounds):.1f}%"
        for name, n, draw, shares in kinds
    ]
    lines += [
        f"Of {rounds:,} reports of {ARMS_OF_A_REPORT} arms equal to their baseline, some arm differs after Holm: "
        f"{', '.join(wrong)}.",
        "",
    ]
    with tempfile.TemporaryDirectory(prefix="rvdist-report-") as place:
        trees = [ROOT, *([arguments.older.resolve()] if arguments.older else [])]
        lines += time_reports(trees, Path(place))
    print(*lines, sep="\n")
    if arguments.older:  # else a row would be lost
        write_table("significance.py", lines)


if __name__ == "__main__":
    main()
