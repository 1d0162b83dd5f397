"""The row of `summary.json`: the contract between the statistics and everything that shows them.

Knows the fields, how they are written to disk, and which rows belong to each other; tests nothing.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rvdist.core.text import cell

LEVEL = 0.05  # of every test; the intervals are its complement, 95 %
MARGIN = 0.02  # of shares: a change whose whole interval is smaller is none that matters
UNITS = {  # of metrics that are no shares, however small
    "bits_per_byte": "bits per byte",
    "log2_byte_perplexity": "bits per byte",
    "log2_word_perplexity": "bits per word",
    "log2_perplexity": "bits",
}


@dataclass(frozen=True)
class Row:
    """One score of one arm, and its difference to the baseline arm.

    `n` counts documents. `seed` is the arm's sampling seed, None where several seeds are pooled. The
    fields from `delta` to `unseen` are None for the baseline itself and without a baseline; an interval end is
    None where the data say nothing about it (one document of an unbounded metric, say). `verdict` is what holds after
    Holm's correction, as `p_adjusted` does; `verdict_alone` is what the comparison says by itself, as its interval.
    A change is `equivalent` to none where its interval lies within `margin`, None for what is no share. `unseen` is
    "rise" or "fall" where the baseline is so near 1 or 0 that none could be told from chance. `tokens`, the mean of an
    answer, the share `cut` at the limit, the share `in_format` and the score of those alone are None where the records
    do not say.
    """

    arm: str
    point: str
    alpha: float | None
    prompt: str
    task: str
    metric: str
    filter: str
    primary: bool
    higher_is_better: bool
    seed: int | None
    value: float
    stderr: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    delta: float | None = None
    delta_ci_low: float | None = None
    delta_ci_high: float | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    verdict: str | None = None
    verdict_alone: str | None = None
    margin: float | None = None
    unseen: str | None = None
    tokens: float | None = None
    tokens_ci_low: float | None = None
    tokens_ci_high: float | None = None
    cut: float | None = None
    cut_ci_low: float | None = None
    cut_ci_high: float | None = None
    in_format: float | None = None
    in_format_ci_low: float | None = None
    in_format_ci_high: float | None = None
    value_in_format: float | None = None


@dataclass(frozen=True)
class GroupInfo:
    """Tasks with a score together, such as the 27 of BIG-Bench-Hard: the mean over their documents, or, not
    `by_size`, the mean of their means. `metrics` are the (metric, filter) pairs they share, the primary one first;
    those in `otherwise` are put together in the other way."""

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[tuple[str, str], ...]
    by_size: bool = True
    otherwise: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outline:
    """What each task of a run is: a benchmark by itself, a member of a group, or a benchmark's questions edited."""

    names: Collection[str]
    groups: Sequence[GroupInfo] = ()

    def original(self, task: str) -> str | None:
        """The ORIGINAL of the task `ORIGINAL+EDIT`, if it is there too."""
        name, plus, _ = task.partition("+")
        return name if plus and name in self.names else None

    def is_benchmark(self, task: str) -> bool:
        """Whether a task or group stands for itself; a group within a larger one does not."""
        members = {group.name: set(group.tasks) for group in self.groups}
        own = members.get(task)
        within = any(own < others if own else task in others for others in members.values())
        return self.original(task) is None and not within

    def benchmarks(self, rows: Sequence[Row]) -> list[Row]:
        """The primary scores of what stands for itself: the rows of the main table."""
        return [row for row in rows if row.primary and self.is_benchmark(row.task)]


def baseline_of(rows: Sequence[Row]) -> str | None:
    """The arm the others are compared with; None when nothing is compared."""
    if all(row.p_value is None for row in rows):
        return None
    return next(row.arm for row in rows if row.p_value is None)


def dissenting_rows(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """By task and arm, the scores through other filters than the primary one whose verdict, taken alone, is another."""
    primary = {(row.task, row.arm, row.metric): row for row in rows if row.primary}
    dissent: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        counts = primary.get((row.task, row.arm, row.metric))
        if counts and row.filter != counts.filter and row.verdict_alone != counts.verdict_alone:
            dissent.setdefault((row.task, row.arm), []).append(row)
    return dissent


def write_summary(path: Path, rows: Sequence[Row]) -> None:
    """Write `path` as a JSON list and the same rows as CSV beside it."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_csv(path.with_suffix(".csv"), [field.name for field in fields(Row)], map(asdict, rows))


def write_csv(path: Path, names: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """A head of `names`, then `rows`, in which no spreadsheet finds a formula."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
