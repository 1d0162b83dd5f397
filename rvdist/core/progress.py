"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from rvdist.core.log import Log

_LINE_EVERY = 10.0  # seconds


class Bar:
    """`with Bar("merge", total, log) as bar: bar.advance(n)`; bytes. The rate counts from the first `advance(0)`, if
    there is one before anything is done: whoever waits for workers says so when they begin."""

    def __init__(self, name: str, total: int, log: Log) -> None:
        self._name, self._total = name, total
        self._done, self._started, self._last = 0, time.monotonic(), time.monotonic()
        self._live = log.console.is_terminal
        self._tell = log.record if self._live else log.say
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("[bold]{task.description}"), *columns, console=log.console)
        self._task = self._progress.add_task(name, total=total)

    def __enter__(self) -> Bar:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()
        self._line()

    def advance(self, amount: int) -> None:
        """Adds `amount`; a first 0 says that the work begins now."""
        if not amount and not self._done:
            self._started = self._last = time.monotonic()
        self._done += amount
        self._progress.advance(self._task, amount)
        if time.monotonic() - self._last > _LINE_EVERY:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._started
        rate = self._done / seconds if seconds else 0.0
        left = (self._total - self._done) / rate if rate else None
        ahead = f", {left:.0f} s left" if left else ""
        self._tell(
            "progress",
            f"{self._name}: {decimal(self._done)} of {decimal(self._total)} in {seconds:.1f} s, "
            f"{decimal(int(rate))}/s{ahead}",
            phase=self._name,
            bytes=self._done,
            total=self._total,
            seconds=round(seconds, 3),
            bytes_per_second=round(rate),
            seconds_left=left,
        )
