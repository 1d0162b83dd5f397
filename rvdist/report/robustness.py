"""Edited questions: what each arm loses when a task's questions are perturbed, and whether its gain persists.

A task `ORIGINAL+EDIT` (docs/benchmarks.md) has ORIGINAL's documents, asked in other words: every comparison is paired
by document. Knows samples and records; nothing of tables or plots.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from rvdist.point import Arm
from rvdist.record import Record, TaskInfo
from rvdist.report.sample import Answers, Sample, Score, averaged, common, rounded, sample, scores, sort_records
from rvdist.report.statistics import Comparison, compare, compare_differences, holm, known
from rvdist.report.summary import LEVEL, Outline

Pair = Sequence[Sample]  # of the same documents: as they are, and edited


@dataclass(frozen=True)
class Change:
    """A difference with its 95 % interval, its test and what it means. An end of which nothing is known is None."""

    delta: float
    ci_low: float | None
    ci_high: float | None
    p_value: float
    verdict: str
    p_adjusted: float | None = None


@dataclass(frozen=True)
class Edited:
    """One arm's primary score on a task with its questions edited, over the `n` documents asked both ways.

    `edit` is the perturbation as the task names it, or "all N edits" for the mean of N of them. `change` is edited
    minus original, within the arm. The gain is arm minus baseline: on the original, on the edited questions, and how
    the second differs from the first; None for the baseline and without one. `persistence` says it in words.
    """

    task: str
    edit: str
    arm: str
    metric: str
    filter: str
    higher_is_better: bool
    n: int
    original: float
    value: float
    change: Change
    gain_original: Change | None = None
    gain: Change | None = None
    gain_change: Change | None = None
    persistence: str | None = None


def robustness(
    arms: Sequence[Arm],
    records: Iterable[Record],
    tasks: Sequence[TaskInfo],
    baseline: str | None,
) -> list[Edited]:
    """A row for each (task, edit, arm), in that order, of tasks that were asked both as they are and edited.

    The records are such as `summarise` accepts. `p_adjusted` is Holm's over all changes and all changes of gains; the
    gains themselves belong to the summary.
    """
    answers = sort_records(records)
    primary = {score.task: score for score in scores(tasks) if score.primary}
    outline = Outline(list(primary))
    rows = []
    for task, score in primary.items():
        edits = {
            name.partition("+")[2]: edited
            for name, edited in primary.items()
            if outline.original(name) == task and (edited.metric, edited.filter) == (score.metric, score.filter)
        }
        for edit, pairs in _pairs(answers, [arm.name for arm in arms], score, edits).items():
            reference = pairs.get(baseline or "")
            for arm, pair in pairs.items():
                rows.append(_row(score, edit, arm, pair, reference if arm != baseline else None))
    return _adjusted(rows)


def write_robustness(path: Path, rows: Sequence[Edited]) -> None:
    """As CSV, a line for each row; a change is six columns that begin with its name."""
    changes = [field.name for field in fields(Edited) if "change" in field.name or "gain" in field.name]
    lines = []
    for row in rows:
        line = asdict(row)
        for name in changes:
            change = line.pop(name) or {}
            line |= {f"{name}_{field.name}": change.get(field.name) for field in fields(Change)}
        lines.append(line)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _pairs(
    answers: Answers, arms: Sequence[str], score: Score, edits: Mapping[str, Score]
) -> dict[str, dict[str, Pair]]:
    """By edit and arm, the answers to the same documents as they are and edited."""
    originals = {arm: sample(answers, arm, score) for arm in arms if edits}
    edited = {edit: {arm: sample(answers, arm, other) for arm in arms} for edit, other in edits.items()}
    pairs: dict[str, dict[str, Pair]] = {}
    pairs |= {edit: {arm: common([originals[arm], found[arm]]) for arm in arms} for edit, found in edited.items()}
    if len(edits) > 1:
        every = {arm: common([originals[arm], *(found[arm] for found in edited.values())]) for arm in arms}
        pairs[f"all {len(edits)} edits"] = {arm: [own, averaged(rest)] for arm, (own, *rest) in every.items()}
    return {edit: found for edit, found in pairs.items() if all(len(own.values) for own, _ in found.values())}


def _row(score: Score, edit: str, arm: str, pair: Pair, reference: Pair | None) -> Edited:
    original, edited = pair
    better = score.higher_is_better
    row = Edited(
        task=score.task,
        edit=edit,
        arm=arm,
        metric=score.metric,
        filter=score.filter,
        higher_is_better=better,
        n=len(original.values),
        original=original.score,
        value=edited.score,
        change=_change(compare(edited, original), better),
    )
    if reference is None:
        return row
    before, after = (compare(ours, theirs) for ours, theirs in zip(pair, reference, strict=True))
    four = [one.values for one in (*pair, *reference)]
    differences = rounded((four[1] - four[3]) - (four[0] - four[2]), *four)
    most = 2.0 if all(one.shares for one in (*pair, *reference)) else math.inf
    kept = compare_differences(differences, original.weights, original.strata, most)
    return replace(
        row,
        gain_original=_change(before, better),
        gain=_change(after, better),
        gain_change=_change(kept, better),
        persistence=_persistence(before, after, kept),
    )


def _change(found: Comparison, higher_is_better: bool) -> Change:
    low, high = known(found.low), known(found.high)
    return Change(found.delta, low, high, found.p_value, found.verdict(higher_is_better))


def _persistence(before: Comparison, after: Comparison, kept: Comparison) -> str:
    """What became of a difference to the baseline when the questions were edited; that it appeared, shrank
    or grew is said only where `kept` is significant."""
    if before.p_value >= LEVEL:
        if after.p_value >= LEVEL:
            return "no difference"
        return "only when edited" if kept.p_value < LEVEL else "cannot be told"
    less = (kept.delta > 0) != (before.delta > 0)
    if after.p_value >= LEVEL:
        return "shrinks" if kept.p_value < LEVEL and less else "cannot be told"
    if (after.delta > 0) != (before.delta > 0):
        return "reverses"
    if kept.p_value >= LEVEL:
        return "persists"
    return "persists, but smaller" if less else "persists, and larger"


def _adjusted(rows: Sequence[Edited]) -> list[Edited]:
    changes = [change for row in rows for change in (row.change, row.gain_change) if change]
    adjusted = iter(holm([change.p_value for change in changes]))
    found = []
    for row in rows:
        row = replace(row, change=replace(row.change, p_adjusted=next(adjusted)))
        if row.gain_change:
            row = replace(row, gain_change=replace(row.gain_change, p_adjusted=next(adjusted)))
        found.append(row)
    return found
