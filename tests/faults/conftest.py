"""What is killed, and meets errors: small runs and whole commands, forked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from serving import Run, serving
from shim import Fault

SMALL = ["rvdist.weights.checkpoint.staging", "rvdist.evaluate.cache", "rvdist.merge.placement"]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`small(work, fault, what)`: tests/faults/small.py."""
    line, environment = serving(tmp_path_factory.mktemp("small"), *SMALL)

    def run(work: Path, fault: Fault, *arguments: str) -> tuple[int, str]:
        done = forked.ask(line, "small", arguments, work, environment | fault.environment, 60)
        return done.returncode, done.stderr

    yield run
    line.close()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`whole(work, fault, arguments…)`: the command, with workers and engines in its own process."""
    line, environment = serving(tmp_path_factory.mktemp("whole"), *forked.MODULES, "inline")

    def run(work: Path, fault: Fault, *arguments: str) -> tuple[int, str]:
        done = forked.ask(line, "rvdist.launch", arguments, work, environment | fault.environment, 300)
        return done.returncode, done.stderr

    yield run
    line.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A directory with what tests/faults/small.py begins with."""
    start = tmp_path / "start"
    (start / "base").mkdir(parents=True)
    (start / "base/config.json").write_text("{}")
    (start / "base/tokenizer.json").write_text("{}")
    return start
