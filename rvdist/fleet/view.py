"""The view: what the fleet is doing, as a live table on a terminal and as plain lines elsewhere. Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rvdist.fleet.scheduler import Status
from rvdist.log import Log
from rvdist.point import WeightPoint

_LINE_EVERY = 10.0  # seconds
_ROWS = 16  # engines shown one by one


class FleetView:
    """`with FleetView(total, cached, names, log) as view: view.show(status)`. `total` requests, of which so many
    were `cached`; `names` says how points are called."""

    def __init__(self, total: int, cached: int, names: Mapping[WeightPoint, str], log: Log) -> None:
        self._total, self._cached, self._names, self._log = total, cached, names, log
        self._drawn = log.console.is_terminal
        self._started = self._last = time.monotonic()
        self._status = Status((), 0, 0, None)
        self._live = Live(console=log.console, get_renderable=self._table, refresh_per_second=2, transient=True)

    def __enter__(self) -> FleetView:
        if self._drawn:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._drawn:
            self._live.stop()
        self._tell(self._log.say)

    def show(self, status: Status) -> None:
        self._status = status
        if time.monotonic() - self._last > _LINE_EVERY:
            self._tell(self._log.record if self._drawn else self._log.say)

    def _table(self) -> RenderableType:
        engines = self._status.engines
        table = Table("engine", "point", "requests/s", "slices left there", box=None)
        for engine in engines[:_ROWS]:
            if engine.point is None:
                table.add_row(str(engine.number), "idle" if engine.up else "starting", "", "")
            else:
                name = Text(self._names[engine.point])
                table.add_row(str(engine.number), name, f"{engine.rate:.1f}", str(engine.left))
        more = [Text(f"and {len(engines) - _ROWS} more engines")] if len(engines) > _ROWS else []
        return Group(Text(self._sentence()), table, *more)

    def _sentence(self) -> str:
        status, seconds = self._status, time.monotonic() - self._started
        cached = f" ({self._cached} from the cache)" if self._cached else ""
        left = "" if self._left is None else f", {self._left:.0f} s left"
        return (
            f"evaluate: {self._done} of {self._total} requests{cached} in {seconds:.1f} s, "
            f"{status.tokens / seconds if seconds else 0:.0f} tokens/s, {self._up} of {len(status.engines)} engines "
            f"up{left}"
        )

    @property
    def _done(self) -> int:
        return self._cached + self._status.requests

    @property
    def _left(self) -> float | None:
        return None if self._done == self._total else self._status.seconds_left

    @property
    def _up(self) -> int:
        return sum(engine.up for engine in self._status.engines)

    def _tell(self, tell: Callable[..., None]) -> None:
        self._last = time.monotonic()
        tell(
            "progress",
            self._sentence(),
            phase="evaluate",
            requests=self._done,
            total=self._total,
            cached=self._cached,
            tokens=self._status.tokens,
            seconds=round(self._last - self._started, 3),
            engines_up=self._up,
            engines=len(self._status.engines),
            seconds_left=self._left,
        )
