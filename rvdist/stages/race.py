"""The race as a stage: finds the best arm of a run, and scores it on documents that the race did not see."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rvdist.core import config
from rvdist.core.errors import BadInput
from rvdist.core.point import Arm
from rvdist.core.record import Record, TaskInfo
from rvdist.evaluate.asking import Asking
from rvdist.report.statistics.race import Outcome, Race, split
from rvdist.stages.evaluate import Evaluator
from rvdist.stages.score import Scoring, score, score_arm

if TYPE_CHECKING:
    from rvdist.report.pictures.race import Runner

FILE = "search.json"


def race(evaluator: Evaluator, scoring: Scoring) -> None:
    """Races the candidates of a job, then scores baseline and best on what was held out.

    The run directory gets FILE, an account of the race. Raises BadInput for a task whose primary score is not a
    number from 0 to 1 for each document.
    """
    prepared = scoring.prepared
    search = prepared.settings.search
    names = [arm.name for arm in config.candidates(prepared.settings)]
    arms = {arm.name: arm for arm in scoring.arms}
    baseline = scoring.arms[0]
    asking = scoring.askings[baseline.name]
    try:
        seen, held = split(asking.suite.documents, search.holdout, search.seed)
    except ValueError as error:
        raise BadInput(f"search: {error}; raise benchmarks.limit, or leave the task out") from None
    running = Race(
        names,
        seen,
        round_size=search.round,
        confidence=search.confidence,
        tolerance=search.tolerance,
        seed=search.seed,
    )
    with prepared.timing.phase("search"):
        while turn := running.next():
            documents, racing = turn
            scores = _round(evaluator, asking, scoring, [arms[name] for name in racing], documents)
            if not scores:
                scoring.require_scores()
            for name in set(racing) - scores.keys():
                running.withdraw(name)
            if running.next():
                running.tell(scores)
            prepared.say(_sentence(running.outcome))
    outcome = running.outcome
    _write(prepared.directory, outcome, seen, held)
    scoring.runners = _runners(outcome, arms)
    claim = _claim(outcome, sum(map(len, seen.values())), sum(map(len, held.values())))
    scoring.add_note(baseline, claim)
    prepared.say(claim)
    confirmed = asking.restrict(held)
    chosen = list(dict.fromkeys([baseline, arms[outcome.best]]))
    answered = evaluator.answer(confirmed, [(scoring, arm) for arm in chosen])
    if scored := [(arm, confirmed, answered) for arm in chosen if arm.name not in scoring.unscored]:
        score(scoring, scored, {})


def _round(
    evaluator: Evaluator, asking: Asking, scoring: Scoring, arms: Sequence[Arm], documents: Sequence[tuple[str, int]]
) -> dict[str, list[float]]:
    """What each arm that has a score scored on each of the documents, in their order."""
    wanted: dict[str, list[int]] = defaultdict(list)
    for task, document in documents:
        wanted[task].append(document)
    part = asking.restrict(wanted)
    answered = evaluator.answer(part, [(scoring, arm) for arm in arms])
    found = {}
    for arm in [arm for arm in arms if arm.name not in scoring.unscored]:
        _, records = score_arm(scoring, arm, part, answered)
        scores = _by_document(records, part.suite.infos(records))
        found[arm.name] = [scores[document] for document in documents]
    return found


def _by_document(records: Iterable[Record], tasks: Iterable[TaskInfo]) -> dict[tuple[str, int], float]:
    """The primary score of each document, more is better; of several samples their mean."""
    infos = {task.name: task for task in tasks}
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for record in records:
        metric, filtered = infos[record.task].primary
        if record.filter != filtered:
            continue
        value = record.metrics[metric]
        if not 0 <= value <= 1:
            raise BadInput(
                f"search: {record.task} has {metric}={value:g} of a document, and a race needs scores from 0 to 1; "
                "leave the task out"
            )
        scores[record.task, record.doc_id].append(value if infos[record.task].higher_is_better[metric] else 1 - value)
    return {document: sum(own) / len(own) for document, own in scores.items()}


def _sentence(outcome: Outcome[str]) -> str:
    left, best = len(outcome.tied) + 1, outcome.best
    count = left + len(outcome.eliminated)
    return (
        f"search: round {outcome.rounds}: {left} of {count} candidates left, {best} leads with "
        f"{outcome.means[best]:.4f}; {outcome.samples:,} of the grid's {outcome.full_grid:,} samples"
    )


def _claim(outcome: Outcome[str], seen: int, held: int) -> str:
    tied = f"; not told apart from it: {', '.join(outcome.tied)}" if outcome.tied else ""
    count = 1 + len(outcome.tied) + len(outcome.eliminated)
    share = outcome.samples / outcome.full_grid
    return (
        f"the race found {outcome.best} the best of {count} candidates on its {seen:,} documents, to within "
        f"{outcome.tolerance:g} with {outcome.confidence:.0%} confidence, from {outcome.samples:,} of the grid's "
        f"{outcome.full_grid:,} samples ({share:.0%}){tied}; what it is worth on others the scores here say, of "
        f"{held:,} documents that it did not see"
    )


def _runners(outcome: Outcome[str], arms: Mapping[str, Arm]) -> list[Runner]:
    """For the page."""
    from rvdist.report.pictures.race import BEST, DROPPED, TIED, Runner

    dropped = {one.candidate: one for one in outcome.eliminated}
    runners = []
    for name in outcome.means:
        fate, why = BEST if name == outcome.best else TIED if name in outcome.tied else DROPPED, ""
        if state := dropped.get(name):
            evidence = f"evidence {min(state.evidence, 1e6):,.0f} of {state.bound:,.0f}"
            why = f"after round {state.round} by “{state.by}” ({evidence})"
        rounds = [(one.seen, one.mean) for one in outcome.history if one.candidate == name]
        runners.append(Runner(name, arms[name].alpha, rounds, fate, why))
    return runners


def _write(
    directory: Path, outcome: Outcome[str], seen: Mapping[str, Sequence[int]], held: Mapping[str, Sequence[int]]
) -> None:
    account = asdict(outcome) | {"documents": {"race": seen, "held_out": held}}
    (directory / FILE).write_text(json.dumps(account, indent=2) + "\n")
