"""Runs situations as the jobs of one command, in this process: what can be one merge is one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from situations import Asked, Situation

from rvdist.core.config import CacheConfig
from rvdist.core.log import Log, LoggedTiming
from rvdist.stages.job import Job
from rvdist.stages.jobs import run_jobs
from rvdist.stages.warm import Warm


@dataclass
class Outcome:
    """What became of a situation: what was asked, what it ended with, what was said, and what was there before."""

    asked: Asked
    place: Path
    before: set[Path]
    error: Exception | None = None
    notes: tuple[str, ...] = ()


def contents(place: Path) -> set[Path]:
    return {path.relative_to(place) for path in place.rglob("*")}


def run(situations: Iterable[Situation], root: Path) -> dict[str, Outcome]:
    """Builds each below `root` and runs all but those that are typed."""
    found: dict[str, Outcome] = {}
    jobs: dict[str, Job] = {}
    for situation in situations:
        place = root / situation.name
        place.mkdir()
        asked = situation.build(place)
        found[situation.name] = Outcome(asked, place, contents(place))
        if not asked.typed:
            log = Log(console=Console(quiet=True, force_terminal=False))
            settings = replace(asked.settings, cache=CacheConfig(str(root / "cache")))
            outputs = {Path(str(settings.output)): asked.point} if asked.point else {}
            timing = LoggedTiming(log)
            jobs[situation.name] = Job(settings, place / "run", "graveyard", timing, log, outputs=outputs)
    with closing(Warm()) as warm:
        ends = run_jobs(list(jobs.values()), warm, last=True)
    for name, end in zip(jobs, ends, strict=True):
        found[name].error, found[name].notes = end.error, end.notes
    return found
