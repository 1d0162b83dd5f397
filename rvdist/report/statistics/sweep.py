"""A sweep along α: which point scores best, and whether it is better than its neighbours; what no sweep could show.

The best is chosen on the documents that it is compared on. Its test against a neighbour is honest all the same: every
pair of neighbours is tested and corrected for, whichever turns out to be the best. Knows samples and records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rvdist.core.point import Arm
from rvdist.core.record import Record, TaskInfo
from rvdist.report.statistics.compare import Comparison, compare, holm
from rvdist.report.statistics.sample import Answers, Sample, Score, sample, scores, sort_records
from rvdist.report.summary import GroupInfo, Outline

FEWEST = 3  # α's of one prompt style: fewer are no sweep
SEEN = 6  # documents that must change before any test can see it: flipping five signs alike leaves p = 1/16


@dataclass(frozen=True)
class Neighbour:
    """The α next to the best, by how much the best is better, and the p value of that, corrected for all pairs of
    neighbours of all sweeps of a report."""

    alpha: float
    gain: float
    p_adjusted: float


@dataclass(frozen=True)
class Sweep:
    """One benchmark along the α of one prompt style. `arms` are in the order of α; `prompt` is empty where all arms
    have the same; `level` are other arms that score what the best does, which has the smallest |α| of them."""

    task: str
    prompt: str
    arms: tuple[str, ...]
    best: str
    level: tuple[str, ...]
    worst: str
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Limit:
    """A baseline from which no `fall` (or no rise) could be told from chance: `room` of `n` documents could show it."""

    task: str
    fall: bool
    room: int
    n: int


def sweeps(
    arms: Sequence[Arm], records: Iterable[Record], tasks: Sequence[TaskInfo], groups: Sequence[GroupInfo] = ()
) -> list[Sweep]:
    """Of each benchmark and prompt style with enough α, in that order; those whose arms did not answer the same
    documents are left out."""
    answers = sort_records(records)
    prompts = list(dict.fromkeys(arm.prompt for arm in arms))
    lines = [(prompt, _line(arms, prompt)) for prompt in prompts]
    made: list[Sweep] = []
    tests: list[tuple[int, int, Comparison]] = []  # the sweep, the place of the lower α, what was found
    for score in _benchmarks(tasks, groups):
        for prompt, line in lines:
            drawn = _samples(answers, line, score)
            if len(drawn) >= FEWEST:
                sign = 1 if score.higher_is_better else -1
                ranked = sorted(range(len(drawn)), key=lambda i: (-sign * drawn[i].score, abs(line[i].alpha or 0.0)))
                tests += [(len(made), i, compare(upper, lower)) for i, (lower, upper) in enumerate(pairwise(drawn))]
                best = ranked[0]
                level = tuple(
                    line[i].name for i in sorted(ranked[1:]) if math.isclose(drawn[i].score, drawn[best].score)
                )
                names = tuple(arm.name for arm in line)
                said = prompt if len(prompts) > 1 else ""
                made.append(Sweep(score.task, said, names, names[best], level, names[ranked[-1]], ()))
    alphas = {arm.name: arm.alpha or 0.0 for arm in arms}
    adjusted = holm([test.p_value for *_, test in tests])
    for (which, place, test), p_value in zip(tests, adjusted, strict=True):
        sweep = made[which]
        lower, upper = sweep.arms[place], sweep.arms[place + 1]
        if sweep.best in (lower, upper):
            neighbour = Neighbour(alphas[lower if sweep.best == upper else upper], abs(test.delta), p_value)
            made[which] = replace(sweep, neighbours=(*sweep.neighbours, neighbour))
    return made


def limits(
    records: Iterable[Record], tasks: Sequence[TaskInfo], baseline: str, groups: Sequence[GroupInfo] = ()
) -> list[Limit]:
    """Benchmarks of shares on which the baseline is so near 0 or 1 that a change could not be seen."""
    answers = sort_records(records)
    made = []
    for score in _benchmarks(tasks, groups):
        own = sample(answers, baseline, score)
        if own.shares:
            rooms = {True: int((own.values > 0).sum()), False: int((own.values < 1).sum())}
            n = len(own.values)
            made += [Limit(score.task, fall, room, n) for fall, room in rooms.items() if room < SEEN]
    return made


def _benchmarks(tasks: Sequence[TaskInfo], groups: Sequence[GroupInfo]) -> list[Score]:
    outline = Outline([task.name for task in tasks], groups)
    return [score for score in scores(tasks, groups) if score.primary and outline.is_benchmark(score.task)]


def _line(arms: Sequence[Arm], prompt: str) -> list[Arm]:
    """The arms of a prompt style on the line target + α · v, one for each α."""
    by_alpha = {arm.alpha: arm for arm in reversed(arms) if arm.alpha is not None and arm.prompt == prompt}
    return [by_alpha[alpha] for alpha in sorted(by_alpha)]


def _samples(answers: Answers, line: Sequence[Arm], score: Score) -> list[Sample]:
    """Of every arm of a line, none where their documents differ or some were not asked."""
    asked = score.members or (score.task,)
    if not all((arm.name, task, score.filter) in answers for arm in line for task in asked):
        return []
    drawn = [sample(answers, arm.name, score) for arm in line]
    return drawn if all(one.documents == drawn[0].documents for one in drawn) else []
