"""How much a score varies from one sampling seed to the next.

The intervals of the summary are over documents, with all seeds of a document taken together; this is the other
question: what another single run might have shown. Knows samples and records; nothing of tables or plots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from scipy.stats import chi2

from rvdist.core.point import Arm
from rvdist.core.record import Record, TaskInfo
from rvdist.report.statistics.sample import Answers, Score, benchmark_scores, round_off, sample, sort_records
from rvdist.report.summary import LEVEL, GroupInfo, write_csv


@dataclass(frozen=True)
class Spread:
    """One arm's benchmark score under each seed, in the order of `seeds`; `deltas` are against the baseline under the
    same seed, None for the baseline and without one. `sd` is the standard deviation between seeds (n − 1) with its 95 %
    interval, which assumes that scores of seeds are normally distributed and has no upper end where all are equal;
    `delta_sd` that of the deltas."""

    arm: str
    task: str
    metric: str
    filter: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    sd: float
    sd_low: float
    sd_high: float | None
    deltas: tuple[float, ...] | None = None
    delta_sd: float | None = None


def seed_spread(
    arms: Sequence[Arm],
    records: Iterable[Record],
    tasks: Sequence[TaskInfo],
    baseline: str | None,
    groups: Sequence[GroupInfo] = (),
) -> list[Spread]:
    """A row for each (benchmark, arm) that was asked under more than one seed; seeds that an arm was not asked under
    everywhere do not count."""
    by_seed: dict[int, list[Record]] = {}
    for record in records:
        by_seed.setdefault(record.seed, []).append(record)
    if len(by_seed) < 2:
        return []
    answers = {seed: sort_records(of_seed) for seed, of_seed in sorted(by_seed.items())}
    shown = benchmark_scores(tasks, groups)
    spreads = [_spread(answers, arm.name, baseline, score) for score in shown for arm in arms]
    return [spread for spread in spreads if spread]


def _spread(by_seed: Mapping[int, Answers], arm: str, baseline: str | None, score: Score) -> Spread | None:
    parts = score.members or (score.task,)
    wanted = [(name, part, score.filter) for name in {arm, baseline or arm} for part in parts]
    answers = {seed: answers for seed, answers in by_seed.items() if all(key in answers for key in wanted)}
    if len(answers) < 2:
        return None
    values = [sample(own, arm, score).score for own in answers.values()]
    sd = _sd(values)
    low, high = _interval(sd, len(values))
    spread = Spread(arm, score.task, score.metric, score.filter, tuple(answers), tuple(values), sd, low, high)
    if baseline is None or arm == baseline:
        return spread
    theirs = [sample(own, baseline, score).score for own in answers.values()]
    deltas = tuple(a - b for a, b in zip(values, theirs, strict=True))
    return replace(spread, deltas=deltas, delta_sd=_sd(deltas))


def write_seeds(path: Path, rows: Sequence[Spread]) -> None:
    """As CSV, a line for each seed of each row."""
    names = [field.name for field in fields(Spread)]
    names = [{"seeds": "seed", "values": "value", "deltas": "delta"}.get(name, name) for name in names]
    lines: list[dict[str, object]] = []
    for row in rows:
        whole = {name: value for name, value in asdict(row).items() if name in names}
        for seed, value, delta in zip(row.seeds, row.values, row.deltas or [None] * len(row.seeds), strict=True):
            lines.append(whole | {"seed": seed, "value": value, "delta": delta})
    write_csv(path, names, lines)


def _sd(values: Sequence[float]) -> float:
    array = np.array(values)
    return float(np.std(round_off(array - array[0], array), ddof=1))


def _interval(sd: float, n: int) -> tuple[float, float | None]:
    """Of a standard deviation of n normal numbers: n − 1 times its square is χ² distributed. Scores that are equal, as
    rounded to a document as they are, say nothing of how large it may be."""
    if not sd:
        return 0.0, None
    low, high = (math.sqrt((n - 1) / chi2.ppf(p, n - 1)) for p in (1 - LEVEL / 2, LEVEL / 2))
    return sd * low, sd * high
