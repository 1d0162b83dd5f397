"""Which answers the page shows: first the documents that arms scored differently on, then the others.

Knows records and returns plain JSON data; knows nothing of HTML. The page must open on a phone, so the length of each
text and of all texts together is bounded, and what is left out is counted.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvdist.core.record import Record, TaskInfo
from rvdist.core.text import cut

CHARACTERS = 12_000_000  # of all texts together; three bytes of the page are one, an answer is forty
_BYTES, _ANSWER = 3, 40
_GOLDEN = 0.6180339887498949

Answers = Mapping[str, Mapping[int, Record]]  # to one task, by arm and place of the document


def choose_samples(
    records: Iterable[Record],
    tasks: Sequence[TaskInfo],
    arms: Sequence[str],
    baseline: str | None,
    characters: int = CHARACTERS,
) -> dict[str, Any]:
    """Of each task some `documents` as [number, expected]; in their order the `answers` of each arm as [score,
    beginning of the prompt, rest of the prompt, what was scored, response, tokens, whether it was cut at the limit,
    whether it is in the asked format], null where there is none and where the records do not say; and for each two
    arms, by their places, how many documents there are that the second does better, worse and the same on, shown or
    not. All text is in `texts`, once, and pointed into. A document that was asked several times is shown by its first
    record."""
    first: dict[str, defaultdict[str, dict[int, Record]]] = {task.name: defaultdict(dict) for task in tasks}
    for record in _primary(records, tasks):
        first[record.task][record.arm].setdefault(record.doc_id, record)
    texts = _Texts()
    shown = {}
    smallest_first = sorted(tasks, key=lambda task: sum(map(len, first[task.name].values())))
    for i, task in enumerate(smallest_first):  # who needs little leaves the rest to the others
        limit = texts.size + (characters - texts.size) // (len(tasks) - i)
        shown[task.name] = _task(task, arms, first[task.name], texts, limit)
    return {
        "baseline": baseline,
        "arms": list(arms),
        "tasks": [shown[task.name] for task in tasks],
        "texts": list(texts.places),
    }


_BLANK = re.compile(r"(\[\d+ of \d+, 0 characters\]\s*)*")  # what is shown of answers without a character


def empty_answers(records: Iterable[Record], tasks: Sequence[TaskInfo]) -> list[tuple[str, str, int, int]]:
    """The tasks and arms of whose answers half or more are empty: (task, arm, how many are, of how many)."""
    counts: dict[tuple[str, str], list[int]] = {}
    for record in _primary(records, tasks):
        pair = counts.setdefault((record.task, record.arm), [0, 0])
        pair[0] += bool(_BLANK.fullmatch(record.response.strip()))
        pair[1] += 1
    return [(task, arm, none, all_) for (task, arm), (none, all_) in counts.items() if 2 * none >= all_ > 0]


def _primary(records: Iterable[Record], tasks: Sequence[TaskInfo]) -> Iterator[Record]:
    """The records that the primary scores of tasks are made from."""
    filters = {task.name: task.primary[1] for task in tasks}
    return (record for record in records if filters.get(record.task) == record.filter)


def written_bytes(text: str) -> int:
    """Of a text in the page: in JSON of ASCII alone, without <, > and & (page.py)."""
    return len(json.dumps(text)) + 5 * sum(map(text.count, "<>&"))


class _Texts:
    """Every text once, and how long they are together, with what points into them."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.size = 0

    def place(self, whole: str, head: int, tail: int) -> int:
        """Where the text stands, without its middle if it is longer than head and tail."""
        left_out = len(whole) - head - tail
        if left_out > 0:
            whole = f"{whole[:head]}\n[… {left_out:,} characters left out …]\n{whole[-tail:]}"
        if whole not in self.places:
            self.places[whole] = len(self.places)
            self.size += max(len(whole), written_bytes(whole) // _BYTES)
        return self.places[whole]


def _task(task: TaskInfo, arms: Sequence[str], answers: Answers, texts: _Texts, limit: int) -> dict[str, Any]:
    """Documents are added until the texts are as long as `limit`."""
    metric = task.primary[0]
    any_of = {doc: record for arm in arms for doc, record in answers.get(arm, {}).items()}
    order = sorted(any_of)
    scores = np.full((len(arms), len(order)), np.nan)
    for i, arm in enumerate(arms):
        for j, doc in enumerate(order):
            if doc in answers.get(arm, {}):
                scores[i, j] = answers[arm][doc].metrics[metric]
    scores *= 1 if task.higher_is_better.get(metric, True) else -1
    counts = {}
    for i, j in combinations_with_replacement(range(len(arms)), 2):
        change = scores[j] - scores[i]
        counts[f"{i},{j}"] = [int((change > 0).sum()), int((change < 0).sum()), int((change == 0).sum())]

    beginnings = {arm: _common_lines([record.prompt_text for record in of.values()]) for arm, of in answers.items()}
    flipped = np.nanmin(scores, axis=0) < np.nanmax(scores, axis=0) if order else np.zeros(0, dtype=bool)
    chosen: dict[int, dict[str, Any]] = {}
    for j in [*_spread_evenly(np.flatnonzero(flipped)), *_spread_evenly(np.flatnonzero(~flipped))]:
        if texts.size >= limit:
            break
        by_arm = {arm: answers[arm][order[j]] for arm in arms if order[j] in answers.get(arm, {})}
        chosen[j] = {
            arm: [
                round(float(record.metrics[metric]), 6),
                texts.place(beginnings[arm], 8000, 8000),
                texts.place(record.prompt_text[len(beginnings[arm]) :], 2000, 2000),
                texts.place(record.filtered, 1500, 500),
                texts.place(record.response, 4000, 2000),
                sum(record.tokens) if record.tokens else None,
                "length" in record.finish if record.finish else None,
                record.in_format,
            ]
            for arm, record in by_arm.items()
        }
        texts.size += _ANSWER * len(by_arm)
    kept = sorted(chosen)
    return {
        "name": cut(task.name),
        "metric": cut(metric),
        "higher_is_better": task.higher_is_better.get(metric, True),
        "documents": [[any_of[order[j]].doc_id, texts.place(any_of[order[j]].target, 1500, 500)] for j in kept],
        "answers": {arm: [chosen[j].get(arm) for j in kept] for arm in arms},
        "counts": counts,
    }


def _common_lines(texts: Sequence[str]) -> str:
    """The lines that all of them begin with."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("\n", 0, length) + 1]


def _spread_evenly(places: NDArray[np.intp]) -> list[int]:
    """The same places, in such an order that any first few are spread evenly."""
    return [int(places[i]) for i in sorted(range(len(places)), key=lambda i: i * _GOLDEN % 1)]
