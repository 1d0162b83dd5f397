"""The wide tables on the terminal: the paper's layout, and edited questions.

Knows lines, rows and rich's text; computes nothing. A table is printed line by line, the same on a terminal and off it,
where no line is broken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from rvdist.report.paper import INSIDE_NOTE, Line, paper_arms
from rvdist.report.statistics.robustness import Change, Edited
from rvdist.report.wording import MARK, MARK_NOTE, Scale, mark, p_text, printable, survives, verdict_text

_STYLES = {"better": "green", "worse": "red"}
_GAP = "  "


def print_paper_table(lines: Sequence[Line], console: Console) -> None:
    """A row for each benchmark, a column for each arm; what is wider than the terminal goes on beneath."""
    asked = [line for line in lines if line.cells]
    first = [Text("benchmark", style="bold")]
    for line in asked:
        about = f"{printable(line.metric)} {line.unit}".strip()
        first += [Text(printable(line.task), style="bold"), Text(about), Text(f"{line.n} documents", style="dim")]
        first += [Text("")] * 2
    columns = [_column(arm, asked) for arm in paper_arms(asked)]
    for block in _blocks(first, columns, console.width if console.is_terminal else None):
        _print(block, console)
    for line in lines:
        if not line.cells:
            _say(f"{line.task}: not asked: {line.lacking}", console)
    notes = [MARK_NOTE] if any(MARK in cell.verdict for line in asked for cell in line.cells.values()) else []
    if any(cell.inside is not None for line in asked for cell in line.cells.values()):
        notes.append(INSIDE_NOTE)
    for note in notes:
        _say(note, console)


def print_robustness(
    rows: Sequence[Edited], scales: Mapping[str, Scale], baseline: str | None, console: Console
) -> None:
    """For each task and edit a line for each arm. `scales` are the tasks'."""
    for task, group in groupby(rows, lambda row: row.task):
        edited, scale = list(group), scales[task]
        head = [f"{printable(task)}, edited", f"score {scale.unit}".strip(), "edited − as asked [95 %]"]
        if any(row.gain for row in edited):
            head += [f"against {printable(baseline or '')}", "the difference"]
        table = [[Text(cell, style="bold") for cell in head]]
        for edit, of_edit in groupby(edited, lambda row: row.edit):
            table.append([Text(f" {printable(edit)}"), *[Text("")] * (len(head) - 1)])
            for row in of_edit:
                cells = [
                    Text(f"  {printable(row.arm)}"),
                    Text(scale.number(row.value)),
                    _change(row.change, scale, True),
                ]
                if row.gain:
                    style = "dim" if row.persistence_p is None else ""
                    p = f", p {p_text(row.persistence_p)}" if row.persistence_p is not None else ""
                    cells += [_change(row.gain, scale, False), Text(row.persistence or "", style=style).append(p)]
                table.append(cells + [Text("")] * (len(head) - len(cells)))
        _print([list(column) for column in zip(*table, strict=True)], console)
    note = "Where no word follows a difference, none was detected. What is said of it holds after correction."
    if any(mark(row.change) for row in rows):
        note += f" {MARK} significant alone, but not after Holm's correction over this table."
    _say(note, console)


def _say(sentence: str, console: Console) -> None:
    console.print(Text(printable(sentence), style="dim"), soft_wrap=not console.is_terminal)


def _column(arm: str, lines: Sequence[Line]) -> list[Text]:
    """An arm's name, and of each benchmark the score, the change, the verdict, what was reported, and a gap."""
    column = [Text(printable(arm), style="bold")]
    for line in lines:
        cell = line.cells[arm]
        style = _STYLES.get(cell.row.verdict or "", "dim") + (" bold" if survives(cell.row) else "")
        verdict = "" if cell.row.delta is None else cell.verdict
        column += [Text(cell.score), Text(cell.change), Text(verdict, style=style), Text(cell.comparison), Text("")]
    return column


def _change(change: Change, scale: Scale, with_verdict: bool) -> Text:
    text = Text(scale.change(change.delta, change.ci_low, change.ci_high))
    if with_verdict and change.verdict in _STYLES:
        style = _STYLES[change.verdict] + (" bold" if survives(change) else "")
        text.append(f" {verdict_text(change)}", style=style)
    return text


def _blocks(first: list[Text], columns: Sequence[list[Text]], width: int | None) -> list[list[list[Text]]]:
    """The columns, as many at a time as fit beside the first, which is repeated."""
    blocks = [[first]]
    used = start = _width(first)
    for column in columns:
        needed = len(_GAP) + _width(column)
        if width is not None and used + needed > width and len(blocks[-1]) > 1:
            blocks.append([first])
            used = start
        blocks[-1].append(column)
        used += needed
    return blocks


def _print(columns: Sequence[list[Text]], console: Console) -> None:
    widths = [_width(column) for column in columns]
    for cells in zip(*columns, strict=True):
        line = Text()
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            if i:
                line.append(_GAP)
            line.append_text(cell)
            line.append(" " * (width - cell_len(cell.plain)))
        line.rstrip()
        console.print(line, soft_wrap=True)


def _width(column: Sequence[Text]) -> int:
    return max(cell_len(cell.plain) for cell in column)
