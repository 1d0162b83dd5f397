"""The situations of the graveyard that need an engine: every answer as it must be, or one sentence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from catalogue import SITUATIONS
from rich.console import Console
from runner import contents
from situations import Refused, Scored, Situation

from rvdist.core.config import CacheConfig, Config
from rvdist.core.errors import BadInput
from rvdist.core.log import Log, LoggedTiming
from rvdist.core.record import Record
from rvdist.stages.job import Job
from rvdist.stages.jobs import run_jobs
from rvdist.stages.warm import Warm

pytestmark = pytest.mark.slow


Scores = tuple[list[Record], Exception | None]


def score(settings: Sequence[Config], directory: Path) -> list[Scores]:
    """What each job of one command has scored, and what it ended with."""
    jobs = []
    for number, one in enumerate(settings):
        log = Log(console=Console(quiet=True, force_terminal=False))
        one = replace(one, cache=CacheConfig(str(directory / "cache"), samples=False))
        jobs.append(Job(one, directory / f"run-{number}", "graveyard", LoggedTiming(log), log))
    with closing(Warm()) as warm:
        ends = run_jobs(jobs, warm, last=True)
    return [(list(end.findings.records) if end.findings else [], end.error) for end in ends]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def marked(situation: Situation) -> object:
    marks = [pytest.mark.xfail(reason=situation.todo, strict=True)] if situation.todo else []
    return pytest.param(situation, id=situation.name, marks=marks)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("situation", [marked(situation) for situation in SITUATIONS if situation.slow])
def test_nothing_is_silent_when_it_is_scored(situation: Situation, place: Path) -> None:
    asked = situation.build(place)
    before, verdict = contents(place), asked.verdict
    control = [verdict.control] if isinstance(verdict, Scored) else []
    (records, error), *controls = score([asked.settings, *control], place / "runs")
    if isinstance(verdict, Refused):
        assert situation.refused and isinstance(error, BadInput), f"silent, or not a refusal: {error!r}"
        assert "\n" not in str(error) and all(re.search(words, str(error)) for words in verdict.words), str(error)
        left = {path for path in contents(place) - before if "cache" not in path.parts} - {Path("runs")}
        assert verdict.underway or not left, left
        return
    assert situation.right and isinstance(verdict, Scored)
    if verdict.failed:
        assert error and all(re.search(words, str(error)) for words in verdict.failed), f"silent: {error!r}"
    elif error:
        raise error
    ((answers, stopped),) = controls
    assert stopped is None, stopped
    assert verdict.wrong(records, answers) == []
