"""What a report says on the terminal: every primary score, edited questions, and the paper's layout.

Knows lines and rows; computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from rvdist.core.table import Cells, print_table
from rvdist.report.paper import INSIDE_NOTE, Line, paper_arms
from rvdist.report.statistics.robustness import Change, Edited
from rvdist.report.summary import Row
from rvdist.report.wording import (
    MARK,
    MARK_NOTE,
    Scale,
    by_task,
    mark,
    metric_name,
    p_text,
    printable,
    survives,
    verdict_text,
)

_STYLES = {"better": "green", "worse": "red"}
_HEAD = ("score [95 %]", "change [95 %]", "p (Holm)", "verdict")

Dissent = Mapping[tuple[str, str], Sequence[Row]]  # by task and arm, scores through other filters


def _grouped_rows(rows: Sequence[Row], dissent: Dissent) -> tuple[Cells, list[Cells]]:
    """Head and rows for a terminal: the arms of a task below its name."""
    table: list[Cells] = []
    for task, group in by_task(rows):
        scale = Scale(group)
        table.append([Text(printable(task), style="bold"), _metric(group[0], scale)])
        for row in _with(dissent, group):
            table.append([f"  {_arm(row)}", *_numbers(row, scale), _verdict(row, verdict_text(row))])
    return ("task / arm", *_HEAD), table


def _flat_rows(rows: Sequence[Row], dissent: Dissent) -> tuple[Cells, list[Cells]]:
    """Head and rows elsewhere: each row by itself."""
    table: list[Cells] = []
    for task, group in by_task(rows):
        scale = Scale(group)
        for row in _with(dissent, group):
            table.append([task, _arm(row), _metric(row, scale), *_numbers(row, scale), verdict_text(row)])
    return ("task", "arm", "metric", *_HEAD), table


def _numbers(row: Row, scale: Scale) -> list[str]:
    return [scale.score(row), scale.delta(row), p_text(row.p_adjusted)]


def _verdict(judged: Row | Change, text: str) -> Text:
    return Text(text, style=_STYLES.get(judged.verdict or "", "dim") + (" bold" if survives(judged) else ""))


def _with(dissent: Dissent, rows: Sequence[Row]) -> list[Row]:
    """Each row, and after it those that disagree."""
    return [one for row in rows for one in (row, *dissent.get((row.task, row.arm), ()))]


def _arm(row: Row) -> str:
    return row.arm if row.primary else f"{row.arm}, by {row.filter}"


def _metric(row: Row, scale: Scale) -> str:
    return f"{metric_name(row.metric, row.filter)} {scale.unit}".strip()


def say(sentence: str, console: Console, style: str = "dim") -> None:
    """A line, which is not broken off a terminal."""
    console.print(Text(printable(sentence), style=style), soft_wrap=not console.is_terminal)


def print_scores(
    said: Sequence[str], rows: Sequence[Row], notes: Sequence[str], console: Console, dissent: Dissent | None = None
) -> None:
    """Claims, table, footnotes. Below each row stand those of other filters that `dissent`."""
    for sentence in said:
        say(sentence, console, "")
    console.print()
    if console.is_terminal:
        print_table(*_grouped_rows(rows, dissent or {}), console, right=(1, 2, 3))
    else:
        print_table(*_flat_rows(rows, dissent or {}), console)
    console.print()
    for note in notes:
        say(note, console)


def print_paper_table(lines: Sequence[Line], console: Console) -> None:
    """A row for each benchmark, a column for each arm; what is wider than the terminal goes on beneath."""
    asked = [line for line in lines if line.cells]
    arms, table = paper_arms(asked), list[Cells]()
    for line in asked:
        cells = [line.cells[arm] for arm in arms]
        table.append([Text(printable(line.task), style="bold"), *(cell.scale.score(cell.row) for cell in cells)])
        table.append([f"{line.metric} {line.unit}".strip(), *(cell.scale.delta(cell.row) for cell in cells)])
        verdicts = (_verdict(cell.row, "" if cell.row.delta is None else verdict_text(cell.row)) for cell in cells)
        table.append([Text(f"{line.n} documents", style="dim"), *verdicts])
        table.append(["", *(cell.comparison for cell in cells)])
        table.append([])
    print_table(["benchmark", *arms], table, console)
    for line in lines:
        if not line.cells:
            say(f"{line.task}: not asked: {line.lacking}", console)
    notes = [MARK_NOTE] if any(mark(cell.row) for line in asked for cell in line.cells.values()) else []
    if any(cell.inside is not None for line in asked for cell in line.cells.values()):
        notes.append(INSIDE_NOTE)
    for note in notes:
        say(note, console)


def print_robustness(
    rows: Sequence[Edited], scales: Mapping[str, Scale], baseline: str | None, console: Console
) -> None:
    """For each task and edit a line for each arm. `scales` are the tasks'."""
    for task, group in groupby(rows, lambda row: row.task):
        edited, scale = list(group), scales[task]
        head = [f"{task}, edited", f"score {scale.unit}".strip(), "edited − as asked [95 %]"]
        if any(row.gain for row in edited):
            head += [f"against {baseline or ''}", "the difference"]
        table: list[Cells] = []
        for edit, of_edit in groupby(edited, lambda row: row.edit):
            table.append([f" {edit}"])
            for row in of_edit:
                cells: list[str | Text] = [f"  {row.arm}", scale.number(row.value), _change(row.change, scale, True)]
                if row.gain:
                    style = "dim" if row.persistence_p is None else ""
                    p = f", p {p_text(row.persistence_p)}" if row.persistence_p is not None else ""
                    cells += [_change(row.gain, scale, False), Text(row.persistence or "", style=style).append(p)]
                table.append(cells)
        print_table(head, table, console)
    note = "Where no word follows a difference, none was detected. What is said of it holds after correction."
    if any(mark(row.change) for row in rows):
        note += f" {MARK} significant alone, but not after Holm's correction over this table."
    say(note, console)


def _change(change: Change, scale: Scale, with_verdict: bool) -> Text:
    text = Text(scale.change(change.delta, change.ci_low, change.ci_high))
    if with_verdict and change.verdict in _STYLES:
        text.append(" ").append_text(_verdict(change, verdict_text(change)))
    return text
