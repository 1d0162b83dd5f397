"""The paper's table: a row for each benchmark, a column for each arm, and beside our changes those that were reported.

Knows rows and what an experiment's configuration says was reported; computes nothing but whether the two agree.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rvdist.core.text import cell
from rvdist.report.summary import Row
from rvdist.report.wording import Scale, by_task, metric_name

Reported = Mapping[str, Mapping[str, float]]  # by benchmark and arm, changes against the baseline in points

INSIDE_NOTE = "inside, outside: whether a reported change lies within the 95 % interval of ours."


@dataclass(frozen=True)
class Cell:
    """One arm on one benchmark. `reported` is in points: hundredths of a score that is a share, else as it is."""

    row: Row
    scale: Scale
    reported: float | None

    @property
    def inside(self) -> bool | None:
        """Whether the reported change lies in our interval; None where there is nothing to compare."""
        low, high = self.row.delta_ci_low, self.row.delta_ci_high
        if self.reported is None or low is None or high is None:
            return None
        return low <= self.reported / self.scale.factor <= high

    @property
    def comparison(self) -> str:
        """What was reported, and whether ours agrees."""
        if self.reported is None:
            return ""
        where = {True: ", inside", False: ", outside", None: ""}[self.inside]
        return f"reported {self.scale.number(self.reported / self.scale.factor, sign=True)}{where}"


@dataclass(frozen=True)
class Line:
    """One benchmark, its cells by arm; of one that could not be asked only the reason, in `lacking`."""

    task: str
    metric: str = ""
    unit: str = ""
    n: int = 0
    filter: str = ""
    cells: Mapping[str, Cell] = field(default_factory=dict)
    lacking: str = ""


def paper_lines(rows: Sequence[Row], reported: Reported, lacking: Mapping[str, str]) -> list[Line]:
    """`rows` are the benchmarks' primary scores; `lacking` says of others why they were not asked."""
    lines = []
    for task, group in by_task(rows):
        scale = Scale(group)
        said = reported.get(task, {})
        cells = {row.arm: Cell(row, scale, said.get(row.arm) if row.delta is not None else None) for row in group}
        first = group[0]
        lines.append(Line(task, metric_name(first.metric, first.filter), scale.unit, first.n, first.filter, cells))
    return lines + [Line(task, lacking=reason) for task, reason in lacking.items()]


def paper_arms(lines: Sequence[Line]) -> list[str]:
    """The columns."""
    return list(dict.fromkeys(arm for line in lines for arm in line.cells))


def write_paper_table(path: Path, lines: Sequence[Line]) -> None:
    """As CSV in the paper's layout, numbers in points: a line for each benchmark, eight columns for each arm. A verdict
    is what holds after correction; the `filter` is the one that read the answers."""
    parts = ("score", "score_low", "score_high", "change", "change_low", "change_high", "verdict", "reported")
    arms = paper_arms(lines)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["benchmark", "metric", "unit", "n", "filter", *(cell(f"{arm} {part}") for arm in arms for part in parts)]
        )
        for line in lines:
            if not line.cells:
                writer.writerow([cell(line.task), cell(f"not asked: {line.lacking}")])
                continue
            numbers: list[object] = []
            for arm in arms:
                shown = line.cells[arm]
                row, factor = shown.row, shown.scale.factor
                found = (row.value, row.ci_low, row.ci_high, row.delta, row.delta_ci_low, row.delta_ci_high)
                numbers += [None if x is None else round(factor * x, 6) for x in found] + [row.verdict, shown.reported]
            writer.writerow([*map(cell, (line.task, line.metric, line.unit, line.n, line.filter)), *numbers])
