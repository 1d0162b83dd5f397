"""What a command does, stage by stage: index → plan → merge → evaluate → report → publish. Each stage is a
call into its room.

The jobs of a command are run together: their merges as one plan, their arms on one warm fleet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

from omegaconf import OmegaConf

from rvdist import __version__, cluster, compat, config
from rvdist.batch import Batch, is_batch
from rvdist.checkpoint.artifact import DESCRIPTION
from rvdist.checkpoint.directory import Checkpoint, read_json
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
from rvdist.recipe import read_recipe
from rvdist.report.metadata import Result, licence_of
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
    batches: dict[Run, Batch] = {}
    known = _Known()
    for run in runs:
        run.log.record("begin", run.command, directory=str(run.directory), version=__version__)
    _each([run for run in runs if is_batch(run.settings)], failed, lambda run: batches.update({run: Batch(run)}))
    jobs = [job for run in runs if run not in failed for job in (batches[run].merges if run in batches else [run])]
    jobs = _each(jobs, failed, lambda run: _prepare(run, known))
    scorers = [scorer for batch in batches.values() for scorer in batch.scorers(failed)]
    jobs += _each(scorers, failed, lambda run: _prepare(run, known))
    read = _sources(jobs)
    jobs = _each(jobs, failed, lambda run: _require_no_source(run, run.written, read))
    jobs = _show_plans(jobs, failed)
    jobs = [run for run in jobs if run.written or run.arms or run.examined or run.published]
    jobs = _each(jobs, failed, lambda run: warm.begin(run.settings.cluster, run.timing) if _needs_ray(run) else None)
    if any(run.arms or run.reader for run in jobs):
        from rvdist.evaluation import Examination, objective
        from rvdist.racing import race

        examination = Examination(warm)
        jobs = _each(jobs, failed, lambda run: examination.join(run) if run.arms else None)
        jobs = _each(jobs, failed, lambda run: examination.join(run.reader) if run.reader else None)
    jobs = _each(jobs, failed, lambda run: _begin(run, warm, known))
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
        examine = partial(examination.evaluate, last=last and len(scored) == 1)
        _together([run for run in scored if run not in racing], failed, examine)
        _each(racing, failed, partial(race, examination))
    if last:
        warm.finish()
    jobs = _each(jobs, failed, _report)
    jobs = _each(jobs, failed, lambda run: _publish(run, known) if run.published else None)
    for run in jobs:
        run.timing.peak_anonymous_bytes["driver"] = anonymous_bytes()
        run.timing.write(run.directory / "timing.json")
    _each(list(batches), failed, lambda run: batches[run].conclude(failed))
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


@dataclass
class _Known:
    """What the jobs of a command find out or do once for all of them: who writes what, run directories that are begun
    and notes told of them, sources by name and renaming, and whether a point's vectors may be applied, whatever α."""

    promised: dict[Path, WeightPoint] = field(default_factory=dict)
    repositories: dict[Path, str] = field(default_factory=dict)
    begun: set[Path] = field(default_factory=set)
    told: set[tuple[Path, str]] = field(default_factory=set)
    _opened: dict[tuple[str, Rename], Checkpoint] = field(default_factory=dict)
    _reports: dict[tuple[WeightPoint, bool, bool], compat.Compatibility] = field(default_factory=dict)

    def open(self, source: str, rename: Rename = ()) -> Checkpoint:
        if (source, rename) not in self._opened:
            self._opened[source, rename] = open_source(source, rename)
        return self._opened[source, rename]

    def check(self, run: Run, point: WeightPoint) -> compat.Compatibility:
        """Raises BadInput where the point must not be computed."""
        settings = run.settings
        line = WeightPoint(point.base, tuple(replace(term, alpha=1.0) for term in point.terms))
        key = (line, settings.compat.force, config.keeps_extra_rows(settings))
        if key not in self._reports:
            self._reports[key] = compat.check(line, run.sources, *key[1:])
        return self._reports[key]


def _each(runs: Sequence[Run], failed: dict[Run, Exception], step: Callable[[Run], None]) -> list[Run]:
    """Takes a step with each; the others are `failed`. Returns those that go on."""
    for run in runs:
        try:
            step(run)
        except Exception as error:
            failed[run] = error
    return [run for run in runs if run not in failed]


def _together(runs: Sequence[Run], failed: dict[Run, Exception], step: Callable[[Sequence[Run]], None]) -> None:
    """Takes a step with all of them at once; where that fails, with either half, so that one does not lose the
    others."""
    try:
        if runs:
            step(runs)
    except Exception as error:
        if len(runs) == 1:
            failed[runs[0]] = error
        else:
            _together(runs[: len(runs) // 2], failed, step)
            _together(runs[len(runs) // 2 :], failed, step)


def _prepare(run: Run, known: _Known) -> None:
    """Index and plan. What other jobs have promised to write is not written again."""
    recipe = _recipe(run, run.settings.recipe, known) if run.settings.recipe else None
    settings = run.settings
    stages = config.stages(settings)
    merges = settings.output and {"plan", "merge"} & set(stages)
    written = run.written or (config.outputs(settings, recipe) if merges else {})
    arms = run.arms or (config.arms(settings, recipe) if "evaluate" in stages else [])
    saved = config.saved(settings)
    examined = config.examined(settings) if "analyze" in stages else {}
    lines = config.lines(settings) if examined and settings.analyze.text else {}
    if stages != ["plan"]:
        _require_kept(run, written, saved)
    if "publish" in stages:
        from rvdist.publish import require

        repositories = config.published(settings, recipe)
        require(run, repositories, known.repositories)
        known.repositories |= repositories
    with run.timing.phase("index"):
        vector = _index_vector(run, saved, written) if saved and "merge" in stages else None
        on_lines = [arm.point for line in lines.values() for arm in line]
        _index(run, [*written.values(), *(arm.point for arm in arms), *examined.values(), *on_lines], known)
        written = {output: compat.settle(point, run.sources) for output, point in written.items()}
        if "publish" in stages:
            run.published = written | ({saved.directory: vector} if saved and vector else {})
        run.examined = {name: compat.settle(point, run.sources) for name, point in examined.items()}
        run.arms = [_settled(run, arm) for arm in arms]
        used = {source for point in run.notes for source in point.sources()} | set(vector.sources() if vector else ())
        run.sources = {name: source for name, source in run.sources.items() if name in used}
    with run.timing.phase("plan"):
        config.require_resources(settings)
        plan = _plan([run], written)
        if complete := _complete(run, plan) | _promised_already(written, known.promised):
            written = {output: point for output, point in written.items() if output not in complete}
            plan = _plan([run], written)
        _require_no_source(run, written, run.sources)
        for output in {output for output in written if not discards(output)}:
            require_free(output, settings.overwrite)
            _require_place(output)
    if saved and vector:
        _save_vector(run, saved, vector)
    if run.arms or lines:
        with run.timing.phase("digest"):
            _digest(run)
    if lines:
        from rvdist.connectivity import reader

        run.reader = reader(run, {name: [_settled(run, arm) for arm in line] for name, line in lines.items()})
    run.written = written
    if "merge" in stages:
        known.promised |= written


def _recipe(run: Run, file: str, known: _Known) -> WeightPoint:
    """What a mergekit recipe asks for; its base is the target, its dtype that of the output if `dtype` is not set."""
    run.asked = settings = run.settings
    config.require_recipe_alone(settings)
    found = read_recipe(Path(file).expanduser(), lambda base: known.open(base).tensors, settings.merge.seed)
    run.settings = replace(settings, target=found.point.base, dtype=settings.dtype or found.dtype)
    return found.point


def _show_plans(runs: Sequence[Run], failed: dict[Run, Exception]) -> list[Run]:
    """Prints one plan for all that are merged as one. Returns the runs that go on, with what they still write."""
    for alike in _alike([run for run in runs if "plan" in config.stages(run.settings)]):
        _together(alike, failed, lambda some: print_plan(some[0], _plan(some, _outputs(some))))
    for run in runs:
        if "merge" not in config.stages(run.settings):
            run.written = {}
    return [run for run in runs if run not in failed]


def _settled(run: Run, arm: Arm) -> Arm:
    return replace(arm, point=compat.settle(arm.point, run.sources))


def _needs_ray(run: Run) -> bool:
    return bool(run.written or run.arms or run.reader)


def _begin(run: Run, warm: Warm, known: _Known) -> None:
    """Nothing is refused any more, and Ray is there."""
    if _needs_ray(run):
        warm.resources()
    if run.directory not in known.begun:
        _write_config(run)
        known.begun.add(run.directory)


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
            raise BadInput(f"output: several jobs would write {output}; put {config.PLACEHOLDERS} into it")
    return shared


def _index(run: Run, points: Sequence[WeightPoint], known: _Known) -> None:
    renames: dict[str, Rename] = {}
    for point in dict.fromkeys(points):
        for source, rename in point.renames():
            if renames.setdefault(source, rename) != rename:
                raise BadInput(
                    f"vector.rename: {source} is a source both with it and without, or with another; give one of them "
                    "another path, such as a symbolic link"
                )
            if source not in run.sources:
                run.sources[source] = known.open(source, rename)
        report = known.check(run, point)
        run.notes[compat.settle(point, run.sources)] = (*report.refusals, *report.exceptions)
    for note in dict.fromkeys(note for notes in run.notes.values() for note in notes):
        if (run.directory, note) not in known.told:
            run.note(note)
            known.told.add((run.directory, note))


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

    _require_no_source(run, [saved.directory], run.sources)
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


def _outputs(runs: Sequence[Run]) -> dict[Path, WeightPoint]:
    """What all of them write, each to a place of its own, also where nothing is kept."""
    found: dict[Path, WeightPoint] = {}
    for output, point in (pair for run in runs for pair in run.written.items()):
        found[output / str(len(found)) if output in found and discards(output) else output] = point
    return found


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


def _require_no_source(run: Run, outputs: Collection[Path], sources: Mapping[str, Checkpoint]) -> None:
    """Overwriting must never replace what is being read, be it by another job."""
    for (name, source), output in product(sources.items(), outputs if run.settings.overwrite else ()):
        path = source.path.resolve()
        if output.resolve() in (path, *path.parents):
            raise BadInput(
                f"output: {output} is or holds the source {name}, which would be lost; choose another output"
            )


def _require_place(output: Path) -> None:
    """Raises BadInput where no directory can be made, which would be found only when all outputs are begun."""
    above = next(path for path in output.parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(
            f"{output}: cannot be created, since {above} is no directory that we may write to; choose another"
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
    plan = _plan(runs, _outputs(runs))
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


def _card(run: Run, point: WeightPoint, name: str | None = None, results: Sequence[Result] = ()) -> str:
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


def _vector_card(run: Run, vector: Vector, directory: Path, name: str) -> str:
    from rvdist.report.card import vector_card

    description = read_json(directory / DESCRIPTION)
    of = zip(description["donors"], vector.sources(), strict=True)
    licences = {part: licence_of(run.sources[source].path) for part, source in of}
    return vector_card(description, versions=versions(), licences=licences, name=name)


def _write_config(run: Run) -> None:
    run.directory.mkdir(parents=True, exist_ok=True)
    run.log.keep(run.directory)
    (run.directory / _CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.structured(run.asked or run.settings)))


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


def _publish(run: Run, known: _Known) -> None:
    from rvdist.checkpoint.hub import download_card
    from rvdist.publish import publish, results

    for source in run.sources.values():
        download_card(source)
    for directory, what in run.published.items():
        repository = known.repositories[directory]
        if isinstance(what, Vector):
            card = _vector_card(run, what, directory, repository)
        else:
            card = _card(run, what, repository, results(run, what))
        publish(run, directory, repository, card)
