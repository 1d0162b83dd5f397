"""The merge stage: what runs have promised to write, as one plan for all that are stored alike, and the vector that one
stores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rvdist import config
from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.key import owner_key
from rvdist.checkpoint.staging import discards
from rvdist.merge.placement import rates, remember_rate
from rvdist.merge.plan import Plan, build_plan
from rvdist.point import Vector, WeightPoint
from rvdist.progress import Bar
from rvdist.report.metadata import Result, licence_of
from rvdist.run import Run, versions
from rvdist.warm import Warm

if TYPE_CHECKING:
    from rvdist.vector import Storage


def alike(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs by what must be equal for their merges to be one plan."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = run.settings
        merge = asdict(settings.merge) | dict.fromkeys(("method", "density", "seed"))  # these are the points' own
        stored = (settings.dtype, settings.max_shard_size, settings.overwrite, settings.allow_nonfinite)
        renamed = [pair for point in run.written.values() for pair in point.renames() if pair[1]]
        found.setdefault(json.dumps([merge, settings.device, stored, renamed]), []).append(run)
    return list(found.values())


def plan_of(runs: Sequence[Run], written: Mapping[Path, WeightPoint]) -> Plan:
    """One plan for runs that agree in how outputs are stored."""
    settings = runs[0].settings
    max_shard_size = config.size(settings.max_shard_size, "max_shard_size")
    return build_plan(written, sources_of(runs), config.output_dtype(settings), max_shard_size)


def outputs(runs: Sequence[Run]) -> dict[Path, WeightPoint]:
    """What all of them write, each to a place of its own, also where nothing is kept."""
    found: dict[Path, WeightPoint] = {}
    for output, point in (pair for run in runs for pair in run.written.items()):
        found[output / str(len(found)) if output in found and discards(output) else output] = point
    return found


def sources_of(runs: Sequence[Run]) -> dict[str, Checkpoint]:
    """Every checkpoint that one of them reads, by name."""
    return {name: source for run in runs for name, source in run.sources.items()}


def merge_together(runs: Sequence[Run], warm: Warm) -> None:
    """Writes what these runs have promised in one pass over their sources."""
    from rvdist.merge.crew import WorkerSettings
    from rvdist.merge.engine import merge

    warm.cool()  # the workers need what engines of an earlier job hold
    first, settings, resources = runs[0], runs[0].settings, warm.resources()
    owners = {point: run for run in runs for point in run.written.values()}
    plan = plan_of(runs, outputs(runs))
    sources = sources_of(runs) if any(run.arms for run in runs) else _by_ranges(sources_of(runs), plan)
    device = config.device(settings, resources.gpus)
    workers = sum(config.workers(settings, resources.counts))
    with Bar("merge", plan.nbytes, first.log) as bar:
        stats = merge(
            plan,
            sources,
            lambda point: card(owners[point], point),
            WorkerSettings(
                workers=workers,
                threads=settings.merge.threads,
                device=device,
                gpus=settings.merge.gpus_per_worker if device == "cuda" else 0.0,
                direct_io=settings.merge.direct_io,
                timeout=settings.cluster.timeout,
            ),
            overwrite=settings.overwrite,
            allow_nonfinite=settings.allow_nonfinite,
            key=owner_key(first.cache),
            progress=bar.advance,
            say=first.say,
        )
    moved = stats.bytes_read + stats.bytes_written
    remember_rate(rates(first.cache), device, moved, stats.phases["merge"] * workers, stats.peak_anonymous_bytes)
    timing = first.timing
    for phase, seconds in stats.phases.items():
        timing.add(phase, seconds)
    timing.bytes_read += stats.bytes_read
    timing.bytes_written += stats.bytes_written
    timing.cpu_seconds += stats.cpu_seconds
    timing.peak_anonymous_bytes["worker"] = stats.peak_anonymous_bytes
    for run in runs:
        run.kept += [directory for directory in run.written if not discards(directory)]
    for output in plan.outputs:
        for directory in output.directories:
            first.say(f"{'discarded' if discards(directory) else 'wrote'} {directory}")


def _by_ranges(sources: Mapping[str, Checkpoint], plan: Plan) -> dict[str, Checkpoint]:
    """Of a Hub file that the merge needs little of, only that is fetched; engines would need all of it."""
    found = dict(sources)
    for name, source in sources.items():
        if source.hub:
            from rvdist.checkpoint.hub import by_ranges

            found[name] = by_ranges(source, plan.needed(name))
    return found


def card(run: Run, point: WeightPoint, name: str | None = None, results: Sequence[Result] = ()) -> str:
    """The model card of a point: on disk without, on the Hub with the `name` of its repository and what was scored."""
    from rvdist.report.card import model_card

    return model_card(
        point,
        digest=run.digests.get(point),
        sources={source: str(run.sources[source].hub or run.sources[source].path) for source in point.sources()},
        dtype=run.settings.dtype or "the target's own dtypes",
        notes=run.notes[point],
        versions=versions(),
        licences={source: licence_of(run.sources[source].path) for source in point.sources()},
        name=name,
        results=results,
    )


def vector_is_complete(run: Run, saved: config.Saved, vector: Vector) -> bool:
    """Whether an earlier run has stored this vector. Raises BadInput for donors of which there is nothing to store."""
    from rvdist.vector import is_complete

    with run.timing.phase("digest"):
        complete = is_complete(vector, run.sources, saved.directory, _storage(run, saved), run.cache / "digests")
    if complete := complete and not run.settings.overwrite:
        run.say(f"{saved.directory}: already complete")
    return complete


def _storage(run: Run, saved: config.Saved) -> Storage:
    from rvdist.vector import Storage

    return Storage(saved.dtype, saved.rank, saved.density, config.size(run.settings.max_shard_size, "max_shard_size"))


def save_vector(run: Run) -> None:
    """Stores what `vector.save` asks for, in this process: it needs neither a target nor a cluster."""
    from rvdist.vector import save

    assert run.saved is not None
    saved, vector = run.saved
    nbytes = sum(spec.nbytes for spec in run.sources[vector.plus].tensors.values())
    with run.timing.phase("vector"), Bar("vector", nbytes, run.log) as bar:
        save(
            vector,
            run.sources,
            saved.directory,
            _storage(run, saved),
            overwrite=run.settings.overwrite,
            key=owner_key(run.cache),
            digests=run.cache / "digests",
            progress=bar.advance,
            say=run.say,
        )
    run.kept.append(saved.directory)
