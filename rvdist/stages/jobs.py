"""What a command does, stage by stage: index → plan → merge → analyze → evaluate → report → publish.

The jobs of a command are run together: their merges as one plan, their arms on one warm fleet. Each stage is a call
into its room, whose libraries are imported when the first job gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rvdist import __version__
from rvdist.core import cluster, config
from rvdist.core.config import Config
from rvdist.core.errors import BadInput, Failed
from rvdist.core.log import Log, LoggedTiming
from rvdist.core.point import Vector, name_of
from rvdist.core.timing import anonymous_bytes, seconds_since_process_start
from rvdist.report.card.metadata import licence_of
from rvdist.stages.batch import Batch, is_batch
from rvdist.stages.job import Ended, Job, Notes, Prepared, Scores, versions
from rvdist.stages.merge import alike, card, common_plan, merge_together, save_vector, sources_of
from rvdist.stages.plan import print_plan
from rvdist.stages.prepare import Known, prepare, require_no_source
from rvdist.stages.warm import Warm
from rvdist.weights.checkpoint.directory import read_json
from rvdist.weights.checkpoint.staging import discards
from rvdist.weights.checkpoint.stored_vector import DESCRIPTION

if TYPE_CHECKING:
    from rvdist.report.findings import Anatomy
    from rvdist.stages.evaluate import Evaluator
    from rvdist.stages.score import Scoring

Group = list[Prepared]


def run_stages(settings: Config, directory: Path, command: Sequence[str], log: Log | None = None) -> float | None:
    """Runs the stages of one job and writes its run directory. Returns the mean primary score, if any.

    Everything that can be refused is refused before anything is written, and what is wrong with keys, sources and tasks
    before Ray is waited for.
    """
    log = log or Log()
    log.as_json = config.logs_json(settings)
    timing = LoggedTiming(log)
    timing.add("imports", seconds_since_process_start())
    job = Job(settings, directory, " ".join(["python -m rvdist.launch", *command]), timing, log)
    with closing(Warm()) as warm:
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
    """A step of a stage: the groups of jobs that take it together, and what a group does. Where a group fails, either
    half takes the step by itself, so that one job does not lose the others."""

    stage: str
    groups: Callable[[Group], Iterable[Group]]
    take: Callable[[Group], None]


def _each(stage: str, takes_part: Callable[[Prepared], object], take: Callable[[Prepared], None]) -> Step:
    """A step that each job takes alone."""
    return Step(stage, lambda jobs: [[one] for one in jobs if takes_part(one)], lambda group: take(group[0]))


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
        self._anatomies: dict[Prepared, Anatomy] = {}
        self._kept: dict[Job, list[Path]] = {}

    def prepare(self) -> None:
        """Index and plan, of every job, and of every job that a batch stands for."""
        for job in self._jobs:
            job.log.record("begin", job.command, directory=str(job.directory), version=__version__)
        for job in self._jobs:
            if is_batch(job.settings):
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
            _each("plan", lambda one: True, lambda one: require_no_source(one.settings, one.written, read)),
            Step("plan", lambda jobs: alike([one for one in jobs if _in("plan", one)]), self._show_plan),
            _each("plan", lambda one: not _in("merge", one), self._write_nothing),
            _each("evaluate", _needs_ray, lambda one: self._warm.begin(one.settings.cluster, one.timing)),
            _each("evaluate", lambda one: one.arms, self._join),
            _each("analyze", lambda one: one.lines, self._join_reader),
            Step("evaluate", lambda jobs: [jobs], self._refuse_batches),
            _each("begin", _has_work, self._begin),
            Step("begin", lambda jobs: [[one for one in jobs if _needs_ray(one)]], self._tell_who_is_blind),
            _each("analyze", lambda one: one.examined, self._analyze),
            _each("merge", lambda one: one.saved, self._save_vector),
            Step("merge", lambda jobs: alike([one for one in jobs if one.written]), self._merge),
            _each("analyze", lambda one: one.lines, self._measure),
            Step("evaluate", lambda jobs: [[one for one in jobs if one.arms and not _races(one)]], self._evaluate),
            _each("evaluate", lambda one: one.arms and _races(one), self._race),
            Step("evaluate", lambda jobs: [jobs], lambda jobs: self._warm.finish() if self._last else None),
            _each("report", _has_work, self._report),
            _each("publish", lambda one: one.published and not self._unscored(one), self._publish),
            _each("end", _has_work, self._write_timing),
            _each("end", lambda one: one in self._scorings, lambda one: self._scorings[one].require_scores()),
        ]

    def take(self, step: Step) -> None:
        """Takes a step with all jobs that have not failed."""
        for group in step.groups(self._going()):
            self._take_together(step, group)

    def conclude(self) -> list[Ended]:
        """What became of every job."""
        for job, error in self._failed.items():
            self._failed[job] = self._with_kept(job, error)
        scores = {one.job: scoring.scores for one, scoring in self._scorings.items() if scoring.scores}
        for job in self._batches:
            self._try(job, lambda job: self._batches[job].conclude(self._failed, self._prepared, scores))
        return [self._end(job, scores.get(job)) for job in self._jobs]

    def _going(self) -> Group:
        return [one for job, one in self._prepared.items() if job not in self._failed]

    def _try(self, job: Job, take: Callable[[Job], object]) -> None:
        try:
            take(job)
        except Exception as error:
            self._failed[job] = error

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

    def _end(self, job: Job, scores: Scores | None) -> Ended:
        one, where = self._prepared.get(job), str(job.directory)
        notes = dict.fromkeys(note for notes in self._notes(one).values() for note in notes) if one else ()
        ended = Ended(self._failed.get(job), scores, tuple(notes))
        if ended.error:
            sentence = f"failed: {type(ended.error).__name__}: {ended.error}"
            job.log.record("end", sentence, "error", directory=where)
        else:
            job.log.record("end", "done", directory=where, objective=ended.objective)
        return ended

    def _notes(self, one: Prepared) -> Notes:
        """What is to be known of each point of a job, as far as it was found out."""
        return self._scorings[one].notes if one in self._scorings else one.notes

    def _unscored(self, one: Prepared) -> bool:
        return one in self._scorings and bool(self._scorings[one].unscored)

    def _show_plan(self, group: Group) -> None:
        """One plan for all that are merged as one."""
        print_plan(group[0], common_plan(group))

    def _write_nothing(self, one: Prepared) -> None:
        self._prepared[one.job] = replace(one, written={})

    def _join(self, one: Prepared) -> None:
        self._scorings[one] = self._evaluation().join(one)

    def _join_reader(self, one: Prepared) -> None:
        from rvdist.stages.connectivity import reader

        self._readings[one] = self._evaluation().join(reader(one))

    def _evaluation(self) -> Evaluator:
        from rvdist.stages.evaluate import Evaluator

        if self._evaluator is None:
            self._evaluator = Evaluator(self._warm)
        return self._evaluator

    def _refuse_batches(self, _: Group) -> None:
        for batch in self._batches.values():
            batch.refuse(self._failed)

    def _begin(self, one: Prepared) -> None:
        """Nothing is refused any more once Ray is there, with the devices that are asked for."""
        if _needs_ray(one):
            resources = self._warm.resources()
            if one.written:
                config.device(one.settings, resources.gpus)
        if one.directory not in self._known.begun:
            one.job.begin()
            self._known.begun.add(one.directory)

    def _tell_who_is_blind(self, group: Group) -> None:
        """Says so where run directories are not on a file system that all nodes share; those of one command are
        alike."""
        if len(self._warm.resources().nodes) > 1 and (blind := cluster.blind_nodes(group[0].job.configuration)):
            group[0].note(
                f"{group[0].directory.absolute()}: the run directory is written here and not seen on other nodes "
                f"({', '.join(blind)}); hydra.run.dir=DIRECTORY on a file system that all nodes share puts it there"
            )

    def _analyze(self, one: Prepared) -> None:
        from rvdist.stages.analyze import analyse

        self._anatomies[one] = analyse(one)

    def _save_vector(self, one: Prepared) -> None:
        assert one.saved is not None
        save_vector(one)
        self._kept.setdefault(one.job, []).append(one.saved[0].directory)

    def _merge(self, group: Group) -> None:
        cards = {point: card(one, point, self._notes(one)) for one in group for point in one.written.values()}
        merge_together(group, cards, self._warm)
        for one in group:
            if kept := [directory for directory in one.written if not discards(directory)]:
                self._kept.setdefault(one.job, []).extend(kept)

    def _measure(self, one: Prepared) -> None:
        from rvdist.stages.connectivity import measure

        before, found = self._anatomies[one], measure(self._evaluation(), one, self._readings[one])
        self._anatomies[one] = replace(
            before,
            sentences=[*before.sentences, *found.sentences],
            exhibits=[*before.exhibits, *found.exhibits],
        )

    def _evaluate(self, group: Group) -> None:
        scored = [one for one in self._going() if one.arms]
        self._evaluation().evaluate([self._scorings[one] for one in group], last=self._last and len(scored) == 1)

    def _race(self, one: Prepared) -> None:
        from rvdist.stages.race import race

        race(self._evaluation(), self._scorings[one])

    def _report(self, one: Prepared) -> None:
        scoring, anatomy = self._scorings.get(one), self._anatomies.get(one)
        scores = scoring.scores if scoring else None
        if not _in("report", one) or not (scores or anatomy):
            return
        from rvdist.report.findings import Findings, Making
        from rvdist.report.report import print_findings, write_report

        reported, race = one.settings.reported, scoring.race if scoring else None
        scores = scores or Scores((), [], [], [])
        findings = Findings(
            scores.arms, scores.rows, scores.records, scores.tasks, scores.groups, reported, scores.lacking, race
        )
        named = ", ".join(dict.fromkeys(row.task for row in findings.benchmarks))
        engine = scoring.engine if scoring else {}
        making = Making(
            title=f"{name_of(one.settings.target)}: {named or 'its vectors'}",
            command=one.job.command,
            digests={arm.name: one.digests[arm.point] for arm in scores.arms},
            versions=versions() | {f"engine {key}": value for key, value in engine.items()} | {"run": one.job.log.run},
            timing=one.timing.phases,
            notes=list(dict.fromkeys(note for notes in self._notes(one).values() for note in notes)),
        )
        with one.timing.phase("report"):
            print_findings(findings, one.job.console)
            write_report(one.directory, findings, making, anatomy)
        one.say(f"report: {one.directory / 'report.html'}")

    def _publish(self, one: Prepared) -> None:
        from rvdist.stages.publish import publish, results
        from rvdist.weights.checkpoint.hub import download_card

        for source in one.sources.values():
            download_card(source)
        scores = self._scorings[one].scores if one in self._scorings else None
        for directory, what in one.published.items():
            repository = self._known.repositories[directory]
            if isinstance(what, Vector):
                text = _vector_card(one, what, directory, repository)
            else:
                text = card(
                    one, what, self._notes(one), repository, results(one.directory, scores, one.digests.get(what))
                )
            publish(one.job, directory, repository, text)

    def _write_timing(self, one: Prepared) -> None:
        one.timing.peak_anonymous_bytes["driver"] = anonymous_bytes()
        one.timing.write(one.directory / "timing.json")


def _in(stage: str, one: Prepared) -> bool:
    return stage in config.stages(one.settings)


def _needs_ray(one: Prepared) -> bool:
    return bool(one.written or one.arms or one.lines)


def _has_work(one: Prepared) -> bool:
    return bool(one.written or one.saved or one.arms or one.examined or one.published)


def _races(one: Prepared) -> bool:
    return one.settings.search.method is not None


def _vector_card(one: Prepared, vector: Vector, directory: Path, name: str) -> str:
    from rvdist.report.card.card import vector_card

    description = read_json(directory / DESCRIPTION)
    of = zip(description["donors"], vector.sources(), strict=True)
    licences = {part: licence_of(one.sources[source].path) for part, source in of}
    return vector_card(description, versions=versions(), licences=licences, name=name)
