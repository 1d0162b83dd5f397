"""Checkpoints that are opened again and again: their headers are read anew only where something in their directory
changed since."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rvdist.core.point import WeightPoint
from rvdist.core.vocabulary import Vocabulary
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import Stamp
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.vocabulary import Open, remap

_Look = dict[str, Stamp]  # of each name in a directory
_Asked = tuple[Vocabulary | None, list[str], list[Checkpoint]]  # by which names, of which checkpoints


class KeptSources:
    """Opens sources as `open_source` does, and keeps those whose files are all in one directory."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[_Look, Checkpoint]] = {}
        self._remapped: tuple[_Asked, Mapping[str, Checkpoint]] | None = None

    def open(self, source: str, rename: Sequence[tuple[str, str]] = ()) -> Checkpoint:
        """The checkpoint; the same as before where nothing in its directory changed. Raises as `open_source` does."""
        key, look = (source, tuple(rename)), _look_at(Path(source).expanduser())
        if key in self._kept and self._kept[key][0] == look:
            return self._kept[key][1]
        self._kept.pop(key, None)
        checkpoint = open_source(source, rename)
        if look and checkpoint.path == Path(source).expanduser() and checkpoint.stamps.keys() <= look.keys():
            self._kept[key] = look, checkpoint
        return checkpoint

    def remap(self, point: WeightPoint, sources: Mapping[str, Checkpoint], opened: Open) -> Mapping[str, Checkpoint]:
        """As `remap` does; the same as the last time where the vocabulary and the checkpoints are the same."""
        asked = point.vocabulary, list(sources), list(sources.values())
        if self._remapped is None or not _is_same(self._remapped[0], asked):
            self._remapped = asked, remap(point, sources, opened)
        return self._remapped[1]


def _is_same(one: _Asked, other: _Asked) -> bool:
    """Checkpoints are the same where they were opened once: tokenizers of hundred thousands take seconds to read."""
    return one[:2] == other[:2] and all(a is b for a, b in zip(one[2], other[2], strict=True))


def _look_at(path: Path) -> _Look:
    """Empty where it is no directory, or cannot be seen as a whole."""
    try:
        return {name: Stamp.of(path / name) for name in os.listdir(path)}
    except OSError:
        return {}
