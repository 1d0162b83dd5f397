"""The workers of one merge without Ray, where that would take longer to start than they save: threads of this process,
each with a worker of its own, or one that `rvdist up` has ready, so that this process need not import what it does.

Worker, plan, bytes and journal are those of a crew; nobody takes the place of a worker that fails.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from rvdist.core.errors import BadInput
from rvdist.merge.accounts import Accounts, MergeStats, Wrote, is_due, place_of
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.plan import Plan
from rvdist.merge.ready import ReadyWorker, cpu_seconds
from rvdist.merge.roster import Roster
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.staging import Staging

if TYPE_CHECKING:
    from rvdist.merge.worker import MergeWorker

_HERE = "this process"


class Alone:
    """Runs a plan's units; the outputs' journals learn what is durable."""

    def __init__(
        self,
        plan: Plan,
        stagings: Sequence[Sequence[Staging | None]],
        sources: Mapping[str, Checkpoint],
        settings: WorkerSettings,
        allow_nonfinite: bool,
        stats: MergeStats,
        progress: Callable[[int], None],
    ) -> None:
        self._accounts = Accounts(plan, stagings, sources, allow_nonfinite, stats, progress)
        self._stats, self._progress = stats, progress
        # Processes that are there already stand in other directories than this one
        self._sources = {name: replace(one, path=one.path.absolute()) for name, one in sources.items()}
        self._dtype, self._settings = plan.dtype, settings
        self._count = max(1, min(settings.workers, len(plan.units)))
        self._roster = Roster(plan)
        self._lock = threading.Lock()  # of the roster and the accounts
        self._over = False  # whether one has failed, or the command is to end

    def run(self) -> None:
        """Returns when everything is durable and journalled. Raises BadInput and Failed."""
        before = sum(os.times()[:2])
        with ExitStack() as stack:
            workers = [stack.enter_context(closing(self._worker())) for _ in range(self._count)]
            self._roster.meet(_HERE, frozenset())
            self._progress(0)
            pool = stack.enter_context(ThreadPoolExecutor(self._count))
            try:
                working = [pool.submit(self._work, worker) for worker in workers]
                done, _ = wait(working, return_when=FIRST_EXCEPTION)
            finally:
                self._over = True  # the others end after the unit that they are at
            for one in done:
                one.result()
        self._stats.cpu_seconds += sum(os.times()[:2]) - before + cpu_seconds(workers)

    def _begin(self) -> MergeWorker | ReadyWorker:
        settings = self._settings
        made_of = self._accounts.partial, self._sources, self._dtype, settings.threads, settings.device
        if settings.ready:
            with suppress(OSError):
                return ReadyWorker(settings.ready, *made_of, settings.direct_io, silence=settings.silence)
            self._settings = replace(settings, ready="")  # it has ended, or is stopped: none waits for it again
        from rvdist.merge.worker import MergeWorker  # which imports torch

        return MergeWorker(*made_of, settings.direct_io)

    def _worker(self) -> MergeWorker | ReadyWorker:
        worker = self._begin()
        for probe in self._accounts.probes:
            if not worker.sees(probe):
                raise BadInput(f"{probe.path.parent}: was taken away while it was written; run again")
        for source, file in self._roster.needs:
            if not worker.can_read(source, file):
                path = place_of(self._sources[source], file)
                raise BadInput(f"{path}: it changed or was truncated, or cannot be seen; run again when it is whole")
        return worker

    def _work(self, worker: MergeWorker | ReadyWorker) -> None:
        """One thread's share: unit after unit, until none is left."""
        wrote: list[Wrote] = []
        since = time.monotonic()
        while not self._over:
            with self._lock:
                unit = self._roster.take(_HERE, frozenset(), {})
            if unit is None:
                break
            done = worker.run(unit, self._accounts.claims(unit))
            with self._lock:
                self._accounts.count(unit, done, _HERE)
            if done.bytes_written:
                wrote.append((unit, done.digests))
            if is_due(wrote, since):
                self._keep(worker, wrote)
                since = time.monotonic()
        self._keep(worker, wrote)  # also where the command is to end: the same goes on from there

    def _keep(self, worker: MergeWorker | ReadyWorker, wrote: list[Wrote]) -> None:
        """Makes durable what was written, and journals it."""
        worker.sync()
        with self._lock:
            self._accounts.journal(wrote)
        wrote.clear()
