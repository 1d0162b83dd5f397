"""The view: what the fleet is doing, as a live table on a terminal and as plain lines elsewhere. Decides nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from rvdist.core.log import Log
from rvdist.core.point import WeightPoint
from rvdist.core.table import table_lines
from rvdist.evaluate.fleet.status import Status

_LINE_EVERY = 10.0  # seconds
_ROWS = 16  # engines shown one by one
_RECENT = 10.0  # seconds over which a rate is taken


class FleetView:
    """`with FleetView(total, cached, names, log) as view: view.show(status)`. `total` requests, of which so many
    were `cached`; `names` says how points are called. `kept`: where what is answered outlives the command, as it says
    should something end it."""

    def __init__(
        self, total: int, cached: int, names: Mapping[WeightPoint, str], log: Log, kept: str | None = None
    ) -> None:
        self._kept = kept
        self._total, self._cached, self._names, self._log = total, cached, names, log
        self._drawn = log.console.is_terminal
        self._started = self._last = time.monotonic()
        self._status = Status((), 0, 0, None)
        self._recent = deque([(self._started, 0, 0)])  # tokens made and read, at some times not long ago
        self._live = Live(console=log.console, get_renderable=self._table, refresh_per_second=2, transient=True)

    def __enter__(self) -> FleetView:
        if self._drawn:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._drawn:
            self._live.stop()
        self._recent = deque([(self._started, 0, 0), (time.monotonic(), 0, 0)])  # at the end rates are over all
        self._tell(self._log.say)
        if kind is not None:
            self._tell_loss()

    def _tell_loss(self) -> None:
        """What an end before all is answered costs. A slice is one batch, whose other answers would be others if those
        that are there were left out of it: so it is asked again whole."""
        answered, flight = self._status.finished, self._status.in_flight
        within = self._status.requests - answered
        if self._kept:
            kept, lost = f"{self._cached + answered} answered requests are kept in {self._kept}", flight
            begun = f", {within} of them answered already," if within else ""
        else:
            kept, lost, begun = "nothing is kept, as cache.samples=false has it", answered + flight, ""
        asked = f"{lost} requests{'' if self._kept is None else ' of unfinished slices'}{begun} will be asked again"
        self._log.say("note", f"evaluate: {kept}; {asked} by the same command", kept=bool(self._kept), lost=lost)

    def show(self, status: Status) -> None:
        """Takes in the status, tells of new failures, and now and then of progress."""
        for sentence in status.failures[len(self._status.failures) :]:
            self._log.say("note", f"evaluate: {sentence}", "warning")
        self._status, now = status, time.monotonic()
        self._recent.append((now, status.tokens, status.prompt_tokens))
        while self._recent[1][0] < now - _RECENT:
            self._recent.popleft()
        if now - self._last > _LINE_EVERY:
            self._tell(self._log.record if self._drawn else self._log.say)

    def _table(self) -> RenderableType:
        engines = self._status.engines
        rows = []
        for engine in engines[:_ROWS]:
            if engine.point is None:
                rows.append([str(engine.number), "idle" if engine.up else "starting"])
            else:
                rows.append([str(engine.number), self._names[engine.point], f"{engine.rate:.1f}", str(engine.left)])
        more = [Text(f"and {len(engines) - _ROWS} more engines")] if len(engines) > _ROWS else []
        lines = table_lines(("engine", "point", "requests/s", "slices left there"), rows)
        return Group(Text(self._sentence()), *lines, *more)

    def _sentence(self) -> str:
        seconds, (made, read) = time.monotonic() - self._started, self._rates
        cached = f" ({self._cached} from the cache)" if self._cached else ""
        of_prompts = f" (of prompts {read:.0f})" if read else ""
        left = "" if self._left is None else f", {self._left:.0f} s left"
        return (
            f"evaluate: {self._done} of {self._total} requests{cached} in {seconds:.1f} s, "
            f"{made:.0f} tokens/s{of_prompts}, {self._up} of {len(self._status.engines)} engines up{left}"
        )

    @property
    def _rates(self) -> tuple[float, float]:
        """Tokens a second, made and read."""
        (begin, made, read), (end, *_) = self._recent[0], self._recent[-1]
        seconds = end - begin
        if not seconds:
            return 0.0, 0.0
        return (self._status.tokens - made) / seconds, (self._status.prompt_tokens - read) / seconds

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
            prompt_tokens=self._status.prompt_tokens,
            tokens_per_second=round(self._rates[0], 1),
            in_flight=self._status.in_flight,
            seconds=round(self._last - self._started, 3),
            engines_up=self._up,
            engines=len(self._status.engines),
            seconds_left=self._left,
        )
