"""The driver of a merge: stages outputs, feeds units to workers on Ray, commits. Moves no tensor data itself."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.journal import Written
from rvdist.checkpoint.staging import Staging, carry_over, write_index
from rvdist.errors import BadInput, Failed
from rvdist.merge.plan import Output, Plan, Unit, UnitDone
from rvdist.point import WeightPoint

CONFIG_DTYPE = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_AHEAD = 2  # units given to a worker at a time, so that it never waits for the driver
_ATTEMPTS = 3  # of a unit whose worker died
_SYNC_BYTES = 1 << 30  # written by a worker before it is asked to make them durable and they are journalled


@dataclass
class MergeStats:
    """What a merge cost; bytes and CPU seconds over all workers, peak memory of the largest worker, when the first
    unit began (seconds since the epoch) and wall seconds by phase."""

    bytes_read: int = 0
    bytes_written: int = 0
    peak_anonymous_bytes: int = 0
    cpu_seconds: float = 0.0
    began: float = math.inf
    phases: dict[str, float] = field(default_factory=dict)


def merge(
    plan: Plan,
    sources: Mapping[str, Checkpoint],
    card: Callable[[WeightPoint], str],
    *,
    workers: int,
    threads: int = 1,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int], None] = lambda nbytes: None,
    say: Callable[[str], None] = print,
) -> MergeStats:
    """Writes every point of `plan` as a checkpoint, on a Ray cluster that is already connected.

    `card` gives the README of a point; `progress` is told the bytes written since it was last told, `say` what
    a user should know.
    Raises BadInput where a source or an output cannot be used; then nothing is left of the outputs. Raises Failed
    where the merge could not be finished; then the same call goes on from what is journalled.
    """
    started = time.time()
    stagings: list[list[Staging]] = []
    try:
        for output, digests in zip(plan.outputs, plan.digests, strict=True):
            stagings.append([])
            for directory, digest in zip(output.directories, digests, strict=True):
                stagings[-1].append(Staging(directory, digest, overwrite))
        for staged, layout in zip(stagings, plan.layouts, strict=True):
            for staging in staged:
                for name, (header, size) in layout.files.items():
                    staging.allocate(name, header, size)
        for staging in (s for staged in stagings for s in staged if s.restarted):
            say(f"{staging.partial}: was left by a run with other inputs or settings; starting over")
        crew = _Crew(plan, stagings, sources, workers, threads, allow_nonfinite, progress)
        stats = crew.run()
        for source in sources.values():
            source.require_unchanged()
        for output, layout, staged in zip(plan.outputs, plan.layouts, stagings, strict=True):
            for point, staging in zip(output.points, staged, strict=True):
                carry_over(sources[point.base], staging, CONFIG_DTYPE[plan.dtype] if plan.dtype else None)
                write_index(staging, layout.tensors, list(layout.files))
                staging.write_text("README.md", card(point))
                staging.commit()
        stats.phases = {"worker_start": stats.began - started, "merge": time.time() - stats.began}
        return stats
    except BadInput:
        for staging in (s for staged in stagings for s in staged):
            staging.abandon()
        raise
    finally:
        for staging in (s for staged in stagings for s in staged):
            staging.release()


@dataclass
class _Task:
    """What an actor was asked: a unit for the nth time, or (no unit) to make durable what it `wrote`."""

    actor: Any
    unit: Unit | None = None
    attempt: int = 1
    wrote: list[tuple[Unit, tuple[str, ...]]] = field(default_factory=list)


class WorkerActor:
    """A worker as a Ray actor. Imports torch where it runs: the driver has no need of it."""

    def __init__(self, outputs: Sequence[Output], sources: Mapping[str, Checkpoint], dtype: str | None, threads: int):
        from rvdist.merge.worker import MergeWorker

        self._worker = MergeWorker(outputs, sources, dtype, threads)

    def run(self, unit: Unit, claims: tuple[Written | None, ...]) -> UnitDone:
        return self._worker.run(unit, claims)

    def sync(self) -> None:
        self._worker.sync()


class _Crew:
    """The workers of one merge, what waits for them, what runs, and what is written but not yet durable."""

    def __init__(
        self,
        plan: Plan,
        stagings: list[list[Staging]],
        sources: Mapping[str, Checkpoint],
        workers: int,
        threads: int,
        allow_nonfinite: bool,
        progress: Callable[[int], None],
    ) -> None:
        import ray

        self._stagings, self._allow_nonfinite, self._progress = stagings, allow_nonfinite, progress
        partial = [
            Output(output.points, tuple(s.partial for s in staged))
            for output, staged in zip(plan.outputs, stagings, strict=True)
        ]
        arguments = (ray.put(partial), ray.put(dict(sources)), plan.dtype, threads)
        share = ray.cluster_resources().get("CPU", 1) / workers  # more workers than cores must not wait for ever
        actor_class = ray.remote(WorkerActor).options(num_cpus=min(threads, int(share * 1000) / 1000))
        self._start: Callable[[], Any] = lambda: actor_class.remote(*arguments)
        self._waiting = deque((unit, 1) for unit in plan.units)
        self._actors = [self._start() for _ in range(min(workers, max(1, len(plan.units))))]
        self._running: dict[Any, _Task] = {}
        self._unsynced: dict[Any, list[tuple[Unit, tuple[str, ...]]]] = {actor: [] for actor in self._actors}
        self._cpu: dict[Any, float] = {}
        self._stats = MergeStats()

    def run(self) -> MergeStats:
        import ray

        for _ in range(_AHEAD):
            for actor in self._actors:
                self._feed(actor)
        while self._running:
            (ready,), _ = ray.wait(list(self._running), num_returns=1)
            task = self._running.pop(ready)
            try:
                done = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayActorError:
                self._replace(task)
                continue
            if task.unit is None:
                self._journal(task.wrote)
            else:
                self._account(task.actor, task.unit, done)
                self._feed(task.actor)
            if not self._waiting and all(running.unit is None for running in self._running.values()):
                for actor in self._actors:
                    self._sync(actor)
        self._stats.cpu_seconds = sum(self._cpu.values())
        for actor in self._actors:
            ray.kill(actor)
        return self._stats

    def _feed(self, actor: Any) -> None:
        if self._waiting:
            unit, attempt = self._waiting.popleft()
            key = (unit.file, unit.start, unit.nbytes)
            claims = tuple(staging.claims.get(key) for staging in self._stagings[unit.output])
            self._running[actor.run.remote(unit, claims)] = _Task(actor, unit, attempt)

    def _account(self, actor: Any, unit: Unit, done: UnitDone) -> None:
        if any(done.nonfinite) and not self._allow_nonfinite:
            tensors = ", ".join(segment.tensor for segment in unit.segments[:3])
            raise BadInput(
                f"{sum(done.nonfinite)} results in {unit.file} ({tensors}, …) are infinite or not a number; "
                "choose a smaller alpha, another dtype, or set allow_nonfinite=true"
            )
        stats = self._stats
        stats.bytes_read += done.bytes_read
        stats.bytes_written += done.bytes_written
        stats.peak_anonymous_bytes = max(stats.peak_anonymous_bytes, done.peak_anonymous_bytes)
        stats.began = min(stats.began, done.began)
        self._cpu[actor] = done.cpu_seconds
        self._progress(unit.nbytes * len(done.digests))
        if done.bytes_written:
            self._unsynced[actor].append((unit, done.digests))
            if sum(unit.nbytes * len(digests) for unit, digests in self._unsynced[actor]) > _SYNC_BYTES:
                self._sync(actor)

    def _sync(self, actor: Any) -> None:
        if wrote := self._unsynced[actor]:
            self._unsynced[actor] = []
            self._running[actor.sync.remote()] = _Task(actor, wrote=wrote)

    def _journal(self, wrote: list[tuple[Unit, tuple[str, ...]]]) -> None:
        """Each output's journal learns what is durable in it now."""
        durable: dict[Staging, list[Written]] = {}
        for unit, digests in wrote:
            for staging, digest in zip(self._stagings[unit.output], digests, strict=True):
                durable.setdefault(staging, []).append(Written(unit.file, unit.start, unit.nbytes, digest))
        for staging, written in durable.items():
            staging.journal(written)

    def _replace(self, task: _Task) -> None:
        """A worker died: what it was doing, and what it wrote without making it durable, is done again by another."""
        if task.unit is not None:
            if task.attempt == _ATTEMPTS:
                raise Failed(
                    f"{task.unit.file}: {_ATTEMPTS} workers died while writing it, perhaps for want of memory; "
                    "what is done is kept, and the same command goes on from there"
                )
            self._waiting.append((task.unit, task.attempt + 1))
        lost = task.wrote + self._unsynced.pop(task.actor, [])
        self._waiting.extend((unit, 1) for unit, _ in lost)
        if task.actor in self._actors:
            self._actors[self._actors.index(task.actor)] = replacement = self._start()
            self._unsynced[replacement] = []
        for actor in self._actors:
            self._feed(actor)
