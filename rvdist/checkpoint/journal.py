"""Which ranges of an output's files are written, and the digest of each.

The *journal* is the record while the output is under construction: JSON Lines, each `[checksum, entry]`, the first
naming the plan. A line is written after the bytes it speaks of are durable, so what it claims can be checked and
need not be done again; a torn last line is ignored. The *manifest* is the same, whole, beside the finished weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import xxhash

from rvdist.checkpoint.directory import read_json
from rvdist.errors import BadInput

JOURNAL = "journal.jsonl"
MANIFEST = "rvdist.json"
_VERSION = 1
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Written:
    """Bytes [start, start + nbytes) of a weight file and the xxh3-128 of what was written there."""

    file: str
    start: int
    nbytes: int
    digest: str

    def holds(self, directory: Path) -> bool:
        """Whether these bytes are there. Reads them; raises OSError."""
        digest = xxhash.xxh3_128()
        left = self.nbytes
        with open(directory / self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            while left and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
        return not left and digest.hexdigest() == self.digest


class Journal:
    """Begins the journal of `plan` in `directory` with what is claimed already. Raises OSError."""

    def __init__(self, directory: Path, plan: str, claims: Iterable[Written]) -> None:
        temporary = directory / (JOURNAL + ".new")
        self._file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._append([[_VERSION, plan], *(list(astuple(w)) for w in claims)])
        temporary.rename(directory / JOURNAL)

    def add(self, written: Iterable[Written]) -> None:
        """Records ranges whose bytes are durable; durable itself when it returns."""
        self._append([list(astuple(w)) for w in written])

    def _append(self, entries: list[list[Any]]) -> None:
        left = b"".join(map(_line, entries))
        while left:  # the last that fits on a disk is written in part, and only the next write is an error
            left = left[os.write(self._file, left) :]
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)


def read_journal(directory: Path, plan: str) -> Iterator[Written]:
    """What the journal in `directory` claims for this plan: nothing where it is another plan's. Where a run ended just
    before its rename there is no journal any more, but the manifest."""
    try:
        lines = (directory / JOURNAL).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        with suppress(BadInput):
            manifest = Manifest.read(directory)
            yield from manifest.ranges if manifest.plan == plan else ()
        return
    entries = map(_entry, lines)
    if next(entries, None) != [_VERSION, plan]:
        return
    for entry in entries:
        if entry is None:
            return
        yield Written(*entry)


def _line(entry: list[Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":"))
    return json.dumps([xxhash.xxh3_64_hexdigest(text.encode()), entry], separators=(",", ":")).encode() + b"\n"


def _entry(line: bytes) -> list[Any] | None:
    """The entry of a whole line, None for a torn or altered one."""
    try:
        _, entry = json.loads(line)
        return entry if _line(entry) == line else None
    except (ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Manifest:
    """What an output was made by (the digest of its plan) and every range of its weight files."""

    plan: str
    ranges: tuple[Written, ...]

    def to_json(self) -> str:
        ranges = ",\n".join(json.dumps(list(astuple(written))) for written in self.ranges)
        return f'{{"version": {_VERSION}, "plan": "{self.plan}", "digest": "xxh3-128", "ranges": [\n{ranges}\n]}}\n'

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises BadInput where there is none or it is damaged."""
        path = directory / MANIFEST
        found = read_json(path)
        try:
            if found["version"] != _VERSION:
                raise BadInput(f"{path}: is of version {found['version']}, which this rvdist does not know; update it")
            ranges = tuple(Written(str(f), int(s), int(n), str(d)) for f, s, n, d in found["ranges"])
            return cls(str(found["plan"]), ranges)
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{path}: is damaged; merge again") from None
