"""The table on the terminal: one line for each primary score of each arm.

Knows rows and rich; computes nothing. Off the terminal the same lines are printed without box or colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rvdist.report.summary import Row
from rvdist.report.wording import Scale, by_task, metric_name, p_text, printable, survives, verdict_text

_STYLES = {"better": "green", "worse": "red"}

Dissent = Mapping[tuple[str, str], Sequence[Row]]  # by task and arm, scores through other filters


def summary_table(rows: Sequence[Row], dissent: Dissent) -> Table:
    # Text, never str: rich reads markup in str cells, and names may come from anywhere.
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("task / arm", overflow="fold")
    table.add_column("score [95 %]", justify="right", no_wrap=True)
    table.add_column("change [95 %]", justify="right", no_wrap=True)
    table.add_column("p (Holm)", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for task, group in by_task(rows):
        scale = Scale(group)
        table.add_section()
        table.add_row(Text(printable(task), style="bold"), Text(_metric(group[0], scale)))
        for row in _with(dissent, group):
            style = _STYLES.get(row.verdict or "", "dim") + (" bold" if survives(row) else "")
            table.add_row(
                Text("  " + _arm(row)),
                Text(scale.score(row)),
                Text(scale.delta(row)),
                Text(p_text(row.p_adjusted)),
                Text(verdict_text(row), style=style),
            )
    return table


def _with(dissent: Dissent, rows: Sequence[Row]) -> list[Row]:
    """Each row, and after it those that disagree."""
    return [one for row in rows for one in (row, *dissent.get((row.task, row.arm), ()))]


def _arm(row: Row) -> str:
    return printable(row.arm if row.primary else f"{row.arm}, by {row.filter}")


def _metric(row: Row, scale: Scale) -> str:
    return f"{printable(metric_name(row.metric, row.filter))} {scale.unit}".strip()


def plain_lines(rows: Sequence[Row], dissent: Dissent) -> list[str]:
    cells = [("task", "arm", "metric", "score [95 %]", "change [95 %]", "p (Holm)", "verdict")]
    for task, group in by_task(rows):
        scale = Scale(group)
        for row in _with(dissent, group):
            names = printable(task), _arm(row), _metric(row, scale)
            cells.append((*names, scale.score(row), scale.delta(row), p_text(row.p_adjusted), verdict_text(row)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def print_scores(
    said: Sequence[str], rows: Sequence[Row], notes: Sequence[str], console: Console, dissent: Dissent | None = None
) -> None:
    """Claims, table, footnotes. Below each row stand those of other filters that `dissent`."""
    for sentence in said:
        console.print(Text(printable(sentence)), soft_wrap=not console.is_terminal)
    console.print()
    if console.is_terminal:
        console.print(summary_table(rows, dissent or {}))
    else:
        for line in plain_lines(rows, dissent or {}):
            console.print(Text(line), soft_wrap=True)
    console.print()
    for note in notes:
        console.print(Text(printable(note), style="dim"), soft_wrap=not console.is_terminal)
