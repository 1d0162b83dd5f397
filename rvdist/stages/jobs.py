"""What a command does, stage by stage: index → plan → merge → analyze → evaluate → report → publish.

The jobs of a command are run together: their merges as one plan, their arms on one warm fleet. Each stage is a call
into its room, whose libraries are imported when the first job gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rvdist import __version__
from rvdist.core import cluster, config
from rvdist.core.config import Config
from rvdist.core.errors import BadInput, Failed, as_ours
from rvdist.core.log import Log, LoggedTiming
from rvdist.core.point import Vector, name_of
from rvdist.core.timing import anonymous_bytes, seconds_since_process_start
from rvdist.report.card.metadata import licence_of
from rvdist.stages.batch import Batch, is_batch
from rvdist.stages.job import Ended, Job, Notes, Prepared, versions
from rvdist.stages.merge import (
    are_merged_alone,
    card,
    common_plan,
    group_alike,
    merge_together,
    save_vector,
    sources_of,
)
from rvdist.stages.plan import print_evaluation, print_plan
from rvdist.stages.prepare import Known, prepare, require_no_source
from rvdist.stages.warm import Warm
from rvdist.weights.checkpoint.directory import read_json
from rvdist.weights.checkpoint.staging import discards
from rvdist.weights.checkpoint.stored_vector import DESCRIPTION

if TYPE_CHECKING:
    from rvdist.report.findings import Findings
    from rvdist.stages.analyze import Analysis
    from rvdist.stages.evaluate import Evaluator
    from rvdist.stages.score import Scoring

Group = list[Prepared]


def run_stages(
    settings: Config, directory: Path, command: Sequence[str], log: Log | None = None, outlived: bool = True
) -> float | None:
    """Runs the stages of one job and writes its run directory. Returns the mean primary score, if any. Not `outlived`,
    the process ends after it.

    Everything that can be refused is refused before anything is written, and what is wrong with keys, sources and tasks
    before Ray is waited for.
    """
    log = log or Log()
    log.as_json = settings.log == "json"
    timing = LoggedTiming(log)
    timing.add("imports", seconds_since_process_start())
    job = Job(settings, directory, " ".join(["python -m rvdist.launch", *command]), timing, log)
    with closing(Warm(outlived)) as warm:
        (ended,) = run_jobs([job], warm, last=True)
    if ended.error:
        raise ended.error
    if (directory / "timing.json").exists():
        timing.write(directory / "timing.json")
    return ended.objective


def run_jobs(jobs: Sequence[Job], warm: Warm, last: bool = False) -> list[Ended]:
    """Runs some jobs together, the `last` that need what is warm. Returns how each ended; one that fails leaves the
    others alone."""
    command = _Command(jobs, warm, last)
    command.prepare()
    for step in command.steps():
        command.take(step)
    return command.conclude()


@dataclass(frozen=True)
class Step:
    """The groups of jobs that take it together, and what a group does. Where a group fails, either half takes the step
    by itself, so that one job does not lose the others."""

    groups: Callable[[Group], Iterable[Group]]
    take: Callable[[Group], None]


def _each(takes_part: Callable[[Prepared], object], take: Callable[[Prepared], None]) -> Step:
    """A step that each job takes alone."""
    return Step(lambda jobs: [[one] for one in jobs if takes_part(one)], lambda group: take(group[0]))


class _Command:
    """The jobs of a command, and what its stages have found out of them so far. Every stage reads what stages before it
    returned, and nothing else."""

    def __init__(self, jobs: Sequence[Job], warm: Warm, last: bool) -> None:
        self._jobs, self._warm, self._last = jobs, warm, last
        self._known = Known()
        self._failed: dict[Job, Exception] = {}
        self._batches: dict[Job, Batch] = {}
        self._prepared: dict[Job, Prepared] = {}
        self._evaluator: Evaluator | None = None
        self._scorings: dict[Prepared, Scoring] = {}
        self._readings: dict[Prepared, Scoring] = {}
        self._analyses: dict[Prepared, Analysis] = {}
        self._kept: dict[Job, list[Path]] = {}

    def prepare(self) -> None:
        """Index and plan, of every job, and of every job that a batch stands for."""
        for job in self._jobs:
            job.log.record("begin", job.command, directory=str(job.directory), version=__version__)
        for job in self._jobs:
            self._try(job, lambda job: config.require_filled(job.settings))
            if job not in self._failed and is_batch(job.settings):
                job.log.gather(job.directory)
                self._try(job, lambda job: self._batches.update({job: Batch(job)}))
        of_batches = {job: batch.merges for job, batch in self._batches.items()}
        self._prepare([one for job in self._jobs for one in of_batches.get(job, [job])])
        self._prepare([scorer for batch in self._batches.values() for scorer in batch.scorers(self._failed)])

    def _prepare(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            if job not in self._failed:
                self._try(job, lambda job: self._prepared.update({job: prepare(job, self._known)}))

    def steps(self) -> list[Step]:
        """All steps, in their order; the imports of a stage are inside its step."""
        read = sources_of(list(self._prepared.values()))
        return [
            _each(lambda one: True, lambda one: require_no_source(one.settings, one.written, read)),
            Step(lambda jobs: group_alike([one for one in jobs if _in("plan", one)]), self._show_plan),
            _each(lambda one: one.foreseen, print_evaluation),
            _each(lambda one: not _in("merge", one), self._write_nothing),
            # Ray starts beside what is made ready to be asked; what can be refused is refused before anything begins.
            _each(self._needs_ray, lambda one: self._warm.begin(one.settings.cluster, one.timing, one.note)),
            _each(lambda one: one.arms, self._join),
            _each(lambda one: one.lines, self._join_reader),
            Step(lambda jobs: [jobs], self._refuse_batches),
            _each(_has_work, self._begin),
            Step(lambda jobs: [[one for one in jobs if self._needs_ray(one)]], self._tell_who_is_blind),
            _each(lambda one: one.examined, self._analyze),
            _each(lambda one: one.saved, self._save_vector),
            Step(lambda jobs: group_alike([one for one in jobs if one.written]), self._merge),
            _each(lambda one: one.lines, self._measure),
            Step(lambda jobs: [[one for one in jobs if one.arms and not _races(one)]], self._evaluate),
            _each(lambda one: one.arms and _races(one), self._race),
            Step(lambda jobs: [jobs], lambda jobs: self._warm.finish() if self._last else None),
            _each(_has_work, self._report),
            _each(lambda one: one.published and not self._lacks_scores(one), self._publish),
            _each(_has_work, self._write_timing),
            _each(lambda one: one in self._scorings, lambda one: self._scorings[one].require_scores()),
        ]

    def take(self, step: Step) -> None:
        """Takes a step with all jobs that have not failed."""
        for group in step.groups(self._unfailed()):
            self._take_together(step, group)

    def conclude(self) -> list[Ended]:
        """What became of every job."""
        for job, error in self._failed.items():
            self._failed[job] = self._with_kept(job, error)
        found = {one.job: scoring.findings for one, scoring in self._scorings.items() if scoring.findings}
        for job in self._batches:
            self._try(job, lambda job: self._batches[job].conclude(self._failed, self._prepared, found))
        return [self._end(job, found.get(job)) for job in self._jobs]

    def _unfailed(self) -> Group:
        return [one for job, one in self._prepared.items() if job not in self._failed]

    @cached_property
    def _merged_alone(self) -> bool:
        """Asked for when it is known what is written."""
        return are_merged_alone(self._unfailed())

    def _needs_ray(self, prepared: Prepared) -> bool:
        return bool(prepared.arms or prepared.lines or (prepared.written and not self._merged_alone))

    def _try(self, job: Job, take: Callable[[Job], object]) -> None:
        try:
            take(job)
        except Exception as error:
            self._failed[job] = as_ours(error)

    def _take_together(self, step: Step, group: Group) -> None:
        if len(group) == 1:
            self._try(group[0].job, lambda _: step.take(group))
        elif group:
            try:
                step.take(group)
            except Exception:
                self._take_together(step, group[: len(group) // 2])
                self._take_together(step, group[len(group) // 2 :])

    def _with_kept(self, job: Job, error: Exception) -> Exception:
        """Bad input found after something was written, which was not all in vain."""
        if job not in self._kept or not isinstance(error, BadInput):
            return error
        return Failed(f"{error}; written before, and kept: {', '.join(map(str, self._kept[job]))}")

    def _end(self, job: Job, findings: Findings | None) -> Ended:
        prepared, where = self._prepared.get(job), str(job.directory)
        ended = Ended(self._failed.get(job), findings, self._sentences(prepared) if prepared else ())
        if ended.error:
            sentence = f"failed: {type(ended.error).__name__}: {ended.error}"
            job.log.record("end", sentence, "error", directory=where)
        else:
            job.log.record("end", "done", directory=where, objective=ended.objective)
        return ended

    def _notes(self, prepared: Prepared) -> Notes:
        """What is to be known of each point of a job, as far as it was found out."""
        return self._scorings[prepared].notes if prepared in self._scorings else prepared.notes

    def _sentences(self, prepared: Prepared) -> tuple[str, ...]:
        """The same of all points, each once."""
        return tuple(dict.fromkeys(note for notes in self._notes(prepared).values() for note in notes))

    def _lacks_scores(self, prepared: Prepared) -> bool:
        return prepared in self._scorings and bool(self._scorings[prepared].unscored)

    def _show_plan(self, group: Group) -> None:
        """One plan for all that are merged as one."""
        plan = common_plan(group)
        if plan.outputs or not any(one.foreseen for one in group):
            print_plan(group[0], plan)

    def _write_nothing(self, prepared: Prepared) -> None:
        self._prepared[prepared.job] = replace(prepared, written={})

    def _join(self, prepared: Prepared) -> None:
        self._scorings[prepared] = self._evaluation().join(prepared)

    def _join_reader(self, prepared: Prepared) -> None:
        from rvdist.stages.connectivity import reader

        self._readings[prepared] = self._evaluation().join(reader(prepared))

    def _evaluation(self) -> Evaluator:
        from rvdist.stages.evaluate import Evaluator

        if self._evaluator is None:
            self._evaluator = Evaluator(self._warm)
        return self._evaluator

    def _refuse_batches(self, _: Group) -> None:
        for batch in self._batches.values():
            batch.refuse(self._failed)

    def _begin(self, prepared: Prepared) -> None:
        """Nothing is refused any more once Ray is there, with the devices that are asked for."""
        if self._needs_ray(prepared):
            resources = self._warm.resources()
            if prepared.written and not self._merged_alone:
                config.device(prepared.settings, resources.gpus)
        if prepared.directory not in self._known.begun:
            prepared.job.begin()
            self._known.begun.add(prepared.directory)

    def _tell_who_is_blind(self, group: Group) -> None:
        """Says so where run directories are not on a file system that all nodes share; those of one command are
        alike."""
        if len(self._warm.resources().nodes) > 1 and (blind := cluster.blind_nodes(group[0].job.configuration)):
            group[0].note(
                f"{group[0].directory.absolute()}: the run directory is written here and not seen on other nodes "
                f"({', '.join(blind)}); hydra.run.dir=DIRECTORY on a file system that all nodes share puts it there"
            )

    def _analyze(self, prepared: Prepared) -> None:
        from rvdist.stages.analyze import analyse

        self._analyses[prepared] = analyse(prepared)

    def _save_vector(self, prepared: Prepared) -> None:
        assert prepared.saved is not None
        save_vector(prepared)
        self._kept.setdefault(prepared.job, []).append(prepared.saved[0].directory)

    def _merge(self, group: Group) -> None:
        cards = {point: card(one, point, self._notes(one)) for one in group for point in one.written.values()}
        merge_together(group, cards, self._warm, self._merged_alone)
        for one in group:
            if kept := [directory for directory in one.written if not discards(directory)]:
                self._kept.setdefault(one.job, []).extend(kept)

    def _measure(self, prepared: Prepared) -> None:
        from rvdist.stages.connectivity import measure

        measured = measure(self._evaluation(), prepared, self._readings[prepared])
        self._analyses[prepared] = self._analyses[prepared].join(*measured)

    def _evaluate(self, group: Group) -> None:
        scored = [one for one in self._unfailed() if one.arms]
        self._evaluation().evaluate([self._scorings[one] for one in group], last=self._last and len(scored) == 1)

    def _race(self, prepared: Prepared) -> None:
        from rvdist.stages.race import race

        race(self._evaluation(), self._scorings[prepared])

    def _report(self, prepared: Prepared) -> None:
        scoring, analysis = self._scorings.get(prepared), self._analyses.get(prepared)
        findings = scoring.findings if scoring else None
        if not analysis and not (_in("report", prepared) and findings):
            return
        from rvdist.report.findings import Findings, Making
        from rvdist.report.report import print_findings, write_report
        from rvdist.stages.analyze import explain

        findings = findings or Findings((), [], [], [])
        anatomy = explain(prepared, analysis, findings) if analysis else None
        if not _in("report", prepared):
            return
        named = ", ".join(dict.fromkeys(row.task for row in findings.benchmarks))
        engine = {f"engine {key}": value for key, value in scoring.engine.items()} if scoring else {}
        making = Making(
            title=f"{name_of(prepared.settings.target)}: {named or 'its vectors'}",
            command=prepared.job.command,
            digests={arm.name: prepared.digests[arm.point] for arm in findings.arms},
            versions=versions() | engine | {"run": prepared.job.log.run},
            timing=prepared.timing.phases,
            notes=self._sentences(prepared),
        )
        with prepared.timing.phase("report"):
            print_findings(findings, prepared.job.console)
            write_report(prepared.directory, findings, making, anatomy)
        prepared.say(f"report: {prepared.directory / 'report.html'}")

    def _publish(self, prepared: Prepared) -> None:
        from rvdist.stages.publish import publish, results
        from rvdist.weights.checkpoint.hub import download_card

        for source in prepared.sources.values():
            download_card(source)
        findings = self._scorings[prepared].findings if prepared in self._scorings else None
        for directory, what in prepared.published.items():
            repository = self._known.repositories[directory]
            if isinstance(what, Vector):
                text = _vector_card(prepared, what, directory, repository)
            else:
                scored = results(prepared.directory, findings, prepared.digests.get(what))
                text = card(prepared, what, self._notes(prepared), repository, scored)
            publish(prepared.job, directory, repository, text)

    def _write_timing(self, prepared: Prepared) -> None:
        prepared.timing.peak_anonymous_bytes["driver"] = anonymous_bytes()
        prepared.timing.write(prepared.directory / "timing.json")


def _in(stage: str, prepared: Prepared) -> bool:
    return stage in config.stages(prepared.settings)


def _has_work(prepared: Prepared) -> bool:
    return bool(prepared.written or prepared.saved or prepared.arms or prepared.examined or prepared.published)


def _races(prepared: Prepared) -> bool:
    return prepared.settings.search.method is not None


def _vector_card(prepared: Prepared, vector: Vector, directory: Path, name: str) -> str:
    from rvdist.report.card.card import vector_card

    description = read_json(directory / DESCRIPTION)
    of = zip(description["donors"], vector.sources(), strict=True)
    licences = {part: licence_of(prepared.sources[source].path) for part, source in of}
    return vector_card(description, versions=versions(), licences=licences, name=name)
