"""What the fleet shows: a table on a terminal, plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from rvdist.fleet import view
from rvdist.fleet.scheduler import EngineStatus, Status
from rvdist.fleet.view import FleetView
from rvdist.log import Log
from rvdist.point import WeightPoint

POINT = WeightPoint("base")
STATUS = Status((EngineStatus(0, True, POINT, 12.34, 5), EngineStatus(1, False, None, 0.0, 0)), 40, 900, 7.4)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_on_a_terminal_and_lines_elsewhere(terminal, monkeypatch, capsys):
    monkeypatch.setattr(view, "_LINE_EVERY", 0.0)
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=terminal, width=120, height=40, highlight=False)
    with FleetView(100, 20, {POINT: "alpha=[0.5]"}, Log(console=console)) as shown:
        shown.show(STATUS)
        lines = drawn.getvalue()
    assert "evaluate: 60 of 100 requests (20 from the cache)" in drawn.getvalue().splitlines()[-1]
    if terminal:
        for word in ("alpha=[0.5]", "12.3", "starting", "1 of 2 engines up, 7 s left"):
            assert word in drawn.getvalue()
    else:
        assert "1 of 2 engines up, 7 s left" in lines and "alpha=[0.5]" not in lines
    assert capsys.readouterr().out == ""


def test_of_many_engines_the_first_are_shown():
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=120, height=40)
    many = tuple(EngineStatus(number, True, POINT, 1.0, 1) for number in range(64))
    with FleetView(100, 0, {POINT: "one"}, Log(console=console)) as shown:
        shown.show(Status(many, 0, 0, None))
    assert "and 48 more engines" in drawn.getvalue() and "64 of 64 engines up" in drawn.getvalue()
