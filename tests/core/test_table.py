"""Tables on the terminal."""

import io

from rich.console import Console
from rich.text import Text

from rvdist.core.table import print_table

HEAD = ("name", "first", "second")
ROWS = [("é語", "1", "long enough"), ("b", "22")]


def shown(terminal: bool, width: int, head=HEAD, rows=ROWS, right=()) -> list[str]:
    out = io.StringIO()
    print_table(head, rows, Console(file=out, force_terminal=terminal, width=width, color_system=None), right)
    return out.getvalue().splitlines()


def test_columns_are_as_wide_as_what_is_seen():
    whole = ["name  first  second", "é語   1      long enough", "b     22"]
    assert shown(True, 80) == shown(False, 10) == whole, "off a terminal no line is broken"
    assert shown(False, 80, right=(1,))[1:] == ["é語       1  long enough", "b        22"]


def test_what_a_terminal_is_too_narrow_for_goes_on_beneath():
    beneath = ["name  first", "é語   1", "b     22", "name  second", "é語   long enough", "b"]
    assert shown(True, 20) == beneath
    assert shown(True, 3) == beneath, "a column is never cut"


def test_a_cell_is_no_markup_and_does_nothing_to_a_terminal():
    (line,) = shown(True, 80, ("[bold]a[/bold]",), [])
    assert line == "[bold]a[/bold]"
    assert shown(True, 80, ("a", "b"), [("\x1b[31mred", Text("[c]", style="dim"))])[1] == "�[31mred  [c]"
