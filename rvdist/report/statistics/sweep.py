"""A sweep along α: which point scores best, and whether it is better than its neighbours; what no sweep could show.

The best is chosen on the documents that it is compared on. Its test against a neighbour is honest all the same: every
pair of neighbours is tested and corrected for, whichever turns out to be the best. Its number is not: the best of many
is partly the luckiest. So one half of the documents chooses too, and the other half says what its choice is worth.
Knows samples and records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rvdist.core.point import Arm
from rvdist.core.record import Record, TaskInfo
from rvdist.report.statistics.compare import SEEN, Comparison, compare, holm, rooms
from rvdist.report.statistics.sample import Answers, Sample, Score, benchmark_scores, sample, sort_records
from rvdist.report.summary import GroupInfo

FEWEST = 3  # α's of one prompt style: fewer are no sweep
HALF = 2 * SEEN  # documents of which half can choose and half confirm


@dataclass(frozen=True)
class Neighbour:
    """The α next to the best, by how much the best is better, and the p value of that, corrected for all pairs of
    neighbours of all sweeps of a report."""

    alpha: float
    gain: float
    p_adjusted: float


@dataclass(frozen=True)
class Confirmation:
    """The best α by half of the documents (`chosen`, its α), and how it differs from the baseline on the `n` others,
    which did not choose it; `p_adjusted` over the confirmations of a report."""

    chosen: str
    alpha: float
    n: int
    found: Comparison
    higher_is_better: bool
    p_adjusted: float = 1.0

    @property
    def verdict(self) -> str:
        """After correction."""
        return replace(self.found, p_value=self.p_adjusted).verdict(self.higher_is_better)


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
    confirmation: Confirmation | None = None


@dataclass(frozen=True)
class Limit:
    """A baseline from which no `fall` (or no rise) could be told from chance: `room` of `n` documents could show it."""

    task: str
    fall: bool
    room: int
    n: int


def sweeps(
    arms: Sequence[Arm],
    records: Iterable[Record],
    tasks: Sequence[TaskInfo],
    groups: Sequence[GroupInfo] = (),
    baseline: str | None = None,
) -> list[Sweep]:
    """Of each benchmark and prompt style with enough α, in that order; those whose arms did not answer the same
    documents are left out. With a baseline, each best α is confirmed on documents that did not choose it."""
    answers = sort_records(records)
    prompts = list(dict.fromkeys(arm.prompt for arm in arms))
    lines = [(prompt, _line(arms, prompt)) for prompt in prompts]
    made: list[Sweep] = []
    tests: list[tuple[int, int, Comparison]] = []  # the sweep, the place of the lower α, what was found
    for score in benchmark_scores(tasks, groups):
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
                own = sample(answers, baseline, score) if baseline is not None else None
                confirmed = confirm(line, drawn, own, score) if own and own.documents == drawn[0].documents else None
                made.append(Sweep(score.task, said, names, names[best], level, names[ranked[-1]], (), confirmed))
    alphas = {arm.name: arm.alpha or 0.0 for arm in arms}
    adjusted = holm([test.p_value for *_, test in tests])
    for (which, place, test), p_value in zip(tests, adjusted, strict=True):
        sweep = made[which]
        lower, upper = sweep.arms[place], sweep.arms[place + 1]
        if sweep.best in (lower, upper):
            neighbour = Neighbour(alphas[lower if sweep.best == upper else upper], abs(test.delta), p_value)
            made[which] = replace(sweep, neighbours=(*sweep.neighbours, neighbour))
    return _corrected(made)


def _corrected(made: Sequence[Sweep]) -> list[Sweep]:
    confirmed = [sweep.confirmation for sweep in made if sweep.confirmation]
    adjusted = iter(holm([one.found.p_value for one in confirmed]))
    return [
        replace(sweep, confirmation=replace(sweep.confirmation, p_adjusted=next(adjusted)))
        if sweep.confirmation
        else sweep
        for sweep in made
    ]


def confirm(line: Sequence[Arm], drawn: Sequence[Sample], baseline: Sample, score: Score) -> Confirmation | None:
    """The best α by one half of the documents against the baseline on the other half."""
    if len(baseline.values) < HALF:
        return None
    choosing = halve(baseline)
    sign = 1 if score.higher_is_better else -1
    scores_ = [-sign * take(one, choosing).score for one in drawn]
    best = min(range(len(drawn)), key=lambda i: (scores_[i], abs(line[i].alpha or 0.0)))
    found = compare(take(drawn[best], ~choosing), take(baseline, ~choosing))
    return Confirmation(line[best].name, line[best].alpha or 0.0, int((~choosing).sum()), found, score.higher_is_better)


def halve(one: Sample) -> NDArray[np.bool_]:
    """Which documents are in the first half: every other one of each stratum, in an order that their names alone
    decide, and that says nothing of what is in them."""
    chosen = np.zeros(len(one.documents), dtype=bool)
    begin = turn = 0
    for size in one.strata:
        places = range(begin, begin + size)
        order = sorted(places, key=lambda place: blake2b(one.documents[place].encode(errors="replace")).digest())
        chosen[order[turn % 2 :: 2]] = True
        begin, turn = begin + size, turn + size
    return chosen


def take(one: Sample, kept: NDArray[np.bool_]) -> Sample:
    """Some of the documents; each stratum counts as much as in the whole."""
    weights, strata = one.weights.copy(), []
    begin = 0
    for size in one.strata:
        own = slice(begin, begin + size)
        if count := int(kept[own].sum()):
            strata.append(count)
            weights[own] *= one.weights[own].sum() / one.weights[own][kept[own]].sum()
        begin += size
    weights = weights[kept] / weights[kept].mean()
    documents = tuple(doc for doc, is_kept in zip(one.documents, kept, strict=True) if is_kept)
    return replace(one, documents=documents, values=one.values[kept], weights=weights, strata=tuple(strata))


def limits(
    records: Iterable[Record], tasks: Sequence[TaskInfo], baseline: str, groups: Sequence[GroupInfo] = ()
) -> list[Limit]:
    """Benchmarks of shares on which the baseline is so near 0 or 1 that a change could not be seen."""
    answers = sort_records(records)
    made = []
    for score in benchmark_scores(tasks, groups):
        own = sample(answers, baseline, score)
        n = len(own.values)
        made += [Limit(score.task, what == "fall", room, n) for what, room in rooms(own).items() if room < SEEN]
    return made


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
