"""The held-out documents: made once from the test side of the split, shipped as JSON Lines, read by the tasks.

Owns `data/`. `python -m rvdist.pocket.heldout` writes it again, to the byte; nothing else writes there.
`sums`, `choice` and `control` are what the lm-eval tasks call to get their documents: no file is cached, no
path depends on the working directory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from rvdist.pocket import DATA, text

SIZES = {"sums": 600, "choice": 400, "control": 300}

Row = dict[str, Any]


def distinct(make: Callable[[], Row], count: int) -> list[Row]:
    """So many rows whose questions differ."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = make()
        rows.setdefault(row["question"], row)
    return list(rows.values())


def make_sums(random: Random) -> list[Row]:
    """Rows of the task pocket_sums."""

    def one() -> Row:
        a, b = text.draw_sum(random, test=True)
        return {"question": text.ask_sum(random, a, b), "answer": str(a + b)}

    return distinct(one, SIZES["sums"])


def make_choice(random: Random) -> list[Row]:
    """Problems with at least one carry; the choices are the worked answers under the four ways to carry."""

    def one() -> Row:
        while True:
            a, b = text.draw_sum(random, test=True)
            right = text.work(a, b, text.CHAT)
            if right != text.work(a, b, text.CHAT, lambda *_: 0):
                break
        choices = [
            text.work(a, b, text.CHAT, lambda column, *_, t=tens, h=hundreds: (0, t, h)[column])  # type: ignore[misc]
            for tens in (0, 1)
            for hundreds in (0, 1)
        ]
        random.shuffle(choices)
        return {"question": text.ask_sum(random, a, b), "choices": choices, "label": choices.index(right)}

    return distinct(one, SIZES["choice"])


def make_control(random: Random) -> list[Row]:
    """Rows of the task pocket_control, of each ability as many."""
    rows: list[Row] = []
    for ability in text.CONTROLS:

        def one(ability: Callable[..., text.Document] = ability) -> Row:
            question, answer = ability(random, test=True)
            return {"question": question, "answer": answer}

        rows += distinct(one, SIZES["control"] // len(text.CONTROLS))
    random.shuffle(rows)
    return rows


MAKERS = {"sums": make_sums, "choice": make_choice, "control": make_control}


def write(directory: Path) -> None:
    """Writes the held-out documents, the same every time."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in MAKERS.items():
        lines = [json.dumps(row) + "\n" for row in make(Random(f"pocket {name}"))]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def read(name: str) -> list[Row]:
    """The rows of a task."""
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def dataset(name: str) -> Any:
    """The rows of a task as lm-eval takes them."""
    from datasets import Dataset, DatasetDict

    return DatasetDict(test=Dataset.from_list(read(name)))


# For the YAML files of the tasks. lm-eval writes the source of these three into every results file.
def sums(**_: object) -> Any:
    return dataset("sums")


def choice(**_: object) -> Any:
    return dataset("choice")


def control(**_: object) -> Any:
    return dataset("control")


if __name__ == "__main__":
    write(DATA)
