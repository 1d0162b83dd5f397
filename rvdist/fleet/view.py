"""The view: what the fleet is doing, as a live table on a terminal and as plain lines elsewhere. Decides nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rvdist.fleet.scheduler import Status
from rvdist.point import WeightPoint

_LINE_EVERY = 10.0  # seconds
_ROWS = 16  # engines shown one by one


class FleetView:
    """`with FleetView(total, cached, names, console) as view: view.show(status)`. `total` requests, of which so many
    were `cached`; `names` says how points are called."""

    def __init__(self, total: int, cached: int, names: Mapping[WeightPoint, str], console: Console) -> None:
        self._total, self._cached, self._names, self._console = total, cached, names, console
        self._started = self._last = time.monotonic()
        self._status = Status((), 0, 0, None)
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=2, transient=True)

    def __enter__(self) -> FleetView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()
        self._line()

    def show(self, status: Status) -> None:
        self._status = status
        if not self._console.is_terminal and time.monotonic() - self._last > _LINE_EVERY:
            self._line()

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
        done = self._cached + status.requests
        cached = f" ({self._cached} from the cache)" if self._cached else ""
        left = "" if status.seconds_left is None or done == self._total else f", {status.seconds_left:.0f} s left"
        up = sum(engine.up for engine in status.engines)
        return (
            f"evaluate: {done} of {self._total} requests{cached} in {seconds:.1f} s, "
            f"{status.tokens / seconds if seconds else 0:.0f} tokens/s, {up} of {len(status.engines)} engines up{left}"
        )

    def _line(self) -> None:
        self._last = time.monotonic()
        print(self._sentence(), file=sys.stdout, flush=True)
