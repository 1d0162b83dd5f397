"""The driver of a merge: stages outputs, feeds units to workers on Ray, commits. Moves no tensor data itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.staging import Staging, carry_over, write_index
from rvdist.errors import BadInput
from rvdist.merge.plan import Output, Plan, Unit
from rvdist.point import WeightPoint

CONFIG_DTYPE = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_AHEAD = 2  # units given to a worker at a time, so that it never waits for the driver
_ATTEMPTS = 3  # of a unit whose worker died


@dataclass
class MergeStats:
    """What a merge cost; bytes and seconds over all workers, peak memory of the largest worker."""

    bytes_read: int = 0
    bytes_written: int = 0
    peak_anonymous_bytes: int = 0
    cpu_seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)


def merge(
    plan: Plan,
    sources: Mapping[str, Checkpoint],
    card: Callable[[WeightPoint], str],
    *,
    workers: int,
    threads: int = 1,
    dtype: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> MergeStats:
    """Writes every point of `plan` as a checkpoint, on a Ray cluster that is already connected.

    `card` gives the README of a point; `progress` is told the bytes written since it was last told.
    Raises BadInput where a source or an output cannot be used; then no output has appeared.
    """
    stagings: list[list[Staging]] = []
    try:
        for output in plan.outputs:
            stagings.append([])
            for directory in output.directories:
                stagings[-1].append(Staging(directory, overwrite))
        started = time.perf_counter()
        for staged, layout in zip(stagings, plan.layouts, strict=True):
            for staging in staged:
                for name, (header, size) in layout.files.items():
                    staging.allocate(name, header, size)
        stats = _run_units(plan, stagings, sources, dtype, workers, threads, allow_nonfinite, progress)
        for source in sources.values():
            source.require_unchanged()
        for output, layout, staged in zip(plan.outputs, plan.layouts, stagings, strict=True):
            for point, staging in zip(output.points, staged, strict=True):
                carry_over(sources[point.base], staging, CONFIG_DTYPE[dtype] if dtype else None)
                write_index(staging, layout.tensors, list(layout.files))
                staging.write_text("README.md", card(point))
                staging.commit()
        stats.phases["merge"] = time.perf_counter() - started
        return stats
    except BaseException:
        for staging in (s for staged in stagings for s in staged):
            staging.abandon()
        raise


def _run_units(
    plan: Plan,
    stagings: list[list[Staging]],
    sources: Mapping[str, Checkpoint],
    dtype: str | None,
    workers: int,
    threads: int,
    allow_nonfinite: bool,
    progress: Callable[[int], None],
) -> MergeStats:
    import ray

    from rvdist.merge.worker import MergeWorker

    partial = [
        Output(output.points, tuple(s.partial for s in staged))
        for output, staged in zip(plan.outputs, stagings, strict=True)
    ]
    arguments = (ray.put(partial), ray.put(dict(sources)), dtype, threads)
    share = ray.cluster_resources().get("CPU", 1) / workers  # more workers than cores must not wait for ever
    actor_class = ray.remote(MergeWorker).options(num_cpus=min(threads, int(share * 1000) / 1000))

    def start() -> Any:
        return actor_class.remote(*arguments)

    waiting: deque[tuple[Unit, int]] = deque((unit, 1) for unit in plan.units)
    actors = [start() for _ in range(min(workers, max(1, len(plan.units))))]
    running: dict[Any, tuple[Any, Unit, int]] = {}
    stats = MergeStats()
    cpu: dict[Any, float] = {}

    def feed(actor: Any) -> None:
        if waiting:
            unit, attempt = waiting.popleft()
            running[actor.run.remote(unit)] = (actor, unit, attempt)

    for _ in range(_AHEAD):
        for actor in actors:
            feed(actor)
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        actor, unit, attempt = running.pop(ready)
        try:
            done = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError:
            if attempt == _ATTEMPTS:
                raise RuntimeError(f"{unit.file}: the worker died {attempt} times while writing it") from None
            waiting.append((unit, attempt + 1))
            if actor in actors:
                actors[actors.index(actor)] = start()
            for replacement in actors:
                feed(replacement)
            continue
        if any(done.nonfinite) and not allow_nonfinite:
            tensors = ", ".join(segment.tensor for segment in unit.segments[:3])
            raise BadInput(
                f"{sum(done.nonfinite)} results in {unit.file} ({tensors}, …) are infinite or not a number; "
                "choose a smaller alpha, another dtype, or set allow_nonfinite=true"
            )
        stats.bytes_read += done.bytes_read
        stats.bytes_written += done.bytes_written
        stats.peak_anonymous_bytes = max(stats.peak_anonymous_bytes, done.peak_anonymous_bytes)
        cpu[actor] = done.cpu_seconds
        progress(done.bytes_written)
        feed(actor)
    stats.cpu_seconds = sum(cpu.values())
    ray.get([actor.sync.remote() for actor in actors])
    for actor in actors:
        ray.kill(actor)
    return stats
