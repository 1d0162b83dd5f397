"""The file system fails at every operation, one after the other: the run ends with our sentence, or does without; then
the same command ends as if nothing had been."""

from __future__ import annotations

import errno
import itertools
import re
from pathlib import Path

import pytest
from serving import Run
from shim import CHANGES, Fault
from test_kills import COMMANDS, MIDDLES, SMALL_RUNS, afresh, middles, outcome, require_clean

pytestmark = pytest.mark.heavy

EVERY = (*CHANGES, "open", "read", "close")
SOME = ("sync", "rename", "remove", "size")  # where little time is
SENTENCE = re.compile(r"rvdist: (?!failed: )[^\n]*\n")
OURS = re.compile(r"(?s).*\nrvdist\.core\.errors\.(Failed|BadInput): [^\n]*\n?")  # the end of a traceback


def enumerate_errors(
    run: Run,
    place: Path,
    start: Path,
    arguments: tuple[str, ...],
    fault: Fault,
    sentence: re.Pattern[str],
    only: tuple[str, ...] = (),
) -> int:
    """Fails each operation of the run in turn, each time from what is in `start`, or the middle one of each kind named;
    returns how many there were."""
    work = place / "work"
    afresh(start, work)
    status, errors = run(work, fault.at(-1), *arguments)
    assert status == 0, errors
    right, failed, first = outcome(work), 0, fault.told
    wrong = []
    for number in middles(first, only) if only else itertools.count():
        afresh(start, work)
        status, errors = run(work, fault.at(number), *arguments)
        if not fault.happened:
            break
        at, failed = fault.told[number], failed + 1
        if status and not sentence.fullmatch(errors):
            wrong.append((at, errors[-300:]))
        status, errors = run(work, fault.at(-1), *arguments)
        if status or outcome(work) != right:
            wrong.append((at, "again", errors[-300:]))
        require_clean(work)
    assert not wrong, "\n".join(map(str, wrong))
    return failed


AT_ONCE = [("output", None, "EIO")]


@pytest.mark.parametrize(
    ("what", "before", "error"),
    AT_ONCE
    + [
        pytest.param(*run, error, marks=pytest.mark.slow)
        for run in SMALL_RUNS
        for error in ("EIO", "ENOSPC", "short", "EDQUOT")
        if (*run, error) not in AT_ONCE
    ],
)
def test_an_error_of_every_operation(small, base, tmp_path, what, before, error):
    if before:
        before(base)
    action = error if error == "short" else str(getattr(errno, error))
    operations = ("read", "write") if error == "short" else SOME if (what, before, error) in AT_ONCE else EVERY
    fault = Fault(tmp_path, tmp_path / "work", operations, action)
    assert enumerate_errors(small, tmp_path, base, (what, "18"), fault, OURS) > 3


@pytest.mark.parametrize("command", [pytest.param("merge", marks=pytest.mark.slow), "sweep"])
def test_an_error_of_some_operations_of_a_command(whole, tmp_path, command):
    """The short form of what follows."""
    (tmp_path / "start").mkdir()
    fault = Fault(tmp_path, tmp_path / "work", CHANGES, str(errno.ENOSPC))
    only = tuple(kind.format(tmp_path / "work") for kind in MIDDLES[command])
    arguments = tuple(COMMANDS[command])
    assert enumerate_errors(whole, tmp_path, tmp_path / "start", arguments, fault, SENTENCE, only) == len(only)


@pytest.mark.slow
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_of_every_operation_of_a_command(whole, tmp_path, command, error):
    (tmp_path / "start").mkdir()
    fault = Fault(tmp_path, tmp_path / "work", CHANGES, str(getattr(errno, error)))
    arguments = tuple(COMMANDS[command])
    assert enumerate_errors(whole, tmp_path, tmp_path / "start", arguments, fault, SENTENCE) > 30
