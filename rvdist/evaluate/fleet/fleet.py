"""The fleet: live engines as Ray actors, and the loop that feeds them what the schedule says. Knows nothing of lm-eval.

Engines start in the background and answer from the moment they are up; those that the cluster has no room for yet
wait for it to grow. A dead engine's slice goes back whole and another engine starts in its place.
"""

from __future__ import annotations

import contextlib
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvdist.core.cluster import live_nodes
from rvdist.core.errors import Failed
from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.actor import EngineActor
from rvdist.evaluate.fleet.arguments import versions
from rvdist.evaluate.fleet.forecast import Forecast
from rvdist.evaluate.fleet.schedule import LETHAL, Schedule, Slice
from rvdist.evaluate.fleet.status import EngineStatus, FleetStats, Status
from rvdist.evaluate.request import Answered, Completion, Progress, Refused, Request

_STARTS = 2  # in a row that may fail before a seat stays empty
_TICK = 1.0  # seconds after which idle engines are asked again, and progress is shown


@dataclass
class _Seat:
    """A place for one engine after another. `up`: when the present one was, None while it starts."""

    number: int
    actor: Any = None
    up: float | None = None
    at: WeightPoint | None = None
    failures: int = 0
    cpu_seconds: float = 0.0  # of the engine, as it last said
    bytes_read: int = 0
    progress: Progress | None = None  # of the slice at which it works


class Fleet:
    """`count` engines on the checkpoint `base`, each of which takes so many `cpus` and `gpus` of the connected Ray
    cluster. Where it has no node that could hold one, it has `patience` seconds to get one. `actor` is what answers,
    made of `base` and `settings`."""

    def __init__(
        self,
        base: str,
        settings: Any,
        count: int,
        cpus: float = 1.0,
        gpus: float = 0.0,
        patience: float = 120.0,
        actor: type[Any] = EngineActor,
    ) -> None:
        import ray

        self._need = {"CPU": cpus, "GPU": gpus}
        actor_class = ray.remote(actor).options(num_cpus=cpus, num_gpus=gpus)
        self._spawn: Callable[[], Any] = lambda: actor_class.remote(base, settings)
        self._home = WeightPoint(base)
        self._patience = patience
        self._created = time.monotonic()
        self._seats = [_Seat(number) for number in range(count)]
        self._starting: dict[Any, _Seat] = {}  # by the answer that an engine gives when it is up
        self._empty: dict[int, str] = {}  # seats where no engine would start, and why
        self.first_up: float | None = None  # seconds until there was an engine
        self.refused: dict[WeightPoint, str] = {}  # in the last call of `answer`: points without a score, and why
        self.stats = FleetStats()
        for seat in self._seats:
            self._start(seat)

    @property
    def size(self) -> int:
        """How many engines it wants."""
        return len(self._seats)

    @property
    def started(self) -> int:
        """How many engines are up."""
        return sum(seat.up is not None for seat in self._seats)

    @property
    def empty(self) -> Mapping[int, str]:
        """Engines that could not be started, and why."""
        return self._empty

    def info(self) -> list[dict[str, Any]]:
        """What each engine that is up says of itself. What it used since it was last asked goes to `stats`."""
        import ray

        found = []
        for seat in self._seats:
            if seat.up is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    found.append(said := ray.get(seat.actor.info.remote()))
                    cpu, read = said.get("cpu_seconds", 0.0), said.get("bytes_read", 0)
                    self.stats.cpu_seconds += cpu - seat.cpu_seconds
                    self.stats.bytes_read += read - seat.bytes_read
                    seat.cpu_seconds, seat.bytes_read = cpu, read
        return found

    def answer(
        self,
        slices: Iterable[Slice],
        requests: Mapping[str, Sequence[Request]],
        keep: Callable[[Slice, Answered], None] = lambda piece, answered: None,
        watch: Callable[[Status], None] = lambda status: None,
    ) -> dict[Slice, Answered]:
        """Every slice answered, but for those of points that are `refused` from there on. `keep` is given each as it
        comes; `watch` what goes on, once a second or oftener.

        Raises Failed where no engine starts, or, after all else is answered, for slices on which engines died again
        and again."""
        import ray

        self.stats, self.refused = FleetStats(), {}
        slices = list(slices)
        schedule, forecast = Schedule(slices, self._home), Forecast(slices, requests)
        answers: dict[Slice, Answered] = {}
        running: dict[Any, tuple[_Seat, Slice]] = {}
        came: list[tuple[Slice, Answered]] = []
        begin = time.monotonic()
        unsure = {seat.number for seat in self._starting.values()}
        for seat in self._seats:
            if seat.up is not None and seat.number not in unsure:
                schedule.join(seat.number, seat.at)
        while True:
            self._feed(schedule, forecast, requests, running)
            for piece, answered in came:  # after the engines were fed: keeping takes its time
                keep(piece, answered)
            watch(self._status(schedule, forecast, running, begin))
            if schedule.over:
                break
            self._require_engines(running)
            came = []
            for ready in _ready([*running, *self._starting]):
                if ready in self._starting:
                    self._welcome(ready, schedule, begin)
                    continue
                seat, piece = running[ready]
                try:
                    found = _next(ready)
                    if isinstance(found, Progress):
                        seat.progress = found
                        forecast.hear(piece, found, time.monotonic())
                        continue
                    del running[ready]
                    answered, swap = found
                except ray.exceptions.RayTaskError as error:
                    for done in came:
                        keep(*done)
                    raise error.cause from None
                except ray.exceptions.RayError:
                    del running[ready]
                    forecast.drop(piece)
                    self._bury(seat, schedule, begin, {busy.number for busy, _ in running.values()})
                    continue
                if isinstance(answered, Refused):
                    self.refused.setdefault(piece.point, answered.reason)
                    forecast.refuse(piece, schedule.refuse(seat.number, swap))
                    self._count_swap(swap)
                    continue
                schedule.finish(seat.number, swap, answered.seconds)
                forecast.finish(piece, answered, time.monotonic())
                self._count(seat, answered, swap)
                answers[piece] = answered
                came.append((piece, answered))
        self._end(begin)
        if schedule.lethal:
            raise Failed(_lament(schedule.lethal))
        return answers

    def stop(self) -> None:
        """Ends every engine."""
        for seat in self._seats:
            _kill(seat.actor)

    def _start(self, seat: _Seat) -> None:
        seat.actor, seat.up, seat.at = self._spawn(), None, None
        seat.cpu_seconds, seat.bytes_read = 0.0, 0
        self._starting[seat.actor.info.remote()] = seat

    def _welcome(self, ready: Any, schedule: Schedule, begin: float) -> None:
        """The engine of a seat is up, or could not start."""
        import ray

        seat = self._starting.pop(ready)
        try:
            info = ray.get(ready)
        except ray.exceptions.RayError as error:
            self._outlive(seat, begin)
            seat.failures += 1
            if getattr(error, "actor_init_failed", False) or seat.failures == _STARTS:
                seat.up = None
                self._empty[seat.number] = str(error).strip().splitlines()[-1].strip()
            else:
                self._start(seat)
            return
        for package, here in versions().items():
            if info[package] != here:
                raise Failed(f"an engine runs {package} {info[package]} and this process {here}; make them one")
        seat.failures = 0
        if seat.up is None:
            seat.up = time.monotonic()
            self.first_up = self.first_up or seat.up - self._created
        schedule.join(seat.number, seat.at)

    def _bury(self, seat: _Seat, schedule: Schedule, begin: float, busy: set[int]) -> None:
        """Another engine for the seat. Idle ones must show that they live before they get what the dead one had:
        they may have gone with the same node."""
        _kill(seat.actor)
        schedule.leave(seat.number)
        self.stats.deaths += 1
        self._outlive(seat, begin)
        self._start(seat)
        checked = {other.number for other in self._starting.values()}
        for other in self._seats:
            if other.up is not None and other.number not in busy | checked:
                schedule.leave(other.number)
                self._starting[other.actor.info.remote()] = other

    def _feed(
        self,
        schedule: Schedule,
        forecast: Forecast,
        requests: Mapping[str, Sequence[Request]],
        running: dict[Any, tuple[_Seat, Slice]],
    ) -> None:
        busy = {seat.number for seat in [*self._starting.values(), *(seat for seat, _ in running.values())]}
        for seat in self._seats:
            if seat.up is None or seat.number in busy:
                continue
            if piece := schedule.take(seat.number, time.monotonic()):
                seat.at, seat.progress = piece.point, None
                forecast.begin(piece, time.monotonic())
                batch = requests[piece.task][piece.begin : piece.end]
                running[seat.actor.answer.remote(piece, batch)] = (seat, piece)

    def _require_engines(self, running: Mapping[Any, Any]) -> None:
        """Raises Failed where nothing works and nothing can come."""
        if running or self.started:
            return
        if not self._starting:
            raise Failed(f"an engine could not start: {next(iter(self._empty.values()))}")
        waited = time.monotonic() - self._created
        if self.first_up is None and waited > self._patience and not self._has_room():
            wanted = " and ".join(f"{amount:g} {kind}s" for kind, amount in self._need.items() if amount)
            raise Failed(
                f"no engine could start in {waited:.0f} s: none of the cluster's nodes has {wanted}, which each takes"
            )

    def _has_room(self) -> bool:
        alive = [node["Resources"] for node in live_nodes()]
        return any(all(node.get(kind, 0) >= amount for kind, amount in self._need.items()) for node in alive)

    def _count(self, seat: _Seat, answered: Answered, swap: float) -> None:
        stats, count = self.stats, len(answered.answers)
        self._count_swap(swap)
        stats.generate += answered.seconds
        stats.requests += count
        stats.tokens += sum(answer.tokens for answer in answered.answers)
        if seat.progress:
            stats.prompt_tokens += seat.progress.read
        else:
            stats.prompt_tokens += sum(one.prompt_tokens for one in answered.answers if isinstance(one, Completion))
        stats.by_engine[seat.number] = stats.by_engine.get(seat.number, 0) + count

    def _count_swap(self, swap: float) -> None:
        self.stats.swap += swap
        self.stats.swaps += swap > 0

    def _outlive(self, seat: _Seat, begin: float) -> None:
        if seat.up is not None:
            self.stats.lifetimes += time.monotonic() - max(seat.up, begin)

    def _end(self, begin: float) -> None:
        for seat in self._seats:
            self._outlive(seat, begin)

    def _status(
        self,
        schedule: Schedule,
        forecast: Forecast,
        running: Mapping[Any, tuple[_Seat, Slice]],
        begin: float,
    ) -> Status:
        now, stats = time.monotonic(), self.stats
        working = {seat.number: piece for seat, piece in running.values()}
        within = {seat.number: seat.progress for seat, _ in running.values() if seat.progress}
        requests = {number: min(found.requests, working[number].count) for number, found in within.items()}
        engines = [
            EngineStatus(
                seat.number,
                seat.up is not None,
                piece.point if (piece := working.get(seat.number)) else None,
                (stats.by_engine.get(seat.number, 0) + requests.get(seat.number, 0))
                / max(now - max(seat.up, begin), _TICK)
                if seat.up is not None
                else 0.0,
                schedule.left(piece.point) if piece else 0,
            )
            for seat in self._seats
            if seat.number not in self._empty
        ]
        return Status(
            tuple(engines),
            stats.requests + sum(requests.values()),
            stats.tokens + sum(found.tokens for found in within.values()),
            forecast.seconds_left(now, self.started),
            stats.prompt_tokens + sum(found.read for found in within.values()),
            sum(piece.count for piece in working.values()),
            stats.requests,
        )


def device_kind(on_gpus: bool) -> str:
    """On what the engines of the connected cluster compute; text may differ between kinds. Of CPUs, it is this
    machine's that is named."""
    import ray

    if on_gpus:
        kinds = [name for name in ray.cluster_resources() if name.startswith("accelerator_type:")]
        return ", ".join(sorted(kind.partition(":")[2] for kind in kinds)) or "GPU"
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _ready(pending: list[Any]) -> list[Any]:
    """All that is there of what is pending; waits for something, but no longer than a tick."""
    import ray

    ready, _ = ray.wait(pending, num_returns=1, timeout=_TICK)
    if ready:
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
    found: list[Any] = ready
    return found


def _next(ready: Any) -> Any:
    """What an engine that tells how far it is says next; of another one its answers."""
    import ray

    return ray.get(next(ready) if isinstance(ready, ray.ObjectRefGenerator) else ready)


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(Exception):  # whatever Ray says of an actor that is dead or was never there
        ray.kill(actor)


def _lament(lethal: Sequence[Slice]) -> str:
    some = ", ".join(f"{piece.task} {piece.begin} to {piece.end - 1}" for piece in lethal[:4])
    more = f" and {len(lethal) - 4} more" if len(lethal) > 4 else ""
    return (
        f"{LETHAL} engines died on each of these slices of requests: {some}{more}; everything else is answered and "
        "need not be again; look at the engines' logs, or lower engine.slice_size"
    )
