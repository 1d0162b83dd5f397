"""Tables on the terminal: a head and rows of cells, a line each, the same on a terminal and off it.

A text is shown as it is, never as markup, and does nothing to a terminal.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from rvdist.core.text import printable

Cells = Sequence[str | Text]
_GAP = "  "
_LONGEST = 300  # characters of a cell, which make its column as wide


def print_table(head: Cells, rows: Sequence[Cells], console: Console, right: Collection[int] = ()) -> None:
    """The head is bold, columns in `right` are flush right, and a row may lack its last cells. Columns for which a
    terminal is too narrow go on beneath, beside the first; elsewhere no line is broken."""
    for line in table_lines(head, rows, console.width if console.is_terminal else None, right):
        console.print(line, soft_wrap=True)


def table_lines(
    head: Cells, rows: Sequence[Cells], width: int | None = None, right: Collection[int] = ()
) -> list[Text]:
    """The same as lines of at most `width` cells, where every column fits beside the first."""
    columns = [[_as_text(cell, "bold")] for cell in head]
    for row in rows:
        for number, column in enumerate(columns):
            column.append(_as_text(row[number] if number < len(row) else ""))
    for number, column in enumerate(columns):
        widest = max(cell_len(cell.plain) for cell in column)
        for cell in column:
            missing = widest - cell_len(cell.plain)
            cell.pad_left(missing) if number in right else cell.pad_right(missing)
    return [_line(cells) for block in _blocks(columns, width) for cells in zip(*block, strict=True)]


def _as_text(cell: str | Text, style: str = "") -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(printable(cell, _LONGEST), style=style)


def _blocks(columns: Sequence[list[Text]], width: int | None) -> list[list[list[Text]]]:
    """The columns, as many at a time as fit beside the first, which is repeated."""
    first, *others = columns
    blocks, used = [[first]], cell_len(first[0].plain)
    for column in others:
        needed = len(_GAP) + cell_len(column[0].plain)
        if width is not None and used + needed > width and len(blocks[-1]) > 1:
            blocks.append([first])
            used = cell_len(first[0].plain)
        blocks[-1].append(column)
        used += needed
    return blocks


def _line(cells: Sequence[Text]) -> Text:
    line = Text(_GAP).join(cells)
    line.rstrip()
    return line
