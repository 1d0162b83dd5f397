"""Checkpoints that are opened again and again: their headers are read anew only where something in their directory
changed since."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import Stamp
from rvdist.weights.checkpoint.source import open_source

_Look = dict[str, Stamp]  # of each name in a directory


class KeptSources:
    """Opens sources as `open_source` does, and keeps those whose files are all in one directory."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[_Look, Checkpoint]] = {}

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


def _look_at(path: Path) -> _Look:
    """Empty where it is no directory, or cannot be seen as a whole."""
    try:
        return {name: Stamp.of(path / name) for name in os.listdir(path)}
    except OSError:
        return {}
