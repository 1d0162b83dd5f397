"""The fleet: live engines as Ray actors, and the loop that feeds them what the schedule says. Knows nothing of lm-eval.

Engines start in the background and answer from the moment they are up; those that the cluster has no room for yet
wait for it to grow. An engine that dies, raises or is silent for too long is ended: its slice goes back whole and
another engine starts in its place.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rvdist.core.cluster import live_nodes
from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.actor import EngineActor
from rvdist.evaluate.fleet.failures import Failures
from rvdist.evaluate.fleet.forecast import Forecast
from rvdist.evaluate.fleet.schedule import Part, Schedule, Slice
from rvdist.evaluate.fleet.seats import PAUSES, Seat, Seats, cause, explain
from rvdist.evaluate.fleet.status import EngineStatus, FleetStats, Status
from rvdist.evaluate.request import Answered, Completion, Progress, Refused, Request, Unusable

_SILENCE = 900.0  # seconds without a word from an engine at work that are always granted
_SLOW = 20.0  # times as long as a slice should take, or as its start took, an engine may be silent
_LATE = "it said nothing for too long; if it needs more time, raise engine.timeout"
_TICK = 1.0  # seconds after which idle engines are asked again, and progress is shown


class Fleet:
    """`count` engines on the checkpoint `base`, each of which takes so many `cpus` and `gpus` of the connected Ray
    cluster. Where it has no node that could hold one, it has `patience` seconds to get one. An engine may start for
    `start_timeout` seconds, and say nothing at its work for `timeout` (None: for 15 minutes, or many times as long as
    its slice should take, or as its start took). A start that fails is tried again after each of `pauses` seconds.
    `accelerator_type` is the kind of GPU, by Ray's name, where there may be several. `over_nodes`: the GPUs of an
    engine may be on several nodes. `resolved`: what vLLM must choose, where that is known. `actor` is the class of what
    answers, made of `base` and `settings`."""

    def __init__(
        self,
        base: str,
        settings: Any,
        count: int,
        cpus: float = 1.0,
        gpus: float = 0.0,
        patience: float = 120.0,
        actor: type[Any] = EngineActor,
        timeout: float | None = None,
        start_timeout: float = 1800.0,
        pauses: Sequence[float] = PAUSES,
        accelerator_type: str | None = None,
        over_nodes: bool = False,
        resolved: Mapping[str, str] | None = None,
    ) -> None:
        import ray

        self._over_nodes, self._groups = over_nodes, dict[int, Any]()  # by seat
        self._need = {"CPU": cpus, "GPU": gpus}
        kind = {"accelerator_type": accelerator_type} if accelerator_type else {}
        actor_class, own = ray.remote(actor), dict[str, Any](num_cpus=cpus, num_gpus=gpus, **kind)
        self._home = WeightPoint(base)
        self._patience = patience
        self._created = time.monotonic()
        self._timeout = timeout
        self._failures = Failures()
        self.refused: dict[WeightPoint, str] = {}  # in the last call of `answer`: points without a score, and why
        self.stats = FleetStats()
        self._begin = self._created  # of the present call of `answer`
        self._reads_ahead: bool = getattr(actor, "reads_ahead", False)
        self._left: Counter[tuple[Part, ...]] = Counter()  # slices to answer, by what they ask
        self._asked: dict[tuple[Part, ...], Any] = {}  # where that is, by Ray's reference
        self.seats = Seats(
            lambda number: actor_class.options(**(self._place(number, kind) if over_nodes else own)).remote(
                base, settings
            ),
            count,
            start_timeout,
            pauses,
            device="cuda" if gpus else "cpu",
            told=lambda seat, why: self._failures.add(seat.number, why),
            lost=self._outlive,
            resolved=resolved or {},
        )

    def info(self) -> list[dict[str, Any]]:
        """What each engine that is up says of itself. What it used since it was last asked goes to `stats`."""
        infos = []
        for seat, said in self.seats.info():
            infos.append(said)
            cpu, read = said.get("cpu_seconds", 0.0), said.get("bytes_read", 0)
            self.stats.cpu_seconds += cpu - seat.cpu_seconds
            self.stats.bytes_read += read - seat.bytes_read
            seat.cpu_seconds, seat.bytes_read = cpu, read
        return infos

    def answer(
        self,
        slices: Iterable[Slice],
        requests: Mapping[str, Sequence[Request]],
        keep: Callable[[Mapping[Slice, Answered]], None] = lambda came: None,
        watch: Callable[[Status], None] = lambda status: None,
    ) -> dict[Slice, Answered]:
        """Every slice answered, but for those of points that are `refused` from there on. `keep` is given them as they
        come, those that came at once together; `watch` what goes on, once a second or oftener.

        Raises BadInput for what no engine takes; Failed where no engine starts, where two engines say that none of
        them can serve, or, after all else is answered, for slices on which engines failed again and again."""
        import ray

        self.stats, self.refused, self._failures = FleetStats(), {}, Failures()
        for seat in self.seats:
            seat.sent, seat.ahead = set(), None
        slices = list(slices)
        schedule, forecast = Schedule(slices, self._home), Forecast(slices, requests)
        answers: dict[Slice, Answered] = {}
        self._left, self._asked = Counter(piece.parts for piece in slices), {}
        running: dict[Any, tuple[Seat, Slice]] = {}
        came: dict[Slice, Answered] = {}
        self._begin = time.monotonic()
        for seat in self.seats:
            if seat.up is not None and seat.number not in self.seats.unsure:
                schedule.join(seat.number, seat.at)
        while True:
            self.seats.tend()
            self._feed(schedule, forecast, requests, running)
            if came:  # after the engines were fed: keeping takes its time
                keep(came)
            watch(self._status(schedule, forecast, running))
            if schedule.over:
                break
            self._require_engines(running)
            came = {}
            for ready in _ready([*running, *self.seats.pending]):
                if ready not in running:
                    if up := self.seats.hear(ready):
                        schedule.join(up.number, up.at)
                    continue
                seat, piece = running[ready]
                try:
                    found = _next(ready)
                    if isinstance(found, Progress):
                        seat.progress = found
                        seat.until = time.monotonic() + (self._timeout or _SILENCE)
                        forecast.hear(piece, found, time.monotonic())
                        continue
                    del running[ready]
                    answered, swap = found
                except ray.exceptions.RayError as error:
                    keep(came)
                    came = {}
                    del running[ready]
                    forecast.drop(piece)
                    self._fail(seat, schedule, {busy.number for busy, _ in running.values()}, error)
                    continue
                seat.until = None
                if isinstance(answered, Refused):
                    self.refused.setdefault(piece.point, answered.reason)
                    forecast.refuse(piece, schedule.refuse(seat.number, swap))
                    self._count_swap(swap)
                    self._begin_held(seat, schedule, forecast, running)
                    continue
                schedule.finish(seat.number, swap, answered.seconds)
                forecast.finish(piece, answered, time.monotonic())
                self._begin_held(seat, schedule, forecast, running)
                self._count(seat, answered, swap)
                self._left[piece.parts] -= 1
                if not self._left[piece.parts]:  # nobody is asked that again
                    self._asked.pop(piece.parts, None)
                answers[piece] = answered
                came[piece] = answered
            now = time.monotonic()
            for late, (seat, piece) in list(running.items()):
                if seat.until is not None and now > seat.until:
                    del running[late]
                    forecast.drop(piece)
                    self._fail(seat, schedule, set(), TimeoutError(_LATE))
        self._asked = {}
        for seat in self.seats:
            self._outlive(seat)
        if schedule.lethal:
            raise self._failures.explain_slices(schedule.lethal)
        return answers

    def stop(self) -> None:
        """Ends every engine."""
        self.seats.stop()
        self._asked = {}
        for group in self._groups.values():
            from ray.util.placement_group import remove_placement_group

            with contextlib.suppress(Exception):  # as of actors: whatever Ray says of what is gone already
                remove_placement_group(group)
        self._groups = {}

    def _place(self, number: int, kind: Mapping[str, str]) -> dict[str, Any]:
        """How an engine over several nodes is started: it takes nothing itself, and its ranks find their GPUs in the
        placement group of its seat, which Ray moves where a node of it is gone."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if number not in self._groups:
            bundle = {"GPU": 1.0} | {f"accelerator_type:{name}": 0.001 for name in kind.values()}
            self._groups[number] = placement_group([bundle] * int(self._need["GPU"]), strategy="PACK")
        inside = PlacementGroupSchedulingStrategy(self._groups[number], 0, placement_group_capture_child_tasks=True)
        return {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": inside}

    def _fail(self, seat: Seat, schedule: Schedule, busy: set[int], error: Exception) -> None:
        """Another engine for a seat whose engine died, raised or was silent at work. Raises what is bad
        input, and Failed where two engines say that none can serve."""
        import ray

        why = explain(error, seat.log)
        if isinstance(cause(error), BadInput):
            raise BadInput(why)
        raised = isinstance(error, ray.exceptions.RayTaskError)
        self.stats.deaths += 1
        self._failures.add(seat.number, why, *schedule.leave(seat.number, raised))
        self.seats.replace(seat)
        if isinstance(cause(error), Unusable):
            self._failures.require_usable(why)
        if raised or isinstance(error, TimeoutError):
            return
        # It died. Idle ones must show that they live before they get what it had: they may have gone with its node
        idle = [other for other in self.seats if other.up is not None and other.number not in busy]
        idle = [other for other in idle if other.number not in self.seats.unsure]
        for other in idle:
            schedule.leave(other.number)
        self.seats.ask(idle)

    def _feed(
        self,
        schedule: Schedule,
        forecast: Forecast,
        requests: Mapping[str, Sequence[Request]],
        running: dict[Any, tuple[Seat, Slice]],
    ) -> None:
        busy = self.seats.unsure | {seat.number for seat, _ in running.values()}
        for seat in self.seats:
            if seat.up is None or seat.number in busy:
                continue
            now = time.monotonic()
            if piece := schedule.take(seat.number, now):
                running[self._send(seat, piece, schedule, requests)] = (seat, piece)
                self._expect(seat, piece, schedule, forecast, now)
        for seat, _ in list(running.values()):  # when nobody is idle
            if held := schedule.hold(seat.number):
                seat.ahead = self._send(seat, held, schedule, requests)

    def _send(self, seat: Seat, piece: Slice, schedule: Schedule, requests: Mapping[str, Sequence[Request]]) -> Any:
        """The answer to come, of an engine that may still be at another slice. It is told what it may be asked then, so
        that it makes the prompts ready meanwhile."""
        seat.sent.add(piece.parts)
        after = schedule.after(seat.number) if self._reads_ahead else None
        if after is None or after.parts in seat.sent:
            return seat.actor.answer.remote(piece, self._ask(piece, requests))
        seat.sent.add(after.parts)
        return seat.actor.answer.remote(piece, self._ask(piece, requests), self._ask(after, requests))

    def _ask(self, piece: Slice, requests: Mapping[str, Sequence[Request]]) -> Any:
        """A slice's requests, where every engine finds them: they are sent once to each node, for all points."""
        import ray

        if piece.parts not in self._asked:
            self._asked[piece.parts] = ray.put(tuple(piece.take(requests)))  # of a list Ray packs one by one
        return self._asked[piece.parts]

    def _begin_held(
        self, seat: Seat, schedule: Schedule, forecast: Forecast, running: dict[Any, tuple[Seat, Slice]]
    ) -> None:
        """An engine has answered and is, if it held a slice, at that by now."""
        if seat.ahead is not None:
            now = time.monotonic()
            piece = schedule.take(seat.number, now)
            assert piece is not None
            running[seat.ahead] = (seat, piece)
            seat.ahead = None
            self._expect(seat, piece, schedule, forecast, now)

    def _expect(self, seat: Seat, piece: Slice, schedule: Schedule, forecast: Forecast, now: float) -> None:
        """The engine is at a slice from now on."""
        seat.at, seat.progress = piece.point, None
        expected = max(schedule.due(seat.number) - now, seat.took)
        seat.until = now + (self._timeout or max(_SILENCE, _SLOW * expected))
        forecast.begin(piece, now)

    def _require_engines(self, running: Mapping[Any, Any]) -> None:
        """Raises Failed where nothing works and nothing can come."""
        if running or self.seats.started:
            return
        self.seats.require_any()
        waited = time.monotonic() - self._created
        if self.seats.first_up is None and waited > self._patience and not self._has_room():
            wanted = " and ".join(f"{amount:g} {kind}s" for kind, amount in self._need.items() if amount)
            lack = "all nodes together lack" if self._over_nodes else "none of the cluster's nodes has"
            raise Failed(f"no engine could start in {waited:.0f} s: {lack} {wanted}, which each takes")

    def _has_room(self) -> bool:
        alive = [node["Resources"] for node in live_nodes()]
        if self._over_nodes:
            return bool(sum(node.get("GPU", 0) for node in alive) >= self._need["GPU"])
        return any(all(node.get(kind, 0) >= amount for kind, amount in self._need.items()) for node in alive)

    def _count(self, seat: Seat, answered: Answered, swap: float) -> None:
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

    def _outlive(self, seat: Seat) -> None:
        if seat.up is not None:
            self.stats.lifetimes += time.monotonic() - max(seat.up, self._begin)

    def _status(
        self,
        schedule: Schedule,
        forecast: Forecast,
        running: Mapping[Any, tuple[Seat, Slice]],
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
                / max(now - max(seat.up, self._begin), _TICK)
                if seat.up is not None
                else 0.0,
                schedule.left(piece.point) if piece else 0,
            )
            for seat in self.seats
            if seat.number not in self.seats.empty
        ]
        return Status(
            tuple(engines),
            stats.requests + sum(requests.values()),
            stats.tokens + sum(found.tokens for found in within.values()),
            forecast.seconds_left(now, self.seats.started),
            stats.prompt_tokens + sum(found.read for found in within.values()),
            sum(piece.count for piece in working.values()),
            stats.requests,
            self._failures.told,
        )


def _ready(pending: list[Any]) -> list[Any]:
    """All that is there of what is pending; waits for something, but no longer than a tick."""
    import ray

    if not pending:
        time.sleep(_TICK)
        return []
    ready, _ = ray.wait(pending, num_returns=1, timeout=_TICK)
    if ready:
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
    there: list[Any] = ready
    return there


def _next(ready: Any) -> Any:
    """What an engine that tells how far it is says next; of another one its answers."""
    import ray

    return ray.get(next(ready) if isinstance(ready, ray.ObjectRefGenerator) else ready)
