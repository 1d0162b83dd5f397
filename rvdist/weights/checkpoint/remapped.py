"""A checkpoint with the tokens of another: its embedding and its head have a row for each token of an output, be it its
own, another checkpoint's, a mean, or 0. Nothing is copied: a row is read where it lies.

Knows which row is where, and not why (checkpoint.vocabulary). Touches no tensor data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.fp8 import Scaled
from rvdist.weights.checkpoint.stacked import Stacked
from rvdist.weights.checkpoint.tokens import Built

ZERO, MEAN, PADDING = -1, -2, -3  # what is no one row of a checkpoint
TOKENIZER = re.compile(r"(?:tokenizer|special_tokens_map|chat_template)[^/]*\.(?:json|jinja)")
_LEFT = re.compile(
    r"(?:vocab|merges|added_tokens|encoder|normalizer|tekken)\.(?:json|txt|bpe)|.*\.(?:model|tiktoken)"
)  # tokenizer.json has it all

Numbers = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, eq=False)
class Rows:
    """For each row of a tensor its checkpoint among those of a `Remapped`, or what it is else, and its row there, or
    which of `means`: the (checkpoint, row) pairs that it is the mean of. PADDING is the mean of all others."""

    owner: Numbers
    row: Numbers
    means: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def tokens(self) -> int:
        """How many rows are not padding."""
        return int((self.owner != PADDING).sum())

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Rows [first, stop) as (first row, row after the last, owner, row there of the first): runs that lie in one
        checkpoint one after the other, or are the same."""
        owner, row = self.owner[first:stop], self.row[first:stop]
        steps = np.where((owner[1:] >= 0), np.diff(row) == 1, np.isin(owner[1:], (ZERO, PADDING)))
        cuts = [0, *(np.flatnonzero((np.diff(owner) != 0) | ~steps) + 1).tolist(), len(owner)]
        for begin, end in pairwise(cuts):
            if begin < end:
                yield first + begin, first + end, int(owner[begin]), int(row[begin])

    @cached_property
    def digest(self) -> str:
        """Of all that it says."""
        made_of = self.owner.tobytes() + self.row.tobytes() + repr(self.means).encode()
        return hashlib.blake2b(made_of, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Remapped(Checkpoint):
    """`lenders` are the checkpoints whose rows are read, itself as it is the first; `rows` is by the name of a tensor.
    Of a base `tokenizer` is that of the output, `changed` what its config says otherwise, and `generation` all that its
    generation_config.json is to say, None where that stays."""

    lenders: tuple[Checkpoint, ...] = field(default=(), repr=False)
    rows: dict[str, Rows] = field(default_factory=dict, repr=False)
    tokenizer: Built | None = field(default=None, repr=False)
    changed: dict[str, Any] = field(default_factory=dict, repr=False)
    generation: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def inner(self) -> Checkpoint:
        """The checkpoint as it is."""
        return self.lenders[0]

    @property
    def digest(self) -> str:
        """Of where its rows come from, among its lenders, and of its tokenizer; not of what lenders hold."""
        rows = [[name, rows.digest] for name, rows in sorted(self.rows.items())]
        built = self.tokenizer and [self.tokenizer.digest, self.tokenizer.limit, self.tokenizer.ids]
        return hashlib.blake2b(json.dumps([rows, built]).encode(), digest_size=16).hexdigest()

    @property
    def made_of(self) -> list[Any]:
        """What decides its bytes: where rows come from, and the files of the lenders, here or at the Hub."""
        return [self.digest, *([astuple(stamp) for stamp in one.stamps.values()] for one in self.lenders)]

    @cached_property
    def config(self) -> dict[str, Any]:
        """That of the checkpoint, with the number of rows, and special tokens by their new ids."""
        return _overlaid(self.inner.config, self.changed)

    def written_beside(self) -> dict[str, str]:
        """What of a base's files beside the weights is written anew, but for its config. Raises BadInput."""
        files = self.tokenizer.files() if self.tokenizer else {}
        if self.generation is not None:
            files["generation_config.json"] = json.dumps(self.generation, indent=2) + "\n"
        return files

    def goes_along(self, name: str) -> bool:
        """Whether what stands beside its weights under this name is still true of the output."""
        return self.tokenizer is None or not (TOKENIZER.fullmatch(name) or _LEFT.fullmatch(name))

    def __str__(self) -> str:
        owner = np.concatenate([rows.owner for rows in self.rows.values()][:1])
        kinds = {"its own": owner == 0, "another model's": owner > 0, "0": owner == ZERO}
        kinds |= {"the mean of those that have one": owner == MEAN, "the mean of all (padding)": owner == PADDING}
        said = ", ".join(f"{int(which.sum()):,} {what}" for what, which in kinds.items() if which.any())
        return f"{self.path.name}: the rows of its vocabulary are {said}"


@dataclass(frozen=True)
class RemappedScaled(Remapped, Scaled):
    """One that is quantised, but for the rows."""


@dataclass(frozen=True)
class RemappedStacked(Remapped, Stacked):
    """One that is layers of several."""


def kind_of(checkpoint: Checkpoint) -> tuple[type[Remapped], type[Checkpoint]]:
    """What a checkpoint is with the tokens of another, and as what it keeps all that it says."""
    if isinstance(checkpoint, Scaled):
        return RemappedScaled, Scaled
    return (RemappedStacked, Stacked) if isinstance(checkpoint, Stacked) else (Remapped, Checkpoint)


def map_of(checkpoint: Checkpoint) -> list[Any]:
    """What decides the rows that a checkpoint is read with; empty where they are its own."""
    return checkpoint.made_of if isinstance(checkpoint, Remapped) else []


def _overlaid(config: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some values changed, those of its parts too."""
    new = {k: _overlaid(config[k], value) if isinstance(value, dict) else value for k, value in changed.items()}
    return {**config, **new}
