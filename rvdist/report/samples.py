"""Which answers the page shows: the documents that flipped against the baseline, and some that did not.

Knows records and returns plain JSON data; knows nothing of HTML. The page must open on a phone, so both
the number of answers and the length of each text are bounded, and what is left out is counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rvdist.record import Record, TaskInfo

CHOSEN = 2000  # answers to compare, over all tasks and arms
UNCHANGED = 20  # of them that did not flip, for each task and arm


def choose_samples(
    records: Iterable[Record], tasks: Sequence[TaskInfo], arms: Sequence[str], baseline: str | None
) -> dict[str, Any]:
    """For each task and arm, `pairs` of (document, "better" | "worse" | "same"); the answers of each arm;
    and `texts`, every text once, which the answers point into. A document that was asked several times is
    shown by its first record. Without a baseline each arm stands alone and all is "same"."""
    first: defaultdict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    primary = {task.name: task.primary[1] for task in tasks}
    for record in records:
        if primary.get(record.task) == record.filter:
            first[record.task, record.arm].setdefault(record.doc, record)

    texts: dict[str, int] = {}

    def text(whole: str, head: int, tail: int) -> int:
        return texts.setdefault(_clip(whole, head, tail), len(texts))

    compared = [arm for arm in arms if arm != baseline]
    share = max(UNCHANGED, CHOSEN // max(1, len(tasks) * len(compared)))
    shown = []
    for task in tasks:
        sign = 1 if task.higher_is_better.get(task.primary[0], True) else -1
        answers: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        documents: dict[str, list[Any]] = {}
        pairs, left_out = {}, {}
        for arm in compared:
            ours, theirs = first[task.name, arm], first[task.name, baseline or arm]
            changes: defaultdict[str, list[Record]] = defaultdict(list)
            for record in sorted(ours.values(), key=lambda record: record.doc_id):
                if record.doc in theirs:
                    change = sign * (_score(record, task) - _score(theirs[record.doc], task))
                    changes["better" if change > 0 else "worse" if change < 0 else "same"].append(record)
            flipped = sorted(changes["better"] + changes["worse"], key=lambda record: record.doc_id)
            same = changes["same"]
            some_flipped, some_same = _spread(flipped, share), _spread(same, UNCHANGED if baseline else share)
            chosen = some_flipped + some_same
            kind = {record.doc: name for name, group in changes.items() for record in group}
            pairs[arm] = [(record.doc, kind[record.doc]) for record in chosen]
            left_out[arm] = {"flipped": len(flipped) - len(some_flipped), "same": len(same) - len(some_same)}
            for record in chosen:
                documents[record.doc] = [record.doc_id, text(record.target, 1500, 500)]
                for side in (record, theirs[record.doc]):
                    answers[side.arm][record.doc] = [
                        _score(side, task),
                        text(side.prompt_text, 500, 3000),
                        text(side.filtered, 1500, 500),
                        text(side.response, 4000, 2000),
                    ]
        shown.append(
            {
                "name": task.name,
                "metric": task.primary[0],
                "documents": documents,
                "answers": answers,
                "pairs": pairs,
                "left_out": left_out,
            }
        )
    return {"baseline": baseline, "arms": compared, "tasks": shown, "texts": list(texts)}


def _score(record: Record, task: TaskInfo) -> float:
    return float(record.metrics[task.primary[0]])


def _spread(items: Sequence[Record], most: int) -> list[Record]:
    """At most so many, evenly from first to last."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def _clip(whole: str, head: int, tail: int) -> str:
    left_out = len(whole) - head - tail
    if left_out <= 0:
        return whole
    return f"{whole[:head]}\n[… {left_out:,} characters left out …]\n{whole[-tail:]}"
