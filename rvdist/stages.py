"""What a command does, stage by stage: index → plan → merge → evaluate → report. Each stage is a call into its room.

The jobs of a command are run together: their merges as one plan, their arms on one warm fleet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf

from rvdist import __version__, cluster, compat, config
from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.journal import MANIFEST, Manifest
from rvdist.checkpoint.source import open_source
from rvdist.checkpoint.staging import discards, require_free
from rvdist.config import Config
from rvdist.errors import BadInput
from rvdist.log import Log, LoggedTiming
from rvdist.merge.placement import rates, remember_rate
from rvdist.merge.plan import Plan, build_plan
from rvdist.point import Arm, Rename, Vector, WeightPoint
from rvdist.preview import print_plan
from rvdist.progress import Bar
from rvdist.run import Run, Scores, versions
from rvdist.timing import anonymous_bytes, seconds_since_process_start
from rvdist.warm import Warm

_CONFIG = "config.yaml"


def run_stages(settings: Config, directory: Path, command: Sequence[str], log: Log | None = None) -> float | None:
    """Runs the stages of one job and writes its run directory. Returns the mean primary score, if any.

    Everything that can be refused is refused before anything is written or Ray is waited for.
    """
    log = log or Log()
    log.as_json = config.logs_json(settings)
    timing = LoggedTiming(log)
    timing.add("imports", seconds_since_process_start())
    run = Run(settings, directory, " ".join(["python -m rvdist.launch", *command]), timing, log)
    with closing(Warm()) as warm:
        (found,) = run_jobs([run], warm, last=True)
    if isinstance(found, Exception):
        raise found
    if (directory / "timing.json").exists():
        timing.write(directory / "timing.json")
    return found


def run_jobs(runs: Sequence[Run], warm: Warm, last: bool = False) -> list[float | Exception | None]:
    """Runs some jobs together, the `last` that need what is warm. Returns the mean primary score of each, None where
    nothing is scored, or what it failed of; that leaves the others alone."""
    failed: dict[Run, Exception] = {}
    promised: dict[Path, WeightPoint] = {}
    for run in runs:
        run.log.record("begin", run.command, directory=str(run.directory), version=__version__)
    jobs = _each(runs, failed, lambda run: _prepare(run, promised))
    jobs = [run for run in jobs if run.written or run.arms or run.examined]
    jobs = _each(jobs, failed, lambda run: warm.begin(run.settings.cluster, run.timing) if _needs_ray(run) else None)
    if any(run.arms or run.reader for run in jobs):
        from rvdist.evaluation import Examination, objective
        from rvdist.racing import race

        examination = Examination(warm)
        jobs = _each(jobs, failed, lambda run: examination.join(run) if run.arms else None)
        jobs = _each(jobs, failed, lambda run: examination.join(run.reader) if run.reader else None)
    jobs = _each(jobs, failed, lambda run: _begin(run, warm))
    _tell_who_is_blind([run for run in jobs if _needs_ray(run)], warm)
    if any(run.examined for run in jobs):
        from rvdist.analysis import analyse
        from rvdist.connectivity import measure

        jobs = _each(jobs, failed, lambda run: analyse(run) if run.examined else None)
    for alike in _alike([run for run in jobs if run.written]):
        _together(alike, failed, lambda some: _merge(some, warm))
    jobs = [run for run in jobs if run not in failed]
    if any(run.reader for run in jobs):
        jobs = _each(jobs, failed, lambda run: measure(examination, run) if run.reader else None)
    if scored := [run for run in jobs if run.arms]:
        racing = [run for run in scored if run.settings.search.method]
        _together([run for run in scored if run not in racing], failed, examination.evaluate)
        _each(racing, failed, partial(race, examination))
    if last:
        warm.finish()
    jobs = _each(jobs, failed, _report)
    for run in jobs:
        run.timing.peak_anonymous_bytes["driver"] = anonymous_bytes()
        run.timing.write(run.directory / "timing.json")
    found = [failed.get(run) or (objective(run.scores) if run.scores else None) for run in runs]
    for run, ended in zip(runs, found, strict=True):
        _tell_end(run, ended)
    return found


def _tell_end(run: Run, found: float | Exception | None) -> None:
    where = str(run.directory)
    if isinstance(found, Exception):
        run.log.record("end", f"failed: {type(found).__name__}: {found}", "error", directory=where)
    else:
        run.log.record("end", "done", directory=where, objective=found)


def _each(runs: Sequence[Run], failed: dict[Run, Exception], step: Callable[[Run], None]) -> list[Run]:
    """Takes a step with each; the others are `failed`. Returns those that go on."""
    for run in runs:
        try:
            step(run)
        except Exception as error:
            failed[run] = error
    return [run for run in runs if run not in failed]


def _together(runs: Sequence[Run], failed: dict[Run, Exception], step: Callable[[Sequence[Run]], None]) -> None:
    """Takes a step with all of them at once; where that fails, with each alone, so that one does not lose the
    others."""
    try:
        if runs:
            step(runs)
    except Exception as error:
        if len(runs) == 1:
            failed[runs[0]] = error
        else:
            for run in runs:
                _together([run], failed, step)


def _prepare(run: Run, promised: dict[Path, WeightPoint]) -> None:
    """Index and plan. What other jobs have `promised` to write is not written again."""
    settings = run.settings
    stages = config.stages(settings)
    merges = (settings.output or settings.batch) and {"plan", "merge"} & set(stages)
    written = run.written or (config.outputs(settings) if merges else {})
    arms = run.arms or (config.arms(settings) if "evaluate" in stages else [])
    saved = config.saved(settings)
    examined = config.examined(settings) if "analyze" in stages else {}
    lines = config.lines(settings) if examined and settings.analyze.text else {}
    if stages != ["plan"]:
        _require_kept(run, written, saved)
    with run.timing.phase("index"):
        vector = _index_vector(run, saved, written) if saved and "merge" in stages else None
        on_lines = [arm.point for line in lines.values() for arm in line]
        _index(run, [*written.values(), *(arm.point for arm in arms), *examined.values(), *on_lines])
        written = {output: compat.settle(point, run.sources) for output, point in written.items()}
        run.examined = {name: compat.settle(point, run.sources) for name, point in examined.items()}
        run.arms = [_settled(run, arm) for arm in arms]
        used = {source for point in run.notes for source in point.sources()} | set(vector.sources() if vector else ())
        run.sources = {name: source for name, source in run.sources.items() if name in used}
    with run.timing.phase("plan"):
        config.require_resources(settings)
        plan = _plan([run], written)
        if complete := _complete(run, plan) | _promised_already(written, promised):
            written = {output: point for output, point in written.items() if output not in complete}
            plan = _plan([run], written)
        for output in {output for output in written if not discards(output)}:
            _require_no_source(run, output)
            require_free(output, settings.overwrite)
    if "plan" in stages:
        print_plan(run, plan)
    if saved and vector:
        _save_vector(run, saved, vector)
    if run.arms or lines:
        with run.timing.phase("digest"):
            _digest(run)
    if lines:
        from rvdist.connectivity import reader

        run.reader = reader(run, {name: [_settled(run, arm) for arm in line] for name, line in lines.items()})
    if "merge" in stages:
        run.written = written
        promised |= written


def _settled(run: Run, arm: Arm) -> Arm:
    return replace(arm, point=compat.settle(arm.point, run.sources))


def _needs_ray(run: Run) -> bool:
    return bool(run.written or run.arms or run.reader)


def _begin(run: Run, warm: Warm) -> None:
    """Nothing is refused any more, and Ray is there."""
    if _needs_ray(run):
        warm.resources()
    _write_config(run)


def _tell_who_is_blind(runs: Sequence[Run], warm: Warm) -> None:
    """Says so where run directories are not on a file system that all nodes share; those of one command are alike."""
    if runs and len(warm.resources().nodes) > 1 and (blind := cluster.blind_nodes(runs[0].directory / _CONFIG)):
        runs[0].note(
            f"{runs[0].directory.absolute()}: the run directory is written here and not seen on other nodes "
            f"({', '.join(blind)}); hydra.run.dir=DIRECTORY on a file system that all nodes share puts it there"
        )


def _require_kept(run: Run, outputs: Collection[Path], saved: config.Saved | None) -> None:
    """Nothing is written where Ray deletes it."""
    places = [("output", output) for output in outputs] + ([("vector.save", saved.directory)] if saved else [])
    for key, path in [*places, ("hydra.run.dir (with -m hydra.sweep.dir)", run.directory)]:
        if cluster.is_temporary(path):
            raise BadInput(
                f"{key}: {path} is in the working directory of a Ray job and deleted with it; give an absolute path"
            )


def _promised_already(written: Mapping[Path, WeightPoint], promised: Mapping[Path, WeightPoint]) -> set[Path]:
    shared = {output for output in written if output in promised and not discards(output)}
    for output in shared:
        if written[output] != promised[output]:
            raise BadInput(f"output: several jobs would write {output}; put {{alpha}} or {{target}} into it")
    return shared


def _index(run: Run, points: Sequence[WeightPoint]) -> None:
    renames: dict[str, Rename] = {}
    for point in dict.fromkeys(points):
        for source, rename in point.renames():
            if renames.setdefault(source, rename) != rename:
                raise BadInput(
                    f"vector.rename: {source} is a source both with it and without, or with another; give one of them "
                    "another path, such as a symbolic link"
                )
            if source not in run.sources:
                run.sources[source] = open_source(source, rename)
        report = compat.check(point, run.sources, run.settings.compat.force, config.keeps_extra_rows(run.settings))
        run.notes[compat.settle(point, run.sources)] = (*report.refusals, *report.exceptions)
    for note in dict.fromkeys(note for notes in run.notes.values() for note in notes):
        run.note(note)


def _index_vector(run: Run, saved: config.Saved, outputs: Collection[Path]) -> Vector:
    """The vector to be stored, named by what it is computed from."""
    if saved.directory in outputs:
        raise BadInput(f"vector.save: {saved.directory} is an output of the merge too; choose another directory")
    run.sources |= {source: open_source(source, saved.vector.rename) for source in saved.vector.sources()}
    for note in compat.check_vector(saved.vector, run.sources):
        run.note(note)
    return compat.settle_vector(saved.vector, run.sources)


def _save_vector(run: Run, saved: config.Saved, vector: Vector) -> None:
    from rvdist.vector import Storage, save

    _require_no_source(run, saved.directory)
    max_shard_size = config.size(run.settings.max_shard_size, "max_shard_size")
    nbytes = sum(spec.nbytes for spec in run.sources[vector.plus].tensors.values())
    with run.timing.phase("vector"), Bar("vector", nbytes, run.log) as bar:
        save(
            vector,
            run.sources,
            saved.directory,
            Storage(saved.dtype, saved.rank, saved.density, max_shard_size),
            overwrite=run.settings.overwrite,
            digests=run.cache / "digests",
            progress=bar.advance,
            say=run.say,
        )
    _write_config(run)
    run.timing.peak_anonymous_bytes["driver"] = anonymous_bytes()
    run.timing.write(run.directory / "timing.json")


def _digest(run: Run) -> None:
    """Names every point by what it is made of; reads all sources once and remembers."""
    from rvdist.checkpoint.digest import checkpoint_digest

    contents = {name: checkpoint_digest(source, run.cache / "digests") for name, source in run.sources.items()}
    run.digests |= {point: point.digest(contents) for point in run.notes}


def _plan(runs: Sequence[Run], written: Mapping[Path, WeightPoint]) -> Plan:
    """One plan for runs that agree in how outputs are stored."""
    settings = runs[0].settings
    max_shard_size = config.size(settings.max_shard_size, "max_shard_size")
    return build_plan(written, _sources(runs), config.output_dtype(settings), max_shard_size)


def _sources(runs: Sequence[Run]) -> dict[str, Checkpoint]:
    return {name: source for run in runs for name, source in run.sources.items()}


def _complete(run: Run, plan: Plan) -> set[Path]:
    """The outputs that an earlier run of the same plan has finished; overwriting does them again."""
    found = set()
    for output, digests in zip(plan.outputs, plan.digests, strict=True):
        for directory, digest in zip(output.directories, digests, strict=True):
            manifest = directory / MANIFEST
            if not run.settings.overwrite and manifest.exists() and Manifest.read(directory).plan == digest:
                run.say(f"{directory}: already complete")
                found.add(directory)
    return found


def _require_no_source(run: Run, output: Path) -> None:
    """Overwriting must never replace what is being read."""
    for name, source in run.sources.items():
        path = source.path.resolve()
        if run.settings.overwrite and output.resolve() in (path, *path.parents):
            raise BadInput(
                f"output: {output} is or holds the source {name}, which would be lost; choose another output"
            )


def _alike(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs by what must be equal for their merges to be one plan."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = run.settings
        merge = asdict(settings.merge) | dict.fromkeys(("method", "density", "seed"))  # these are the points' own
        stored = (settings.dtype, settings.max_shard_size, settings.overwrite, settings.allow_nonfinite)
        renamed = [pair for point in run.written.values() for pair in point.renames() if pair[1]]
        found.setdefault(json.dumps([merge, settings.device, stored, renamed]), []).append(run)
    return list(found.values())


def _merge(runs: Sequence[Run], warm: Warm) -> None:
    """Writes what these runs have promised in one pass over their sources."""
    from rvdist.merge.crew import WorkerSettings
    from rvdist.merge.engine import merge

    warm.cool()  # the workers need what engines of an earlier job hold
    first, settings, resources = runs[0], runs[0].settings, warm.resources()
    owners = {point: run for run in runs for point in run.written.values()}
    plan = _plan(runs, {output: point for run in runs for output, point in run.written.items()})
    sources = _sources(runs) if any(run.arms for run in runs) else _by_ranges(_sources(runs), plan)
    device = config.device(settings, resources.gpus)
    workers = sum(config.workers(settings, resources.counts))
    with Bar("merge", plan.bytes_written, first.log) as bar:
        stats = merge(
            plan,
            sources,
            lambda point: _card(owners[point], point),
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
    found = dict(sources)
    for name, source in sources.items():
        if source.hub:
            from rvdist.checkpoint.hub import by_ranges

            found[name] = by_ranges(source, plan.needed(name))
    return found


def _card(run: Run, point: WeightPoint) -> str:
    from rvdist.report.card import model_card

    return model_card(
        point,
        digest=run.digests.get(point),
        sources={source: str(run.sources[source].hub or run.sources[source].path) for source in point.sources()},
        dtype=run.settings.dtype or "the target's own dtypes",
        notes=run.notes[point],
        versions=versions(),
    )


def _write_config(run: Run) -> None:
    run.log.keep(run.directory)
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / _CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.structured(run.settings)))


def _report(run: Run) -> None:
    if "report" not in config.stages(run.settings) or not (run.scores or run.anatomy):
        return
    from rvdist.report.findings import Anatomy, Exhibit, Findings, Making
    from rvdist.report.report import print_findings, write_report

    scores, reported = run.scores or Scores((), [], [], []), run.settings.reported
    findings = Findings(scores.arms, scores.rows, scores.records, scores.tasks, scores.groups, reported, scores.lacking)
    named = ", ".join(dict.fromkeys(row.task for row in findings.benchmarks))
    making = Making(
        title=f"{Path(run.settings.target).name}: {named or 'its vectors'}",
        command=run.command,
        digests={arm.name: run.digests[arm.point] for arm in scores.arms},
        versions=versions() | {f"engine {key}": value for key, value in run.engine.items()} | {"run": run.log.run},
        timing=run.timing.phases,
        notes=list(dict.fromkeys(note for notes in run.notes.values() for note in notes)),
    )
    anatomy = Anatomy(run.anatomy, [Exhibit(name, picture) for name, picture in run.figures.items()], run.tables)
    with run.timing.phase("report"):
        print_findings(findings, run.console)
        write_report(run.directory, findings, making, anatomy)
    run.say(f"report: {run.directory / 'report.html'}")
