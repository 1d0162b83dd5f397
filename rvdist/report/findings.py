"""What a report is made from: scores, what follows from them, how they were made, and what else is shown.

Knows records and rows; nothing of files, terminals or pages. What follows is computed once, when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rvdist.core.point import Arm
from rvdist.core.record import Record, TaskInfo
from rvdist.report.claims import (
    claims,
    cut_sentences,
    empty_sentences,
    equivalence_sentences,
    footnotes,
    format_sentences,
    limit_sentences,
    persistence_claims,
)
from rvdist.report.page.samples import empty_answers
from rvdist.report.paper import Line, Reported, paper_lines
from rvdist.report.pictures.race import Runner
from rvdist.report.statistics.compare import FormatGain, detectable_effects, format_gains
from rvdist.report.statistics.robustness import Edited, robustness
from rvdist.report.statistics.seeds import Spread, seed_spread
from rvdist.report.statistics.sweep import Sweep, limits, sweeps
from rvdist.report.summary import LEVEL, GroupInfo, Outline, Row, baseline_of, dissenting_rows
from rvdist.report.wording import Scale


@dataclass(frozen=True)
class Findings:
    """`rows` are those of `summarise` of the same arms, records, tasks and groups. `reported` are changes that somebody
    else found, in points, by benchmark and arm; `lacking` says of tasks why they could not be asked. `runners` are
    those of the race that chose the arms, if one did."""

    arms: Sequence[Arm]
    rows: Sequence[Row]
    records: Sequence[Record]
    tasks: Sequence[TaskInfo]
    groups: Sequence[GroupInfo] = ()
    reported: Reported = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    runners: Sequence[Runner] = ()

    @cached_property
    def outline(self) -> Outline:
        """Which of the tasks are benchmarks, groups and members."""
        return Outline([task.name for task in self.tasks], self.groups)

    @cached_property
    def baseline(self) -> str | None:
        """The arm that the others are compared with, None without one."""
        return baseline_of(self.rows)

    @cached_property
    def benchmarks(self) -> list[Row]:
        """The rows of the main table."""
        return self.outline.benchmarks(self.rows)

    @property
    def objective(self) -> float | None:
        """What a sweeper maximises: the mean score over benchmarks (less it where less is better), of the arms other
        than the baseline if any. A group is one benchmark; edited questions are none."""
        rows = [row for row in self.benchmarks if row.delta is not None] or self.benchmarks
        return sum(row.value if row.higher_is_better else -row.value for row in rows) / len(rows) if rows else None

    @cached_property
    def members(self) -> list[Row]:
        """The primary scores of what groups are made of."""
        return [
            row
            for row in self.rows
            if row.primary and not self.outline.is_benchmark(row.task) and not self.outline.original(row.task)
        ]

    @cached_property
    def others(self) -> list[Row]:
        """The rows that are no task's primary score."""
        return [row for row in self.rows if not row.primary]

    @cached_property
    def dissent(self) -> dict[tuple[str, str], list[Row]]:
        """See `dissenting_rows`."""
        return dissenting_rows(self.rows)

    @cached_property
    def lines(self) -> list[Line]:
        """The paper's table."""
        return paper_lines(self.benchmarks, self.reported, self.lacking)

    @cached_property
    def edited(self) -> list[Edited]:
        """What became of each gain under edited questions."""
        return robustness(self.arms, self.records, self.tasks, self.baseline, self.rows)

    @cached_property
    def spreads(self) -> list[Spread]:
        """How much scores vary from seed to seed."""
        return seed_spread(self.arms, self.records, self.tasks, self.baseline, self.groups)

    @cached_property
    def scales(self) -> dict[str, Scale]:
        """How the primary scores of each task and group are written."""
        names = dict.fromkeys(row.task for row in self.rows)
        return {name: Scale([row for row in self.rows if row.primary and row.task == name]) for name in names}

    @cached_property
    def along(self) -> list[Sweep]:
        """Each benchmark along α, the best α confirmed on documents that did not choose it."""
        return sweeps(self.arms, self.records, self.tasks, self.groups, self.baseline)

    @cached_property
    def formats(self) -> list[FormatGain]:
        """The differences that are, or may be, only format."""
        if self.baseline is None:
            return []
        return format_gains(self.benchmarks, self.records, self.tasks, self.baseline, self.groups)

    @cached_property
    def claims(self) -> list[str]:
        """What it all means, in sentences; the first for the whole."""
        if not self.rows:
            return []
        missing = empty_sentences(empty_answers(self.records, self.tasks))
        if self.baseline is None:
            return claims(self.benchmarks) + cut_sentences(self.benchmarks) + missing
        along = self.along
        unseen = limits(self.records, self.tasks, self.baseline, self.groups)
        return [
            *claims(self.benchmarks, along),
            *equivalence_sentences(self.benchmarks, self.baseline),
            *format_sentences(self.formats, self.scales),
            *cut_sentences(self.benchmarks),
            *limit_sentences(unseen, self.scales, self.benchmarks, self.baseline),
            *persistence_claims(self.edited, self.scales, self.baseline),
            *missing,
        ]

    @cached_property
    def footnotes(self) -> list[str]:
        """Sentences below the table of scores."""
        return footnotes(self.benchmarks, self.detectable, self._corrected)

    @cached_property
    def detectable(self) -> dict[tuple[str, str], float]:
        """The minimal detectable effect of each primary comparison, by task and arm."""
        if self.baseline is None:
            return {}
        return detectable_effects(self.arms, self.records, self.tasks, self.baseline, self.groups)

    @cached_property
    def _corrected(self) -> dict[tuple[str, str], float]:
        """The same where the comparison is the first that Holm corrects, for all of the main table: at most so much."""
        count = sum(row.p_value is not None for row in self.benchmarks)
        if self.baseline is None or count < 2:
            return {}
        level = LEVEL / count
        return detectable_effects(self.arms, self.records, self.tasks, self.baseline, self.groups, level)


@dataclass(frozen=True)
class Making:
    """How a run was made. `digests` maps arm names to point digests; `timing` phases to seconds."""

    title: str
    command: str
    digests: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)
    timing: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Exhibit:
    """A picture that was made elsewhere."""

    title: str
    png: bytes


@dataclass(frozen=True)
class Anatomy:
    """What the page shows of vectors: sentences, pictures, tables as (title, head, rows) of text, and the reasons why
    they do not help, or may not."""

    sentences: Sequence[str] = ()
    exhibits: Sequence[Exhibit] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    reasons: Sequence[str] = ()
