"""The table on the terminal: one line for each primary score of each arm.

Knows rows and rich; computes nothing. Off the terminal the same lines are printed without box or colour.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rvdist.report.summary import Row
from rvdist.report.wording import Scale, by_task, p_text, printable, survives, verdict_text

_STYLES = {"better": "green", "worse": "red"}


def summary_table(rows: Sequence[Row]) -> Table:
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
        table.add_row(Text(printable(task), style="bold"), Text(f"{printable(group[0].metric)} {scale.unit}".strip()))
        for row in group:
            style = _STYLES.get(row.verdict or "", "dim") + (" bold" if survives(row) else "")
            table.add_row(
                Text("  " + printable(row.arm)),
                Text(scale.score(row)),
                Text(scale.delta(row)),
                Text(p_text(row.p_adjusted)),
                Text(verdict_text(row), style=style),
            )
    return table


def plain_lines(rows: Sequence[Row]) -> list[str]:
    cells = [("task", "arm", "metric", "score [95 %]", "change [95 %]", "p (Holm)", "verdict")]
    for task, group in by_task(rows):
        scale = Scale(group)
        for row in group:
            names = printable(task), printable(row.arm), f"{printable(row.metric)} {scale.unit}".strip()
            cells.append((*names, scale.score(row), scale.delta(row), p_text(row.p_adjusted), verdict_text(row)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def print_scores(said: Sequence[str], rows: Sequence[Row], notes: Sequence[str], console: Console) -> None:
    """Claims, table, footnotes."""
    for sentence in said:
        console.print(Text(printable(sentence)), soft_wrap=not console.is_terminal)
    console.print()
    if console.is_terminal:
        console.print(summary_table(rows))
    else:
        for line in plain_lines(rows):
            console.print(Text(line), soft_wrap=True)
    console.print()
    for note in notes:
        console.print(Text(printable(note), style="dim"), soft_wrap=not console.is_terminal)
