"""What a command does, stage by stage: index → plan → merge → evaluate → report → publish. Each stage is a
call into its room.

The jobs of a command are run together: their merges as one plan, their arms on one warm fleet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from rvdist import __version__, cluster, config
from rvdist.batch import Batch, is_batch
from rvdist.checkpoint.artifact import DESCRIPTION
from rvdist.checkpoint.directory import read_json
from rvdist.config import Config
from rvdist.errors import BadInput, Failed
from rvdist.log import Log, LoggedTiming
from rvdist.merging import alike, card, merge_together, outputs, plan_of, save_vector, sources_of
from rvdist.point import Vector, name_of
from rvdist.preparation import Known, prepare, require_no_source
from rvdist.preview import print_plan
from rvdist.report.metadata import licence_of
from rvdist.run import Run, Scores, versions
from rvdist.timing import anonymous_bytes, seconds_since_process_start
from rvdist.warm import Warm


def run_stages(settings: Config, directory: Path, command: Sequence[str], log: Log | None = None) -> float | None:
    """Runs the stages of one job and writes its run directory. Returns the mean primary score, if any.

    Everything that can be refused is refused before anything is written, and what is wrong with keys, sources and tasks
    before Ray is waited for.
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
    known = Known()
    for run in runs:
        run.log.record("begin", run.command, directory=str(run.directory), version=__version__)
    _each([run for run in runs if is_batch(run.settings)], failed, lambda run: batches.update({run: Batch(run)}))
    jobs = [job for run in runs if run not in failed for job in (batches[run].merges if run in batches else [run])]
    jobs = _each(jobs, failed, lambda run: prepare(run, known))
    scorers = [scorer for batch in batches.values() for scorer in batch.scorers(failed)]
    jobs += _each(scorers, failed, lambda run: prepare(run, known))
    read = sources_of(jobs)
    jobs = _each(jobs, failed, lambda run: require_no_source(run, run.written, read))
    jobs = _show_plans(jobs, failed)
    jobs = [run for run in jobs if run.written or run.saved or run.arms or run.examined or run.published]
    jobs = _each(jobs, failed, lambda run: warm.begin(run.settings.cluster, run.timing) if _needs_ray(run) else None)
    if any(run.arms or run.reader for run in jobs):
        from rvdist.evaluation import Examination, objective
        from rvdist.racing import race

        examination = Examination(warm)
        jobs = _each(jobs, failed, lambda run: examination.join(run) if run.arms else None)
        jobs = _each(jobs, failed, lambda run: examination.join(run.reader) if run.reader else None)
        for batch in batches.values():
            batch.refuse(failed)
        jobs = [run for run in jobs if run not in failed]
    jobs = _each(jobs, failed, lambda run: _begin(run, warm, known))
    _tell_who_is_blind([run for run in jobs if _needs_ray(run)], warm)
    if any(run.examined for run in jobs):
        from rvdist.analysis import analyse
        from rvdist.connectivity import measure

        jobs = _each(jobs, failed, lambda run: analyse(run) if run.examined else None)
    jobs = _each(jobs, failed, lambda run: save_vector(run) if run.saved else None)
    for some in alike([run for run in jobs if run.written]):
        _together(some, failed, lambda some: merge_together(some, warm))
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
    jobs = _each(jobs, failed, lambda run: _publish(run, known) if run.published and not run.unscored else None)
    for run in jobs:
        run.timing.peak_anonymous_bytes["driver"] = anonymous_bytes()
        run.timing.write(run.directory / "timing.json")
    jobs = _each(jobs, failed, Run.require_scores)
    failed |= {run: _partly(run, error) for run, error in failed.items()}
    _each(list(batches), failed, lambda run: batches[run].conclude(failed))
    found = [failed.get(run) or (objective(run.scores) if run.scores else None) for run in runs]
    for run, ended in zip(runs, found, strict=True):
        _tell_end(run, ended)
    return found


def _partly(run: Run, error: Exception) -> Exception:
    """Bad input found after something was written, which was not all in vain."""
    if not run.kept or not isinstance(error, BadInput):
        return error
    return Failed(f"{error}; written before, and kept: {', '.join(map(str, run.kept))}")


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


def _show_plans(runs: Sequence[Run], failed: dict[Run, Exception]) -> list[Run]:
    """Prints one plan for all that are merged as one. Returns the runs that go on, with what they still write."""
    for some in alike([run for run in runs if "plan" in config.stages(run.settings)]):
        _together(some, failed, lambda some: print_plan(some[0], plan_of(some, outputs(some))))
    for run in runs:
        if "merge" not in config.stages(run.settings):
            run.written = {}
    return [run for run in runs if run not in failed]


def _needs_ray(run: Run) -> bool:
    return bool(run.written or run.arms or run.reader)


def _begin(run: Run, warm: Warm, known: Known) -> None:
    """Nothing is refused any more once Ray is there, with the devices that are asked for."""
    if _needs_ray(run):
        resources = warm.resources()
        if run.written:
            config.device(run.settings, resources.gpus)
    if run.directory not in known.begun:
        run.begin()
        known.begun.add(run.directory)


def _tell_who_is_blind(runs: Sequence[Run], warm: Warm) -> None:
    """Says so where run directories are not on a file system that all nodes share; those of one command are alike."""
    if runs and len(warm.resources().nodes) > 1 and (blind := cluster.blind_nodes(runs[0].configuration)):
        runs[0].note(
            f"{runs[0].directory.absolute()}: the run directory is written here and not seen on other nodes "
            f"({', '.join(blind)}); hydra.run.dir=DIRECTORY on a file system that all nodes share puts it there"
        )


def _vector_card(run: Run, vector: Vector, directory: Path, name: str) -> str:
    from rvdist.report.card import vector_card

    description = read_json(directory / DESCRIPTION)
    of = zip(description["donors"], vector.sources(), strict=True)
    licences = {part: licence_of(run.sources[source].path) for part, source in of}
    return vector_card(description, versions=versions(), licences=licences, name=name)


def _report(run: Run) -> None:
    if "report" not in config.stages(run.settings) or not (run.scores or run.anatomy):
        return
    from rvdist.report.findings import Anatomy, Exhibit, Findings, Making
    from rvdist.report.report import print_findings, write_report

    scores, reported = run.scores or Scores((), [], [], []), run.settings.reported
    findings = Findings(
        scores.arms, scores.rows, scores.records, scores.tasks, scores.groups, reported, scores.lacking, run.race
    )
    named = ", ".join(dict.fromkeys(row.task for row in findings.benchmarks))
    making = Making(
        title=f"{name_of(run.settings.target)}: {named or 'its vectors'}",
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


def _publish(run: Run, known: Known) -> None:
    from rvdist.checkpoint.hub import download_card
    from rvdist.publish import publish, results

    for source in run.sources.values():
        download_card(source)
    for directory, what in run.published.items():
        repository = known.repositories[directory]
        if isinstance(what, Vector):
            text = _vector_card(run, what, directory, repository)
        else:
            text = card(run, what, repository, results(run, what))
        publish(run, directory, repository, text)
