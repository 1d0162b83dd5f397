"""Seats: a place each for one engine after another, as Ray actors. Starts them, and another where one did not start
or is gone. Knows no slices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import WeightPoint
from rvdist.core.text import reason
from rvdist.evaluate.fleet.actor import log_end
from rvdist.evaluate.fleet.arguments import environment, versions
from rvdist.evaluate.fleet.failures import Starts
from rvdist.evaluate.fleet.schedule import Part
from rvdist.evaluate.request import Progress, Unusable

PAUSES = (2.0, 15.0)  # seconds before a start that failed is tried again
_LATE = "it did not start in time; if it needs more, raise engine.start_timeout"
_REPLY = 60.0  # seconds for an engine that is idle to say that it lives


@dataclass
class Seat:
    """A place for one engine after another. `up`: when the present one was, None while it starts. `until`: when it is
    ended if it says nothing, None while it owes nothing."""

    number: int
    actor: Any = None
    up: float | None = None
    until: float | None = None
    begun: float = 0.0  # when its start began
    took: float = 0.0  # seconds, its start
    log: str = ""
    at: WeightPoint | None = None
    cpu_seconds: float = 0.0  # of the engine, as it last said
    bytes_read: int = 0
    progress: Progress | None = None  # of the slice at which it works
    sent: set[tuple[Part, ...]] = field(default_factory=set)  # requests that its engine has been sent
    ahead: Any = None  # the answer to a slice that it holds while it is at another


class Seats:
    """`count` of them, filled with what `spawn` makes for each by its number. An engine has `start_timeout` seconds to
    start, from when it has its room; where it fails, another is tried after each of `pauses` seconds. `told` hears why
    one did not start, `lost` of each that was up and is no more. All must compute on the `device`, on one kind of
    it, and as vLLM has `resolved` its choices where answers in the sample cache were made (empty: not known)."""

    def __init__(
        self,
        spawn: Callable[[int], Any],
        count: int,
        start_timeout: float,
        pauses: Sequence[float],
        device: str,
        told: Callable[[Seat, str], None],
        lost: Callable[[Seat], None],
        resolved: Mapping[str, str],
    ) -> None:
        self._spawn, self._start_timeout, self._told, self._lost = spawn, start_timeout, told, lost
        self._device, self._kind = device, ""
        self._resolved, self._resolved_by = dict(resolved), "in the sample cache"
        self._created = time.monotonic()
        self._coming: dict[Any, Seat] = {}  # by the answer that an engine gives when it has its room
        self._starting: dict[Any, Seat] = {}  # by the answer that it gives when it is up
        self._paused: dict[int, float] = {}  # seats that are tried again, and when
        self._starts = Starts(pauses)
        self.first_up: float | None = None  # seconds until there was an engine
        self._seats = [Seat(number) for number in range(count)]
        for seat in self._seats:
            self._start(seat)

    def __iter__(self) -> Iterator[Seat]:
        return iter(self._seats)

    def __len__(self) -> int:
        return len(self._seats)

    @property
    def started(self) -> int:
        """How many engines are up."""
        return sum(seat.up is not None for seat in self._seats)

    @property
    def empty(self) -> Mapping[int, str]:
        """Those where no engine would start, and why."""
        return self._starts.empty

    @property
    def pending(self) -> list[Any]:
        """The answers that are waited for: give `hear` those that are there."""
        return [*self._starting, *self._coming]

    @property
    def unsure(self) -> set[int]:
        """Those whose engine has yet to say that it is up, or still is."""
        return {seat.number for seat in self._starting.values()}

    def hear(self, ready: Any) -> Seat | None:
        """Of the answers that are `pending`, one that is there. Returns the seat whose engine it says is up. Raises
        what `Starts.fail` raises, and Failed for an engine of other versions."""
        import ray

        if ready in self._coming:
            # The engine has its room, or went before it had: its next answer says which
            seat = self._coming.pop(ready)
            seat.begun = time.monotonic()
            seat.until = seat.begun + self._start_timeout
            self._starting[seat.actor.info.remote()] = seat
            return None
        seat = self._starting.pop(ready)
        seat.until = None
        try:
            info = ray.get(ready)
        except ray.exceptions.RayError as error:
            self._lose(seat, error)
            return None
        self._require_alike(info)
        self._starts.succeed(seat.number)
        if seat.up is None:
            seat.up = time.monotonic()
            seat.took, seat.log = seat.up - seat.begun, info.get("log", "")
            self.first_up = self.first_up or seat.up - self._created
        return seat

    @property
    def resolved(self) -> dict[str, str]:
        """What vLLM chose by itself in all engines, or must; nothing before one is up."""
        return dict(self._resolved)

    def _require_alike(self, info: Mapping[str, Any]) -> None:
        """Raises Failed for an engine whose answers may be others than those that the cache's key, or another engine,
        stands for."""
        for package, here in versions().items():
            if info[package] != here:
                raise Failed(f"an engine runs {package} {info[package]} and this process {here}; make them one")
        on = f"on {info.get('host', 'another machine')}"
        if (found := info.get("device", self._device)) != self._device:
            raise Failed(
                f"an engine {on} computes on {found} and not on {self._device}; mend the GPU's driver there, or "
                "install the build of vLLM and torch that is installed here"
            )
        self._kind = self._kind or info.get("kind", "")
        if (kind := info.get("kind", "")) != self._kind:
            raise Failed(
                f"engines run on {self._kind} and, {on}, on {kind}, where text may differ; set engine.accelerator_type"
            )
        chosen = info.get("resolved", {})
        for name in sorted(self._resolved.keys() & chosen.keys()):
            if chosen[name] != self._resolved[name]:
                raise Failed(
                    f"vLLM chose {name} {chosen[name]} {on}, and for answers {self._resolved_by} "
                    f"{self._resolved[name]}, which may change text; set it alike (engine.max_num_seqs, engine.args), "
                    "or another cache.dir"
                )
        if chosen and not self._resolved:
            self._resolved, self._resolved_by = dict(chosen), on
        ours, theirs = environment(), info.get("environment", environment())
        for name in sorted(ours.keys() | theirs.keys()):
            one, other = theirs.get(name, "not set"), ours.get(name, "not set")
            if one != other:
                raise Failed(f"{name} is {one} {on} and {other} here, which may change text; set it alike")

    def tend(self) -> None:
        """To be called about every second: tries seats again whose pause is over, and ends engines that have not
        started, or not said that they live, in time."""
        now = time.monotonic()
        for number in [number for number, when in self._paused.items() if when <= now]:
            del self._paused[number]
            self._start(self._seats[number])
        for ready, seat in list(self._starting.items()):
            if seat.until is not None and now > seat.until:
                del self._starting[ready]
                self._lose(seat, TimeoutError(_LATE))

    def replace(self, seat: Seat) -> None:
        """Ends the engine of a seat; another comes in its place."""
        kill(seat.actor)
        if seat.up is not None:
            self._lost(seat)
        self._start(seat)

    def ask(self, seats: Sequence[Seat]) -> None:
        """Engines that are idle are to say that they live."""
        for seat in seats:
            seat.until = time.monotonic() + _REPLY
            self._starting[seat.actor.info.remote()] = seat

    def require_any(self) -> None:
        """Raises why there is no engine, where none is up and none can come."""
        if not (self.started or self._starting or self._coming or self._paused):
            raise self._starts.explain()

    def info(self) -> Iterator[tuple[Seat, dict[str, Any]]]:
        """What each engine that is up says of itself."""
        import ray

        for seat in self._seats:
            if seat.up is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    yield seat, ray.get(seat.actor.info.remote(), timeout=_REPLY)

    def stop(self) -> None:
        """Ends every engine, and lets go of all that is Ray's: to free it while another thread leaves the cluster would
        end this process."""
        for seat in self._seats:
            kill(seat.actor)
            seat.actor = seat.ahead = None
        self._coming, self._starting = {}, {}

    def _start(self, seat: Seat) -> None:
        seat.actor, seat.up, seat.at, seat.until, seat.log = self._spawn(seat.number), None, None, None, ""
        seat.cpu_seconds, seat.bytes_read, seat.sent, seat.ahead = 0.0, 0, set(), None
        self._coming[seat.actor.__ray_ready__.remote()] = seat

    def _lose(self, seat: Seat, error: Exception) -> None:
        """The engine of a seat did not start, or an idle one is gone."""
        if seat.up is not None:
            self.replace(seat)
            return
        kill(seat.actor)
        seat.until = None
        why = explain(error, seat.log)
        self._told(seat, why)
        pause = self._starts.fail(seat.number, why, cause(error), self.started)
        if pause is not None:
            self._paused[seat.number] = time.monotonic() + pause


def cause(error: Exception) -> BaseException | None:
    """What an engine raised, None where it died or was silent."""
    return getattr(error, "cause", None)


def explain(error: Exception, log: str) -> str:
    """Why an engine failed, and the end of its log, unless it says so itself."""
    own = cause(error)
    if isinstance(own, BadInput | Failed | Unusable):
        return str(own)
    last = (str(error).strip().splitlines() or [""])[-1].strip()
    return f"{type(own or error).__name__}: {reason(own or last, 500)}{log_end(log)}"


def kill(actor: Any) -> None:
    """Ends an actor, whether or not it lives."""
    import ray

    with contextlib.suppress(Exception):  # whatever Ray says of an actor that is dead or was never there
        ray.kill(actor)
