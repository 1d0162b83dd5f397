"""The workers of a merge, on Ray itself, at every operation on files: killed, stopped, or the file system fails. The
merge goes on with another worker, or the same call does, to the bytes of an undisturbed one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import ROOT
from shim import Fault, build
from test_kills import outcome

Merging = Callable[[], dict[str, Any]]
ENDS = ("kill", "torn", "stop")
ERRORS = ("EIO", "ENOSPC", "short")
REPLACED = re.compile(r".* (died|failed \(it said nothing for 4 s; .*\)); another takes its place")


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Fault:
    place = tmp_path_factory.mktemp("workers")
    (place / "work").mkdir()
    return Fault(place, place / "work", role="worker")


@pytest.fixture(scope="module")
def merging(fault: Fault) -> Iterator[Merging]:
    """`merging()`: a merge in `fault.under` on a Ray whose workers meet the fault (tests/faults/merging.py), and how it
    ended."""
    environment = {
        **os.environ,
        **fault.environment,
        "LD_PRELOAD": str(build(fault.place)),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
    }
    command = [sys.executable, str(Path(__file__).with_name("merging.py"))]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout

    def merge() -> dict[str, Any]:
        assert process.stdin and process.stdout
        process.stdin.write(f"{fault.under / 'out'}\n")
        process.stdin.flush()
        return dict(json.loads(process.stdout.readline()))  # and nothing of Ray's stands there

    yield merge
    process.stdin.close()
    assert process.wait(30) == 0


def enumerate_faults(merging: Merging, fault: Fault, action: str, chosen: Callable[[int], list[int]]) -> int:
    """Has a worker meet it at each of these operations, each time in a merge that begins anew; returns how many there
    are."""
    fault = replace(fault, action=str(getattr(errno, action, action)))
    begin(fault)
    ended, count, told = merging(), fault.count, fault.told
    assert not ended["failed"] and not ended["left"], ended
    right, wrong = outcome(fault.under), []
    for number in chosen(count):
        begin(fault.at(number))
        ended = merging()
        assert fault.happened
        at = told[number] if number < len(told) else number
        if action in ENDS and (ended["failed"] or not any(map(REPLACED.fullmatch, ended["said"]))):
            wrong.append((at, ended))
        if action in ("kill", "torn") and not any("worker died" in words for words in ended["heard"]):
            wrong.append((at, "Ray's words are not heard", ended))
        fault.at(-1)
        while ended["failed"]:
            if (
                "the same command goes on" not in ended["failed"]
                and "run the same command again" not in ended["failed"]
            ):
                wrong.append((at, ended["failed"]))
                break
            ended = merging()
        if outcome(fault.under) != right or ended["left"]:
            wrong.append((at, "other bytes", ended))
    assert not wrong, "\n".join(map(str, wrong))
    return count


def begin(fault: Fault) -> None:
    """Nothing is there."""
    shutil.rmtree(fault.under)
    fault.under.mkdir()


@pytest.mark.heavy
def test_a_worker_meets_a_fault_and_the_merge_goes_on(merging, fault):
    """At one operation in the middle: the short form of what follows."""
    assert enumerate_faults(merging, fault, "torn", lambda count: [count // 2]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("action", [*ENDS, *ERRORS])
def test_a_worker_meets_a_fault_at_every_boundary(merging, fault, action):
    assert enumerate_faults(merging, fault, action, lambda count: list(range(count))) > 10
