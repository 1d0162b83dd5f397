"""What a job's arms answered, scored and compared, in the files of its run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvdist.core.errors import Failed
from rvdist.core.point import Arm, WeightPoint
from rvdist.core.record import Record, TaskInfo, write_records
from rvdist.evaluate.answers import Answers, answers_of
from rvdist.evaluate.asking import Asking
from rvdist.evaluate.scorers import Scored, Scorers
from rvdist.evaluate.suite import Suite
from rvdist.report.summary import GroupInfo, write_summary
from rvdist.stages.job import Prepared

if TYPE_CHECKING:
    from rvdist.report.findings import Findings
    from rvdist.report.pictures.race import Runner

Known = dict[tuple[Arm, str, Asking], Future[Scored]]  # what lm-eval finds, by the point's digest


@dataclass(eq=False)
class Scoring:
    """What the evaluate stage knows of a job, more with every step: what each arm is asked, by its name; what the
    `engine` was; `notes` by point; arms that are `unscored`, and why, in sentences; in the end its `findings`, and the
    `runners` of the race where one chose among its arms. `places` are what sources are called where not every node has
    their files."""

    prepared: Prepared
    askings: dict[str, Asking]
    notes: dict[WeightPoint, tuple[str, ...]]
    slice_size: int
    engine: dict[str, str] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)
    findings: Findings | None = None
    runners: Sequence[Runner] = ()
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def arms(self) -> Sequence[Arm]:
        """The job's, the baseline first."""
        return self.prepared.arms

    @property
    def scored_arms(self) -> list[Arm]:
        """Those that have a score, or are still to get one."""
        return [arm for arm in self.arms if arm.name not in self.unscored]

    def locate(self, arm: Arm) -> WeightPoint:
        """The point with paths that hold wherever an engine runs."""
        own = {name: str(one.path.absolute()) for name, one in self.prepared.sources.items()}
        if arm.point.vocabulary:
            named = {name: Path(name).expanduser() for name in arm.point.vocabulary.places()}
            own = {name: str(path.absolute()) for name, path in named.items() if path.is_dir()} | own
        return arm.point.relocate(own | dict(self.places))

    def digest(self, arm: Arm) -> str:
        """That of the arm's point."""
        return self.prepared.digests[arm.point]

    def add_note(self, arm: Arm, sentence: str) -> None:
        """What whoever reads the arm's scores should know."""
        self.notes[arm.point] = (*self.notes.get(arm.point, ()), sentence)

    def note(self, arm: Arm, sentence: str) -> None:
        """Adds a note and says it at once."""
        self.add_note(arm, sentence)
        self.prepared.note(sentence)

    def leave_out(self, arm: Arm, reason: str) -> None:
        """This arm has no score."""
        if arm.name not in self.unscored:
            self.unscored[arm.name] = f"{arm.name} has no score: {reason}"
            self.note(arm, self.unscored[arm.name])

    def require_scores(self) -> None:
        """Raises Failed where an arm has none."""
        if self.unscored:
            others = "; all other arms are scored" if self.findings and self.findings.arms else ""
            raise Failed("; ".join(self.unscored.values()) + others)


def score_arm(scoring: Scoring, arm: Arm, asking: Asking, answered: Answers, scorers: Scorers | None = None) -> Scored:
    """lm-eval's results of one arm, and its records."""
    seed = scoring.prepared.settings.engine.seed
    answers, _ = answers_of(scoring.locate(arm), asking.requests, scoring.slice_size, answered)
    with scoring.prepared.timing.phase("score"):
        if scorers:
            return scorers.score(asking, arm, scoring.digest(arm), answers, seed)
        return asking.suite.score(arm, scoring.digest(arm), asking.tokenizer, asking.requests, answers, seed)


def score(scoring: Scoring, arms: Sequence[tuple[Arm, Asking, Answers]], known: Known) -> None:
    """Scores and compares what some arms of a job answered, the baseline first. What is `known` is not scored again."""
    from lm_eval.utils import handle_non_serializable

    from rvdist.report.findings import Findings
    from rvdist.report.statistics.compare import summarise

    directory = scoring.prepared.directory
    records: list[Record] = []
    reported: dict[Asking, dict[str, Any]] = {}
    truncated = 0
    with scoring.prepared.timing.phase("records"):
        for part in ("results", "samples"):
            (directory / part).mkdir(exist_ok=True)
        for arm, asking, answered in arms:
            truncated += answers_of(scoring.locate(arm), asking.requests, scoring.slice_size, answered)[1]
            known_scores = known.get((arm, scoring.digest(arm), asking))
            results, scored = known_scores.result() if known_scores else score_arm(scoring, arm, asking, answered)
            reported.setdefault(asking, results)
            text = json.dumps(results, indent=2, default=handle_non_serializable)
            (directory / "results" / f"{arm.name}.json").write_text(text)
            write_records(directory / "samples" / f"{arm.name}.jsonl", scored)
            records += scored
        first, asking, _ = arms[0]
        if truncated:
            scoring.add_note(first, f"{truncated} prompts did not fit and were cut from the left")
        tasks = asking.suite.infos([record for record in records if record.arm == first.name])
        for sentence in asking.suite.metrics_left_out(reported[asking], tasks):
            scoring.add_note(first, sentence)
        scored_arms = [arm for arm, _, _ in arms]
        groups = groups_of(asking.suite, tasks)
        baseline = None if scoring.arms[0].name in scoring.unscored else first.name
        margin = scoring.prepared.settings.benchmarks.margin / 100
        rows = summarise(scored_arms, records, tasks, baseline, groups, margin)
        write_summary(directory / "summary.json", rows)
        changes, lacking = scoring.prepared.settings.reported, asking.suite.lacking
        scoring.findings = Findings(scored_arms, rows, records, tasks, groups, changes, lacking, scoring.runners)


def groups_of(suite: Suite, tasks: Sequence[TaskInfo]) -> list[GroupInfo]:
    """The groups that lm-eval scores, by the metrics that it puts together and that their records have."""
    known = {task.name: task for task in tasks}
    infos = []
    for name, (group, members) in suite.groups.items():
        shared = [pair for pair in known[members[0]].metrics if all(pair in known[task].metrics for task in members)]
        together = {
            (metric, filtered): one
            for one in group.aggregate_metric_list
            for metric, filtered in shared
            if metric == one.metric and (one.filter_list is None or filtered in one.filter_list)
        }
        if together:
            counts = known[members[0]].primary[1]
            metrics = tuple(sorted((pair for pair in shared if pair in together), key=lambda pair: pair[1] != counts))
            by_size = {pair: bool(together[pair].weight_by_size) for pair in metrics}
            otherwise = tuple(pair for pair in metrics if by_size[pair] != by_size[metrics[0]])
            infos.append(GroupInfo(name, tuple(members), metrics, by_size[metrics[0]], otherwise))
    return infos
