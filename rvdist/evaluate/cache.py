"""The sample cache: every answered slice, durable at once, under a key of all that decides what is answered.

One SQLite file in `cache.dir`, shared by any number of runs. A slice is one row; those that come together are one
transaction, in SQLite's rollback journal and fully synchronous: what was written survives a killed process and a power
cut. Not its write-ahead log, which is unsafe on network file systems, where a cache may well lie. Knows nothing of Ray
or vLLM.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from rvdist.core.errors import Failed
from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.schedule import Part, Slice
from rvdist.evaluate.fleet.served import companions
from rvdist.evaluate.request import Answer, Answered, Completion, Generate, Loglikelihood, Request
from rvdist.weights.checkpoint.digest import file_digest
from rvdist.weights.checkpoint.journal import MANIFEST

# A slice's key; for people its point's digest and its task; its answers.
Kept: TypeAlias = tuple[str, str, str, Answered]

FILE = "samples.sqlite"
_APPLICATION = 0x72766473  # marks the file as ours
_LAYOUT = 1  # of the table
_KEYS = 2  # of the keys: those of 1 may have the answers of another method at the same terms
_PATIENCE = 60.0  # seconds, for another run's transaction
_AT_ONCE = 500  # keys in one question
_LONGEST = 60.0  # seconds that a question may take
_LARGEST = 256 << 20  # bytes of a slice's answers

_TABLE = """CREATE TABLE slices (
    key TEXT PRIMARY KEY, point TEXT, task TEXT, answers TEXT, truncated INTEGER, seconds REAL,
    written TEXT DEFAULT CURRENT_TIMESTAMP)"""
_SCHEMA = [("index", "sqlite_autoindex_slices_1", None), ("table", "slices", _TABLE)]


def serving_digest(checkpoint: Path, digests: Path | None = None) -> str:
    """A digest of what an engine reads of a checkpoint besides its weights: tokenizer, chat template, generation
    defaults, whatever else lies there in small files. `digests`: see file_digest."""
    files = [path for path in companions(checkpoint) if path.name != MANIFEST]
    return digest_of([[path.name, file_digest(path, digests)] for path in files])


def slice_keys(
    slices: Iterable[Slice],
    requests: Mapping[str, Sequence[Request]],
    points: Mapping[WeightPoint, str],
    tasks: Mapping[str, str],
    engine: Mapping[str, Any],
) -> dict[Slice, str]:
    """The key of each slice: of its requests all together, its point's digest in `points`, the versions in `tasks` of
    those it has requests of, and `engine`, which is everything else that decides the answers."""
    asked: dict[tuple[Part, ...], str] = {}
    served_by = digest_of(engine)
    keys = {}
    for piece in slices:
        if piece.parts not in asked:
            parts = [
                [
                    part.task,
                    tasks[part.task],
                    [[type(one).__name__, *vars(one).values()] for one in requests[part.task][part.begin : part.end]],
                ]
                for part in piece.parts
            ]
            asked[piece.parts] = digest_of(parts if len(parts) > 1 else parts[0])
        keys[piece] = digest_of([_KEYS, points[piece.point], asked[piece.parts], served_by])
    return keys


def digest_of(made_of: object) -> str:
    """The digest of what JSON can hold: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16).hexdigest()


class SampleCache:
    """The file in `directory`, made where there is none. Others may have written in it: a row that is no answer to what
    was asked is as good as none, is remembered in `damaged`, and the next answer takes its place. Raises Failed where
    the file cannot be used."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self.damaged: set[str] = set()
        self._until = math.inf
        with self._explain_errors():
            directory.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and not self._path.is_file():
                raise OSError("it is no file")
            if self._path.is_symlink() and not self._path.exists():
                raise OSError("it is a link to a file that is not there")
            with suppress(FileExistsError):  # SQLite would make what such a link names
                os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
            place = f"{self._path.absolute().as_uri()}?mode=rw"
            self._connection = sqlite3.connect(place, uri=True, timeout=_PATIENCE, isolation_level=None)
            self._connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
            self._connection.set_progress_handler(lambda: time.monotonic() > self._until, 100_000)
            for setting in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = EXTRA"):
                self._connection.execute(f"PRAGMA {setting}")
            with self._transaction():
                self._require_ours()

    def read(self, keys: Sequence[str], asked: Mapping[str, Sequence[Request]] | None = None) -> dict[str, Answered]:
        """What is there of the slices with these keys; `asked`: what was asked in each of them."""
        answered = {}
        for k in range(0, len(keys), _AT_ONCE):
            some = keys[k : k + _AT_ONCE]
            with self._explain_errors():
                rows = self._connection.execute(
                    f"SELECT key, CASE WHEN length(CAST(answers AS BLOB)) < {_LARGEST} THEN answers END, truncated, "
                    f"seconds FROM slices WHERE key IN ({','.join('?' * len(some))})",
                    some,
                )
                for key, answers, truncated, seconds in rows:
                    try:
                        answered[key] = _parse_answers(answers, truncated, seconds, asked[key] if asked else None)
                    except (ValueError, TypeError, LookupError, RecursionError):
                        self.damaged.add(key)
        return answered

    def knows(self, point: str) -> bool:
        """Whether there is anything of the point with this digest."""
        with self._explain_errors():
            row = self._connection.execute("SELECT 1 FROM slices WHERE point = ? LIMIT 1", (point,)).fetchone()
        return row is not None

    def write(self, kept: Iterable[Kept]) -> None:
        """Keeps slices. When this returns, they are on disk; of two runs that write the same one the first is kept."""
        rows = [
            (
                key,
                point,
                task,
                json.dumps([list(vars(answer).values()) for answer in found.answers]),
                found.truncated,
                found.seconds,
            )
            for key, point, task, found in kept
        ]
        again = [(key,) for key, *_ in rows if key in self.damaged]
        with self._explain_errors(), self._transaction():
            self._connection.executemany("DELETE FROM slices WHERE key = ?", again)
            self._connection.executemany(
                "INSERT OR IGNORE INTO slices (key, point, task, answers, truncated, seconds) VALUES (?,?,?,?,?,?)",
                rows,
            )
        self.damaged.difference_update(key for (key,) in again)

    def close(self) -> None:
        self._connection.close()

    def _require_ours(self) -> None:
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (layout,) = self._connection.execute("PRAGMA user_version").fetchone()
        schema = self._connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY type").fetchmany(3)
        if (application, layout, len(schema)) == (0, 0, 0):
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._connection.execute(f"PRAGMA user_version = {_LAYOUT}")
            self._connection.execute(_TABLE)
        elif application != _APPLICATION:
            raise sqlite3.DatabaseError("it is a database of something else")
        elif layout != _LAYOUT:
            raise sqlite3.DatabaseError(f"its layout is {layout}, and this version of rvdist knows {_LAYOUT}")
        elif schema != _SCHEMA:  # a view or a trigger is a program
            raise sqlite3.DatabaseError("it holds other than the one table of a sample cache")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        self._until = time.monotonic() + _LONGEST
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError, LookupError) as error:
            is_full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL or error.args[:1] == (errno.ENOSPC,)
            why, way = str(error), "make room there, and the same command goes on" if is_full else "move it away"
            if not is_full and (said := _no_file(self._path.absolute())):  # SQLite says that it cannot open one
                why, way = said, "mend that, and the same command goes on"
            raise Failed(
                f"{self._path}: the sample cache cannot be used ({why}); {way}, or set cache.dir to another "
                "directory or cache.samples=false"
            ) from None


def _no_file(path: Path) -> str:
    """Why no file can be made beside this one; empty where one can."""
    above = next(place for place in path.parents if place.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            return ""
    except OSError as error:
        return f"{above}: no file can be made there ({error.strerror})"


def _parse_answers(answers: Any, truncated: Any, seconds: Any, asked: Sequence[Request] | None) -> Answered:
    """Raises ValueError, TypeError, LookupError, RecursionError for what is no answer to what was asked."""
    parsed = tuple(map(_from_json, json.loads(answers)))
    _require(_is_count(truncated) and isinstance(seconds, int | float) and 0 <= seconds < math.inf)
    if asked is not None:
        kinds = [Completion if isinstance(request, Generate) else Loglikelihood for request in asked]
        _require([type(answer) for answer in parsed] == kinds)
    return Answered(parsed, truncated, seconds)


def _from_json(fields: list[Any]) -> Answer:
    first, second, *counts = fields
    _require(isinstance(fields, list) and all(map(_is_count, counts)))
    if isinstance(first, str):
        _require(isinstance(second, str))
        (first + second).encode()  # raises for half a surrogate
        return Completion(first, second, *counts)
    _require(type(first) in (int, float) and not math.isnan(first) and isinstance(second, bool))
    return Loglikelihood(first, second, *counts)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("it is no answer")
