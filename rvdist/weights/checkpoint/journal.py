"""Which ranges of an output's files are written, and the digest of each.

The *journal* is the record while the output is under construction: JSON Lines, each `[checksum, entry]`, the first
naming the plan. A line is written after the bytes it speaks of are durable, so what it claims can be checked and
need not be done again; a torn last line is ignored. The *manifest* is the same, whole, beside the finished weights.
Both are sealed with a key of who writes them: what another wrote is not gone on from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from rvdist.core.errors import BadInput
from rvdist.core.foreign import parse_line
from rvdist.core.regular import Handle, read_regular
from rvdist.weights.checkpoint.directory import read_json

JOURNAL = "journal.jsonl"
MANIFEST = "rvdist.json"
_VERSION = 1
_BLOCK = 4 << 20
_MOST = 256 << 20  # bytes of a journal that are read


@dataclass(frozen=True)
class Written:
    """Bytes [start, start + nbytes) of a weight file and the xxh3-128 of what was written there."""

    file: str
    start: int
    nbytes: int
    digest: str

    @classmethod
    def of(cls, entry: Any) -> Written:
        """From what JSON holds. Raises ValueError, TypeError."""
        file, start, nbytes, digest = entry
        if not (isinstance(file, str) and type(start) is type(nbytes) is int and isinstance(digest, str)):
            raise TypeError("a range is a file, two whole numbers and a digest")
        if file != Path(file).name or "\0" in file or min(start, nbytes) < 0 or start + nbytes >= 1 << 63:
            raise ValueError("a range is not of a file beside it")
        return cls(file, start, nbytes, digest)

    def holds(self, directory: Path, opener: Callable[[str, int], int] | None = None) -> bool:
        """Whether these bytes are there. Reads them; raises OSError."""
        digest = xxhash.xxh3_128()
        left = self.nbytes
        with open(directory / self.file, "rb", buffering=0, opener=opener) as file:
            file.seek(self.start)
            while left and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
        return not left and digest.hexdigest() == self.digest


class Journal:
    """Begins the journal of `plan` in the directory of `handle` with what is claimed already. Raises OSError."""

    def __init__(self, handle: Handle, plan: str, claims: Iterable[Written], key: bytes = b"") -> None:
        self._key = _of_plan(key, plan)
        temporary = JOURNAL + ".new"
        self._file = handle.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._append([[_VERSION, plan], *(list(astuple(w)) for w in claims)])
        os.rename(temporary, JOURNAL, src_dir_fd=handle.descriptor, dst_dir_fd=handle.descriptor)

    def add(self, written: Iterable[Written]) -> None:
        """Records ranges whose bytes are durable; durable itself when it returns."""
        self._append([list(astuple(w)) for w in written])

    def _append(self, entries: list[list[Any]]) -> None:
        left = b"".join(_line(entry, self._key) for entry in entries)
        while left:  # the last that fits on a disk is written in part, and only the next write is an error
            left = left[os.write(self._file, left) :]
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)


def read_journal(directory: Path, plan: str, key: bytes | None = b"") -> Iterator[Written]:
    """What the journal in `directory` claims for this plan: nothing where it is another plan's, or, unless `key` is
    None, was not written with this key. Where a run ended just before its rename there is no journal any more, but the
    manifest. Without a key it raises ValueError, TypeError for what no journal of ours claims."""
    try:
        lines = read_regular(directory / JOURNAL, _MOST).splitlines(keepends=True)
    except FileNotFoundError:
        with suppress(BadInput):
            manifest = Manifest.read(directory)
            if manifest.plan == plan and (key is None or manifest.is_sealed(key)):
                yield from manifest.ranges
        return
    except OSError:
        if key is None:
            raise
        return  # what stands in its place claims nothing
    own = None if key is None else _of_plan(key, plan)
    entries = (_entry(line, own) for line in lines)
    if next(entries, None) != [_VERSION, plan]:
        return
    for entry in entries:
        try:
            yield Written.of(entry)
        except (TypeError, ValueError):
            if key is None and entry is not None:  # not torn: none of ours
                raise
            return


def is_journal_of(directory: Path, plan: str, key: bytes = b"") -> bool:
    """Whether the journal in `directory` was begun for this plan with this key, whatever it claims."""
    with suppress(OSError):
        lines = read_regular(directory / JOURNAL, _MOST).splitlines(keepends=True)
        return bool(lines) and _entry(lines[0], _of_plan(key, plan)) == [_VERSION, plan]
    return False


def _line(entry: list[Any], key: bytes) -> bytes:
    text = json.dumps(entry, separators=(",", ":"))
    return json.dumps([_seal(text, key), entry], separators=(",", ":")).encode() + b"\n"


def _of_plan(key: bytes, plan: str) -> bytes:
    """What seals the journal of this plan, so that no line of another's counts in it."""
    return hashlib.blake2b(plan.encode(), key=key, digest_size=32).digest()


def _seal(text: str, key: bytes) -> str:
    return hashlib.blake2b(text.encode(), key=key, digest_size=16).hexdigest()


def _entry(line: bytes, key: bytes | None) -> list[Any] | None:
    """The entry of a whole line, None for a torn or altered one, or one that another key has sealed."""
    try:
        _, entry = parse_line(line)
        return entry if key is None or _line(entry, key) == line else None
    except (ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Manifest:
    """What an output was made by (the digest of its plan) and every range of its weight files."""

    plan: str
    ranges: tuple[Written, ...]
    seal: str = ""

    def to_json(self) -> str:
        """The text of the manifest, a line a range."""
        ranges = ",\n".join(json.dumps(list(astuple(written))) for written in self.ranges)
        seal = f', "seal": "{self.seal}"' if self.seal else ""
        return (
            f'{{"version": {_VERSION}, "plan": "{self.plan}", "digest": "xxh3-128"{seal}, "ranges": [\n{ranges}\n]}}\n'
        )

    def seal_with(self, key: bytes) -> Manifest:
        """The same with the mark of who has `key`."""
        return replace(self, seal=_seal(json.dumps([self.plan, *map(astuple, self.ranges)]), key))

    def is_sealed(self, key: bytes) -> bool:
        """Whether its mark is that of who has `key`; without a key, any is."""
        return not key or self.seal == self.seal_with(key).seal

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises BadInput where there is none or it is damaged."""
        path = directory / MANIFEST
        content = read_json(path)
        try:
            if content["version"] != _VERSION:
                raise BadInput(
                    f"{path}: is of version {content['version']}, which this rvdist does not know; update it"
                )
            ranges = tuple(Written.of(entry) for entry in content["ranges"])
            return cls(str(content["plan"]), ranges, str(content.get("seal", "")))
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{path}: is damaged; merge again") from None


def is_complete(directory: Path, plan: str) -> bool:
    """Whether this plan was carried out there, and every weight file is still as long as it was written; its bytes are
    not read. Raises BadInput where the manifest is damaged."""
    if not (directory / MANIFEST).exists():
        return False
    manifest, sizes = Manifest.read(directory), dict[str, int]()
    for written in manifest.ranges:
        sizes[written.file] = max(sizes.get(written.file, 0), written.start + written.nbytes)
    files = ((directory / file, size) for file, size in sizes.items())
    return manifest.plan == plan and all(path.is_file() and path.stat().st_size == size for path, size in files)
