"""Edited questions: what each arm loses when a task's questions are perturbed, and whether its gain persists.

A task `ORIGINAL+EDIT` (docs/benchmarks.md) has ORIGINAL's documents, asked in other words: every comparison is paired
by document. Knows samples and records; nothing of tables or plots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rvdist.core.point import Arm
from rvdist.core.record import Record, TaskInfo
from rvdist.report.statistics.compare import UNDETECTED, Comparison, compare, compare_differences, holm
from rvdist.report.statistics.intervals import known
from rvdist.report.statistics.sample import (
    Answers,
    Sample,
    Score,
    average,
    common,
    round_off,
    sample,
    scores,
    sort_records,
)
from rvdist.report.summary import LEVEL, Outline, Row, write_csv
from rvdist.report.wording import survives

Pair = Sequence[Sample]  # of the same documents: as they are, and edited


@dataclass(frozen=True)
class Change:
    """A difference with its 95 % interval, its test and what it means, after correction. An unknown end is None."""

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
    the second differs from the first; None for the baseline and without one. `persistence` says it in words, and
    `persistence_p` is the adjusted p value of what the words claim, None where they claim nothing.
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
    persistence_p: float | None = None


def robustness(
    arms: Sequence[Arm],
    records: Iterable[Record],
    tasks: Sequence[TaskInfo],
    baseline: str | None,
    summary: Sequence[Row],
) -> list[Edited]:
    """A row for each (task, edit, arm), in that order, of tasks that were asked both as they are and edited.

    `summary` is what `summarise` makes of the same. Of the gain on the original `p_adjusted` is the summary's, so that
    nothing persists that does not survive there; all other tests of the table are one family for Holm.
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
    surviving = {(row.task, row.metric, row.filter, row.arm): row.p_adjusted for row in summary}
    return [_said(row) for row in _adjust(rows, surviving)]


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
    write_csv(path, list(lines[0]), lines)


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
        pairs[f"all {len(edits)} edits"] = {arm: [own, average(rest)] for arm, (own, *rest) in every.items()}
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
    differences = round_off((four[1] - four[3]) - (four[0] - four[2]), *four)
    most = 2.0 if all(one.shares for one in (*pair, *reference)) else math.inf
    kept = compare_differences(differences, original.weights, original.strata, most)
    return replace(
        row,
        gain_original=_change(before, better),
        gain=_change(after, better),
        gain_change=_change(kept, better),
    )


def _change(comparison: Comparison, higher_is_better: bool) -> Change:
    low, high = known(comparison.low), known(comparison.high)
    return Change(comparison.delta, low, high, comparison.p_value, comparison.verdict(higher_is_better))


def _said(row: Edited) -> Edited:
    """What became of a difference to the baseline when the questions were edited: a claim needs every difference that
    it rests on to survive the correction, so its p value is the largest of theirs."""
    before, after, kept = row.gain_original, row.gain, row.gain_change
    if before is None or after is None or kept is None:
        return row
    was, is_, changed = (survives(change) for change in (before, after, kept))
    less = (kept.delta > 0) != (before.delta > 0)
    words, rests = "cannot be told", []
    if was and is_:
        rests = [before, after]
        if (after.delta > 0) != (before.delta > 0):
            words = "reverses"
        elif changed:
            words, rests = "persists, but smaller" if less else "persists, and larger", [before, after, kept]
        else:
            words = "persists"
    elif was and changed and less:
        words, rests = "shrinks", [before, kept]
    elif is_ and changed and before.p_value >= LEVEL:
        words, rests = "only when edited", [after, kept]
    elif before.p_value >= LEVEL and after.p_value >= LEVEL:
        words = UNDETECTED
    p_value = max((change.p_adjusted or 0.0 for change in rests), default=None)
    return replace(row, persistence=words, persistence_p=p_value)


def _corrected(change: Change, p_adjusted: float) -> Change:
    return replace(change, p_adjusted=p_adjusted, verdict=change.verdict if p_adjusted < LEVEL else UNDETECTED)


def _adjust(rows: Sequence[Edited], surviving: Mapping[tuple[str, str, str, str], float | None]) -> list[Edited]:
    names = ("change", "gain", "gain_change")
    tests = [(i, name) for i, row in enumerate(rows) for name in names if getattr(row, name)]
    adjusted = holm([getattr(rows[i], name).p_value for i, name in tests])
    found = list(rows)
    for (i, name), p_value in zip(tests, adjusted, strict=True):
        corrected: dict[str, Any] = {name: _corrected(getattr(rows[i], name), p_value)}
        found[i] = replace(found[i], **corrected)
    for i, row in enumerate(found):
        if row.gain_original:
            # Over the documents that were asked both ways, which may be fewer than the summary's.
            p_value = surviving[row.task, row.metric, row.filter, row.arm] or 0.0
            original = _corrected(row.gain_original, max(p_value, row.gain_original.p_value))
            found[i] = replace(row, gain_original=original)
    return found
