"""The claims of docs/guarantees.md, with the tests that break when they are false."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guarantees.md"
COLLECTED = pytest.StashKey[dict[str, list[list[bool]]]]()
TEST = re.compile(r"`(tests/[\w/]+\.py::test_\w+)`")


@lru_cache
def claims() -> list[tuple[str, list[str]]]:
    """Each row of the tables of claims."""
    promised = PAGE.read_text(encoding="utf-8").partition("## Not promised")[0]
    rows = [line.strip("| ").split(" | ") for line in promised.splitlines() if line.startswith("| ")]
    return [(claim, TEST.findall(tests)) for claim, tests in rows if claim != "claim"]


def cases(items: Sequence[pytest.Item]) -> dict[str, list[list[bool]]]:
    """Of each collected test, whether each of its cases is left out whatever the machine, and whether it is slow."""
    found: dict[str, list[list[bool]]] = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        case = [bool(marks & {"skip", "xfail"}), "slow" in marks]
        found.setdefault(item.nodeid.partition("[")[0], []).append(case)
    return found
