"""The log: every event of a command, told once; as text for people or as JSON Lines for machines (docs/logs.md).

Knows nothing of what it tells. Whatever people see, run directories keep the lines, in FILE.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from rvdist.core.text import cut, printable
from rvdist.core.timing import Timing

FILE = "log.jsonl"
_LONGEST = 1 << 16  # characters of a text in a line


def new_run_id() -> str:
    """Sorts by the time (UTC) at which a command began, and differs from that of another of the same second."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


class Log:
    """The log of one command, whose id is `run`. With `as_json` each event is one line of JSON on standard output, a
    failure on standard error, and nothing else is printed."""

    def __init__(self, as_json: bool = False, console: Console | None = None) -> None:
        self.run, self.as_json = new_run_id(), as_json
        self._seen, self._unseen = console or Console(), Console(quiet=True, force_terminal=False)
        self._lines: list[str] = []
        self._named: dict[str, list[str]] = {}  # the same, by the directory that they name
        self._files: dict[str, Path] = {}  # by run directory
        self._whole: Path | None = None  # the file that has the lines of all jobs
        self._lock = threading.Lock()

    @property
    def console(self) -> Console:
        """Where tables and what is live are drawn: nowhere beside JSON."""
        return self._unseen if self.as_json else self._seen

    def say(self, event: str, message: str, level: str = "info", **fields: Any) -> None:
        """An event that everybody reads of; nothing in the message is markup, or does anything to a terminal."""
        self._write(event, message, level, fields, sys.stdout)
        self.console.print(printable(message), markup=False, emoji=False, soft_wrap=True)

    def record(self, event: str, message: str, level: str = "info", **fields: Any) -> None:
        """An event for machines: people see it in a bar or a table, or need not know."""
        self._write(event, message, level, fields, sys.stdout)

    def fail(self, sentence: str, status: int) -> None:
        """Why the command ends with this exit status."""
        self._write("failed", sentence, "error", {"status": status}, sys.stderr)
        if not self.as_json:
            print(f"rvdist: {printable(sentence)}", file=sys.stderr)

    def gather(self, directory: Path) -> None:
        """Of several jobs FILE of this directory above theirs has all lines, and each run directory's what names it;
        until `release`, and the first directory that is given."""
        with self._lock:
            self._whole = self._whole or directory / FILE

    def keep(self, directory: Path) -> None:
        """Appends what was told since the last `release`, and what will be, to FILE of this run directory."""
        own = str(directory)
        with self._lock:
            if own in self._files:
                return
            if self._whole and not self._files:
                _append(self._whole, "".join(self._lines))
            file = self._files[own] = directory / FILE
            if file != self._whole:
                _append(file, "".join(self._named.get(own, []) if self._whole else self._lines))

    def release(self) -> None:
        """Lets go of the run directories: the jobs that told of themselves are over."""
        with self._lock:
            self._lines, self._named, self._files, self._whole = [], {}, {}, None

    def _write(self, event: str, message: str, level: str, fields: Mapping[str, Any], printed: TextIO) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        told = {"time": now, "run": self.run, "level": level, "event": event, "message": message, **fields}
        line = json.dumps({key: _plain(value) for key, value in told.items()}, allow_nan=False) + "\n"
        with self._lock:
            own = str(fields.get("directory", ""))
            self._lines.append(line)
            self._named.setdefault(own, []).append(line)
            for file in self._kept(own):
                _append(file, line)
            if self.as_json:
                printed.write(line)
                printed.flush()

    def _kept(self, own: str) -> set[Path]:
        """The files of a line that names this directory, or none."""
        if not self._files or not self._whole:
            return set(self._files.values())
        return {self._whole, self._files.get(own, self._whole)}


class LoggedTiming(Timing):
    """The timing of a command, which tells its log of every phase. Phases that are sums over workers or engines have an
    end only."""

    def __init__(self, log: Log) -> None:
        super().__init__(run=log.run)
        self._log = log

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._log.record("phase_begin", f"{name} begins", phase=name)
        with super().phase(name):
            yield

    def add(self, name: str, seconds: float) -> None:
        super().add(name, seconds)
        self._log.record("phase_end", f"{name} took {seconds:.3f} s", phase=name, seconds=round(seconds, 6))


def _append(file: Path, text: str) -> None:
    """A run does not fail of its log: whatever fills a disk is in the way of what it writes itself."""
    with suppress(OSError), open(file, "a", encoding="ascii") as log:
        log.write(text)


def _plain(value: Any) -> Any:
    """JSON knows no infinity and no NaN, and no line is endless."""
    if isinstance(value, str):
        return cut(value, _LONGEST)
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
