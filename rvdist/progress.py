"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_EVERY = 10.0  # seconds


class Bar:
    """`with Bar("merge", total, "bytes") as bar: bar.advance(n)`. Units: bytes, or whatever is counted."""

    def __init__(self, name: str, total: int, unit: str, console: Console) -> None:
        self._name, self._total, self._unit, self._console = name, total, unit, console
        self._done, self._started, self._last = 0, time.monotonic(), time.monotonic()
        amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), unit)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), *amount, TimeRemainingColumn(), console=console
        )
        self._task = self._progress.add_task(name, total=total)

    def __enter__(self) -> Bar:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()
        if not self._console.is_terminal:
            self._line()

    def advance(self, amount: int) -> None:
        self._done += amount
        self._progress.advance(self._task, amount)
        if not self._console.is_terminal and time.monotonic() - self._last > _LINE_EVERY:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._started
        rate = self._done / seconds if seconds else 0.0
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate and self._done < self._total else ""
        if self._unit == "bytes":
            amount, speed = f"{decimal(self._done)} of {decimal(self._total)}", f"{decimal(int(rate))}/s"
        else:
            amount, speed = f"{self._done} of {self._total} {self._unit}", f"{rate:.1f}/s"
        print(f"{self._name}: {amount} in {seconds:.1f} s, {speed}{left}", file=sys.stdout, flush=True)
