"""The driver of a merge: stages outputs, has a crew of workers compute them, commits. Moves no tensor data itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rvdist.core.config import DTYPES
from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import WeightPoint
from rvdist.core.regular import allow_many_files
from rvdist.merge.accounts import MergeStats
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.alone import Alone
from rvdist.merge.crew import Crew
from rvdist.merge.plan import Plan
from rvdist.weights.checkpoint.beside import carry_over, companions, write_index
from rvdist.weights.checkpoint.digest import require_same
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.staging import Staging, discards

CONFIG_DTYPE = {stored: name for name, stored in DTYPES.items()}


def merge(
    plan: Plan,
    sources: Mapping[str, Checkpoint],
    cards: Mapping[WeightPoint, str],
    settings: WorkerSettings,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    key: bytes = b"",
    progress: Callable[[int], None] = lambda nbytes: None,
    say: Callable[[str], None] = print,
) -> MergeStats:
    """Writes every point of `plan` as a checkpoint, on a Ray cluster that is already connected, or without one
    where `settings` say so. Outputs under /dev/null are computed and digested, and not kept.

    `cards` are the READMEs of the points; `key` seals the journals, and only what it has sealed is gone on from;
    `progress` is told the bytes written since it was last told, and 0 when the first worker begins, `say` what a user
    should know.
    Raises BadInput where a source or an output cannot be used; then only what an earlier call had journalled is left
    of the outputs. Raises Failed where the merge could not be finished; then the same call goes on from what is
    journalled.
    """
    started = time.time()
    stats = MergeStats()
    allow_many_files()
    stagings = _stage(plan, overwrite, key, say)
    try:
        if settings.alone:
            Alone(plan, stagings, sources, settings, allow_nonfinite, stats, progress).run()
        else:
            Crew(plan, stagings, sources, settings, allow_nonfinite, stats, progress, say).run()
        for source in sources.values():
            source.require_unchanged()
        for output, layout, staged in zip(plan.outputs, plan.layouts, stagings, strict=True):
            for point, staging in zip(output.points, staged, strict=True):
                if staging is not None:
                    dtype = CONFIG_DTYPE[plan.dtype] if plan.dtype else None
                    carry_over(sources[point.base], staging, dtype, weights=True)
                    require_same(plan.beside[point.base], companions(sources[point.base]).values())
                    write_index(staging, layout.tensors, list(layout.files))
                    staging.write_text("README.md", cards[point])
                    staging.commit()
        began = min(stats.began, time.time())
        stats.phases = {"worker_start": began - started, "merge": time.time() - began}
        return stats
    except BadInput:
        for staging in (s for staged in stagings for s in staged if s):
            staging.abandon()
        raise
    finally:
        for staging in (s for staged in stagings for s in staged if s):
            staging.release()


def _stage(plan: Plan, overwrite: bool, key: bytes, say: Callable[[str], None]) -> list[list[Staging | None]]:
    """The staging of every output (None where it is discarded) with all of its room; nothing new where one fails."""
    stagings: list[list[Staging | None]] = []
    ranges: list[set[tuple[str, int, int]]] = [set() for _ in plan.outputs]
    for unit in plan.units:
        ranges[unit.output].add((unit.file, unit.start, unit.nbytes))
    try:
        for output, layout, digests, own in zip(plan.outputs, plan.layouts, plan.digests, ranges, strict=True):
            staged: list[Staging | None] = []
            stagings.append(staged)
            for directory, digest in zip(output.directories, digests, strict=True):
                staged.append(None if discards(directory) else Staging(directory, digest, overwrite, key))
                if (staging := staged[-1]) is None:
                    continue
                staging.keep(own)
                for name, (header, size) in layout.files.items():
                    staging.allocate(name, header, size)
                if staging.restarted:
                    say(f"{staging.partial}: was left by a run with other inputs or settings; starting over")
    except (BadInput, Failed):
        for staging in (s for staged in stagings for s in staged if s):
            staging.abandon()
        raise
    return stagings
