"""The merge stage: what jobs have promised to write, as one plan for all that are stored alike, and the vector that one
stores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path

from rvdist.core import cluster, config, standing
from rvdist.core.point import WeightPoint
from rvdist.core.progress import Bar
from rvdist.merge.placement import rates, remember_rate
from rvdist.merge.plan import Plan, build_plan
from rvdist.report.card.metadata import Result, licence_of
from rvdist.stages.job import Notes, Prepared, versions
from rvdist.stages.warm import Warm
from rvdist.weights.checkpoint.bound import bound
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.key import owner_key
from rvdist.weights.checkpoint.layouts import layout_of
from rvdist.weights.checkpoint.remapped import map_of
from rvdist.weights.checkpoint.stacked import Stacked
from rvdist.weights.checkpoint.staging import discards


def group_alike(jobs: Sequence[Prepared]) -> list[list[Prepared]]:
    """The jobs by what must be equal for their merges to be one plan."""
    groups: dict[str, list[Prepared]] = {}
    for one in jobs:
        settings = one.settings
        merge = asdict(settings.merge) | dict.fromkeys(("method", "density", "seed"))  # these are the points' own
        stored = (astuple(settings.output_format), settings.overwrite)
        renamed = [pair for point in one.written.values() for pair in point.renames() if pair[1]]
        laid_out = [(name, layout) for name, source in one.sources.items() if (layout := layout_of(source))]
        remapped = [(name, made_of) for name, source in one.sources.items() if (made_of := map_of(source))]
        groups.setdefault(json.dumps([merge, settings.device, stored, renamed, laid_out, remapped]), []).append(one)
    return list(groups.values())


def common_plan(jobs: Sequence[Prepared]) -> Plan:
    """One plan for jobs that are alike. Each output has a place of its own, also where nothing is kept."""
    outputs: dict[Path, WeightPoint] = {}
    for output, point in (pair for one in jobs for pair in one.written.items()):
        outputs[output / str(len(outputs)) if output in outputs and discards(output) else output] = point
    return build_plan(outputs, sources_of(jobs), jobs[0].settings.output_format)


def sources_of(jobs: Sequence[Prepared]) -> dict[str, Checkpoint]:
    """Every checkpoint that one of them reads, by name."""
    return {name: source for one in jobs for name, source in one.sources.items()}


def are_merged_alone(jobs: Sequence[Prepared]) -> bool:
    """Whether all that these jobs write is written by this process itself, without Ray. Of a source all bytes count."""
    writing = [one for one in jobs if one.written]
    read = sum(source.nbytes for source in sources_of(writing).values())
    written = sum(one.sources[point.base].nbytes for one in writing for point in one.written.values())
    small = all(config.merges_alone(one.settings, read + written) for one in writing)
    return small and not cluster.is_given()


def merge_together(jobs: Sequence[Prepared], cards: Mapping[WeightPoint, str], warm: Warm, alone: bool = False) -> None:
    """Writes what these jobs have promised in one pass over their sources, with the `cards` of the points; `alone`,
    this process does it itself, on this machine's cores."""
    from rvdist.merge.actor import WorkerSettings
    from rvdist.merge.driver import merge

    warm.cool()  # the workers need what engines of an earlier job hold
    first, settings = jobs[0], jobs[0].settings
    resources = cluster.own_cores() if alone else warm.resources()
    plan = common_plan(jobs)
    sources = sources_of(jobs) if any(one.arms for one in jobs) else _by_ranges(sources_of(jobs), plan)
    device = config.device(settings, resources.gpus)
    workers = sum(config.workers(settings, resources.counts, plan.bytes_written))
    with Bar("merge", plan.nbytes, first.job.log) as bar:
        stats = merge(
            plan,
            sources,
            cards,
            WorkerSettings(
                workers=workers,
                threads=settings.merge.threads,
                device=device,
                gpus=settings.merge.gpus_per_worker if device == "cuda" else 0.0,
                direct_io=settings.merge.direct_io,
                timeout=settings.cluster.timeout,
                silence=settings.merge.timeout,
                alone=alone,
                ready=standing.beside() if alone else "",
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
    for output in plan.outputs:
        for directory in output.directories:
            first.say(f"{'discarded' if discards(directory) else 'wrote'} {directory}")


def _by_ranges(sources: Mapping[str, Checkpoint], plan: Plan) -> dict[str, Checkpoint]:
    """Of a Hub file that the merge needs little of, only that is fetched; engines would need all of it."""
    opened = dict(sources)
    for name, source in sources.items():
        if source.hub:
            from rvdist.weights.checkpoint.hub import by_ranges

            opened[name] = by_ranges(source, plan.needed(name))
    return opened


def card(
    prepared: Prepared, point: WeightPoint, notes: Notes, name: str | None = None, results: Sequence[Result] = ()
) -> str:
    """The model card of a point: on disk without, on the Hub with the `name` of its repository and what was scored."""
    from rvdist.report.card.card import model_card

    return model_card(
        point,
        digest=prepared.digests.get(point),
        sources={
            source: str(prepared.sources[source].hub or prepared.sources[source].path) for source in point.sources()
        },
        dtype=(prepared.settings.output_format.dtype and prepared.settings.dtype) or "the target's own dtypes",
        notes=notes[point],
        versions=versions(),
        licences={source: licence_of(prepared.sources[source].path) for source in point.sources()},
        stacked={
            source: {str(path): licence_of(path) for path in stack.models}
            for source in point.sources()
            if isinstance(stack := prepared.sources[source], Stacked)
        },
        name=name,
        results=results,
    )


def save_vector(prepared: Prepared) -> None:
    """Stores what `vector.save` asks for, in this process: it needs neither a target nor a cluster."""
    from rvdist.weights.store import save

    assert prepared.saved is not None
    saved, vector = prepared.saved
    sources = dict(prepared.sources)
    nbytes = sources[bound(vector, sources).plus].nbytes  # an adapter's of what it replaces may be more
    with prepared.timing.phase("vector"), Bar("vector", nbytes, prepared.job.log) as bar:
        save(
            vector,
            prepared.sources,
            saved.directory,
            saved.storage,
            overwrite=prepared.settings.overwrite,
            key=owner_key(prepared.cache),
            digests=prepared.cache / "digests",
            progress=bar.advance,
            say=prepared.say,
        )
