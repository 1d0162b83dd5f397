"""The metadata of a card: what the Hub reads of it, as YAML between two lines of dashes at the top of README.md.

Knows names, licences and rows of `summary.json`. All of it may come from strangers, so every text is one printable line
and a real dumper quotes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rvdist.core.foreign import parse_yaml
from rvdist.core.regular import open_regular
from rvdist.report.summary import Row
from rvdist.report.wording import printable

_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MOST_OF_A_README = 1 << 20  # bytes


@dataclass(frozen=True)
class Licence:
    """What a checkpoint's own card says: the Hub's name of its licence; its own name, if that is `other`; a link."""

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.id} ({self.name})" if self.name else self.id


@dataclass(frozen=True)
class Result:
    """A score of what is published, the baseline's (None: it is the baseline), and what was asked: the Hub's name of
    the data set, if it is from there, its configuration and split, and the number of examples before each question.
    `dissent`: scores through other filters, of another verdict."""

    row: Row
    baseline: Row | None = None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    shots: int | None = None
    dissent: Sequence[Row] = ()


def front_matter(data: Mapping[str, Any]) -> str:
    """The block as it stands in the file; what is empty is left out."""
    kept = {key: _printable(value) for key, value in data.items() if value not in (None, [], {})}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=math.inf)}---"


def licence_of(directory: Path) -> Licence | None:
    """What README.md in a checkpoint's directory says, None where nothing can be read there."""
    try:
        with open(open_regular(directory / "README.md"), "rb") as file:
            block = _BLOCK.match(file.read(_MOST_OF_A_README).decode("utf-8", "replace").removeprefix("\ufeff"))
        said = parse_yaml(block[1].encode()) if block else None
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict):
        return None
    named = said.get("license")
    if isinstance(named, list) and all(isinstance(one, str) for one in named):
        named = ", ".join(named)
    if not isinstance(named, str) or not named.strip():
        return None
    own, link = said.get("license_name"), said.get("license_link")
    return Licence(
        printable(named.strip()),
        printable(own) if isinstance(own, str) and own else None,
        link if isinstance(link, str) and re.fullmatch(r"https?://[^\s<>\"]+", link) else None,
    )


def licence_fields(licences: Sequence[Licence | None]) -> dict[str, str]:
    """The keys for what is made of checkpoints of these licences: theirs if it is one, `other` if they differ, none
    where one is unknown."""
    if not licences or None in licences:
        return {}
    one, *others = dict.fromkeys(licences)
    if others or one is None or not _LICENCE_ID.fullmatch(one.id):
        return {"license": "other"}
    fields = {"license": one.id, "license_name": one.name, "license_link": one.link}
    return {key: value for key, value in fields.items() if value}


def model_index(name: str, results: Sequence[Result]) -> list[dict[str, Any]]:
    """`model-index` of the model `name`, as huggingface_hub's `EvalResult` reads it."""
    return [{"name": name, "results": [_entry(result) for result in results]}] if results else []


def _entry(result: Result) -> dict[str, Any]:
    row = result.row
    dataset = {
        "name": result.dataset or row.task,
        "type": result.dataset or row.task,
        "config": result.config,
        "split": result.split,
        "args": None if result.shots is None else {"num_few_shot": result.shots},
    }
    sure = row.ci_low is not None and row.ci_high is not None
    metric = {
        "type": row.metric,
        "value": float(row.value),
        "name": row.metric if row.filter == "none" else f"{row.metric}, {row.filter}",
        "args": {"n": row.n} | ({"interval_95": [row.ci_low, row.ci_high]} if sure else {}),
    }
    return {
        "task": {"type": "text-generation", "name": task_name(row)},
        "dataset": {key: value for key, value in dataset.items() if value is not None},
        "metrics": [metric],
    }


def task_name(row: Row) -> str:
    """What was asked, and in which style of prompt if not the plain one."""
    return row.task if row.prompt == "plain" else f"{row.task}, prompt style {row.prompt}"


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {key: _printable(inner) for key, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list | tuple) else value
