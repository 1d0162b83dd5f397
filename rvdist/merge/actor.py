"""A merge worker as a Ray actor: what it says first, the units it is given, and when they are durable.

Imports torch where it runs: the driver has no need of it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rvdist.merge import private_torch
from rvdist.merge.plan import Output, Unit, UnitDone
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.journal import Written
from rvdist.weights.checkpoint.staging import Probe


@dataclass(frozen=True)
class WorkerSettings:
    """How many workers, whether they need no Ray (`alone`), behind which socket some are `ready`, and what each is: its
    CPU threads, its device (`cpu` or `cuda`), the share of a GPU it takes, whether it writes past the page cache where
    it can, how many seconds the cluster has to find room for all of them, and the first of them to begin, and after how
    many without an answer one at work is replaced."""

    workers: int
    threads: int = 1
    device: str = "cpu"
    gpus: float = 0.0
    direct_io: bool = True
    timeout: float = 120.0
    silence: float = 900.0
    alone: bool = False
    ready: str = ""


@dataclass(frozen=True)
class Hello:
    """What a worker says first: its node, the source files (source, name) it cannot read, the outputs it cannot see."""

    node: str
    unreadable: frozenset[tuple[str, str]]
    unseen: tuple[Path, ...]


class WorkerActor:
    """A worker that is made of nothing, so that its process begins while the driver makes ready what `hello` takes. It
    begins to import what it needs before Ray brings it that."""

    def __init__(self) -> None:
        gc.set_threshold(100_000)  # modules are many, cycles are few: a sixth of the imports
        threading.Thread(target=_import, daemon=True).start()

    def hello(
        self,
        outputs: Sequence[Output],
        sources: Mapping[str, Checkpoint],
        dtype: str | None,
        settings: WorkerSettings,
        needs: Sequence[tuple[str, str]],
        probes: Sequence[Probe],
    ) -> Hello:
        """What it can read and see, before it is given units of these outputs, made of `sources` and stored as `dtype`
        (None: as the bases are)."""
        import ray

        from rvdist.merge.worker import MergeWorker

        self._worker = MergeWorker(outputs, sources, dtype, settings.threads, settings.device, settings.direct_io)
        node = ray.get_runtime_context().get_node_id()
        unseen = tuple(probe.path for probe in probes if not self._worker.sees(probe))
        return Hello(node, frozenset(key for key in needs if not self._worker.can_read(*key)), unseen)

    def run(self, unit: Unit, claims: tuple[Written | None, ...]) -> UnitDone:
        """Does a unit; see `MergeWorker.run`."""
        return self._worker.run(unit, claims)

    def sync(self) -> None:
        """Makes durable what it wrote; see `MergeWorker.sync`."""
        self._worker.sync()


def _import() -> None:
    """What goes wrong is for `hello` to meet."""
    with suppress(Exception):
        private_torch.load()
        import rvdist.merge.worker  # noqa: F401
