"""Each claim of docs/guarantees.md names the tests that break when it is false: they exist, and are not left out."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from guarantees import COLLECTED, PAGE, ROOT, TEST, claims

SLOW = "Only in `make test-slow`."
_COLLECT = """
import json, sys, pytest
sys.path.insert(0, "tests")
from guarantees import cases

class Seen:
    def pytest_collection_finish(self, session):
        print("FOUND" + json.dumps(cases(session.items)))

sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Seen()]))
"""


@pytest.fixture(scope="module")
def collected(request: pytest.FixtureRequest) -> dict[str, list[list[bool]]]:
    """Of each named test, as pytest collects it: whether each of its cases is left out, and is slow."""
    files = sorted({test.partition("::")[0] for _, tests in claims() for test in tests})
    known = request.config.stash[COLLECTED]
    if {test.partition("::")[0] for test in known} >= {*files}:  # of all of them, as in `make test`
        return known
    done = subprocess.run(
        [sys.executable, "-c", _COLLECT, *files], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stdout + done.stderr
    found: dict[str, list[list[bool]]] = json.loads(lines[0].removeprefix("FOUND"))
    return found


def test_every_claim_names_tests_that_there_are_and_that_run(collected: dict[str, list[list[bool]]]) -> None:
    assert len(claims()) > 60
    for claim, tests in claims():
        assert tests, f"what breaks when this is false? {claim}"
        cases = []
        for test in tests:
            assert test in collected, f"there is no {test}, which is to break when this is false: {claim}"
            cases += collected[test]
            assert not all(left_out for left_out, _ in collected[test]), f"{test} never runs"
        always = any(not left_out and not slow for left_out, slow in cases)
        assert always != (SLOW in claim), f"say {SLOW!r} of what only slow tests break, and of nothing else: {claim}"


def test_every_row_of_a_table_of_claims_is_read() -> None:
    """So that none is without a test because it is written in another way."""
    page = PAGE.read_text(encoding="utf-8")
    promised = page.partition("## Not promised")[0]
    rows = [line for line in promised.splitlines() if line.startswith("| ")]
    heads = [line for line in rows if line == "| claim | breaks when it is false |"]
    assert len(heads) == promised.count("|---|---|") > 5 and len(rows) - len(heads) == len(claims())
    assert len(TEST.findall(page)) == sum(len(tests) for _, tests in claims()), "a test is named outside of the tables"


def test_a_test_that_is_renamed_is_missed(collected: dict[str, list[list[bool]]]) -> None:
    assert "tests/core/test_text.py::test_a_cell_is_no_formula" in collected
    assert "tests/core/test_text.py::test_of_another_name" not in collected
