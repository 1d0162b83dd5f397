"""What the fleet shows: a table on a terminal, plain lines elsewhere."""

import io
import json

import pytest
from rich.console import Console

from rvdist.core.log import Log
from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet import view
from rvdist.evaluate.fleet.status import EngineStatus, Status
from rvdist.evaluate.fleet.view import FleetView

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


def test_rates_are_of_the_last_seconds_and_at_the_end_of_all(monkeypatch):
    now, drawn = [100.0], io.StringIO()
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])
    log = Log(console=Console(file=drawn, width=200))
    with FleetView(100, 0, {}, log) as shown:
        for second, tokens in enumerate([0, *range(0, 4000, 100)]):  # the engine starts for a while
            now[0] = 100.0 + second
            shown.show(Status((), second, tokens, 9.0, prompt_tokens=2 * tokens, in_flight=50))
    *lines, last = drawn.getvalue().splitlines()
    assert len(lines) == 3 and all("100 tokens/s (of prompts 200)" in line for line in lines[1:])
    assert "in 40.0 s, 98 tokens/s (of prompts 195)" in last
    told = [json.loads(line) for line in log._lines]
    assert told[-1]["tokens_per_second"] == 97.5 and told[-1]["in_flight"] == 50
    assert told[1]["prompt_tokens"] == 2 * told[1]["tokens"] > 0


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ("/c/samples.sqlite", "60 answered requests are kept in /c/samples.sqlite; 32 requests of unfinished slices, 5 "
         "of them answered already, will be asked again by the same command"),
        (None, "nothing is kept, as cache.samples=false has it; 72 requests will be asked again by the same command"),
    ],
)  # fmt: skip
def test_an_end_before_all_is_answered_says_what_it_costs(kept, said, capsys):
    drawn = io.StringIO()
    log = Log(console=Console(file=drawn, width=300))
    status = Status((), 45, 900, None, in_flight=32, finished=40)
    with pytest.raises(KeyboardInterrupt), FleetView(200, 20, {}, log, kept) as shown:
        shown.show(status)
        raise KeyboardInterrupt
    assert drawn.getvalue().splitlines()[-1] == f"evaluate: {said}"


def test_of_many_engines_the_first_are_shown():
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=120, height=40)
    many = tuple(EngineStatus(number, True, POINT, 1.0, 1) for number in range(64))
    with FleetView(100, 0, {POINT: "one"}, Log(console=console)) as shown:
        shown.show(Status(many, 0, 0, None))
    assert "and 48 more engines" in drawn.getvalue() and "64 of 64 engines up" in drawn.getvalue()
