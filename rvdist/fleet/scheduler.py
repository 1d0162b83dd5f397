"""The scheduler: feeds slices of requests, each at a weight point, to live engines. Knows nothing of lm-eval.

Slice boundaries depend only on the requests and the slice size, because a batch's text depends on what is in
it; which engine answers a slice, and when, changes nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rvdist.errors import BadInput, Failed
from rvdist.fleet.engine import Engine, EngineSettings
from rvdist.fleet.request import Answer, Choice, Generate, Request
from rvdist.point import WeightPoint

_ATTEMPTS = 2  # of a slice whose engine died


@dataclass(frozen=True)
class Slice:
    """Requests of one kind at one point; `indices` are their places in the list that was asked."""

    point: WeightPoint
    indices: tuple[int, ...]


@dataclass
class FleetStats:
    """Seconds the engines spent, summed over engines, and the requests each of them answered."""

    swap: float = 0.0
    generate: float = 0.0
    requests: int = 0
    by_engine: dict[int, int] = field(default_factory=dict)


class EngineActor(Engine):
    """An engine as a Ray actor answers a whole slice in one call."""

    def answer(self, point: WeightPoint, requests: Sequence[Request]) -> tuple[list[Answer], float, float]:
        """The answers, the seconds the swap took and the seconds the answering took. Raises BadInput for a prompt
        that does not fit."""
        begin = time.perf_counter()
        self.swap(point)
        swapped = time.perf_counter()
        answers: list[Answer] = []
        try:
            if isinstance(requests[0], Generate):
                answers += self.generate([r for r in requests if isinstance(r, Generate)])
            else:
                answers += self.loglikelihood([r for r in requests if isinstance(r, Choice)])
        except ValueError as error:
            raise BadInput(f"engine.max_model_len, benchmarks.allow_truncation: {error}") from None
        return answers, swapped - begin, time.perf_counter() - swapped


class Fleet:
    """`count` engines on the checkpoint `base`, starting in the background on the connected Ray cluster.

    Each engine has `tensor_parallel_size` whole GPUs, or `cpu_threads` cores for each of its ranks.
    """

    def __init__(self, base: str, settings: EngineSettings, count: int, on_gpus: bool) -> None:
        import ray

        ranks = settings.tensor_parallel_size
        share = ray.cluster_resources().get("CPU", 1) / count  # more engines than cores must not wait for ever
        cores = min(ranks * settings.cpu_threads, int(share * 1000) / 1000)
        options = {"num_cpus": 0, "num_gpus": ranks} if on_gpus else {"num_cpus": cores}
        environment = {"OMP_NUM_THREADS": str(settings.cpu_threads)}
        if ranks == 1:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else every engine binds to the same cores
        actor_class = ray.remote(EngineActor).options(**options, runtime_env={"env_vars": environment})
        self._start: Callable[[], Any] = lambda: actor_class.remote(base, settings)
        self._engines = [self._start() for _ in range(count)]
        self.stats = FleetStats()

    def info(self) -> list[dict[str, Any]]:
        """Waits until every engine is up; what each one is. Raises Failed where one cannot start."""
        import ray

        try:
            found: list[dict[str, Any]] = ray.get([engine.info.remote() for engine in self._engines])
        except ray.exceptions.RayActorError as error:
            raise Failed(f"an engine could not start: {str(error).strip().splitlines()[-1].strip()}") from None
        return found

    def answer(
        self,
        points: Sequence[WeightPoint],
        requests: Sequence[Request],
        slice_size: int,
        progress: Callable[[int], None] = lambda requests: None,
    ) -> dict[WeightPoint, list[Answer]]:
        """Every request answered at every point, in order. `progress` is told how many more are done."""
        import ray

        waiting = {point: deque(cut(point, requests, slice_size)) for point in dict.fromkeys(points)}
        attempts: dict[Slice, int] = {}
        answers: dict[WeightPoint, dict[int, Answer]] = {point: {} for point in waiting}
        at: dict[Any, WeightPoint | None] = dict.fromkeys(self._engines)
        running: dict[Any, tuple[Any, Slice]] = {}

        def feed(engine: Any) -> None:
            point = choose(waiting, at[engine], {p for other, p in at.items() if other is not engine and p is not None})
            if point is not None:
                work = waiting[point].popleft()
                at[engine] = point
                running[engine.answer.remote(point, [requests[i] for i in work.indices])] = (engine, work)

        for engine in self._engines:
            feed(engine)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            engine, work = running.pop(ready)
            try:
                answered, swap, generate = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayActorError:
                attempts[work] = attempts.get(work, 0) + 1
                if attempts[work] == _ATTEMPTS:
                    raise Failed(
                        f"{_ATTEMPTS} engines died while answering the same {len(work.indices)} requests; "
                        "look at the engine's log, or lower engine.slice_size"
                    ) from None
                waiting[work.point].appendleft(work)
                replacement = self._start()
                self._engines[self._engines.index(engine)] = replacement
                del at[engine]
                at[replacement] = None
                feed(replacement)
                continue
            answers[work.point] |= dict(zip(work.indices, answered, strict=True))
            self._count(engine, work, answered, swap, generate)
            progress(len(answered))
            feed(engine)
        return {point: [found[i] for i in range(len(requests))] for point, found in answers.items()}

    def _count(self, engine: Any, work: Slice, answered: Sequence[Answer], swap: float, generate: float) -> None:
        stats, number = self.stats, self._engines.index(engine)
        stats.swap += swap
        stats.generate += generate
        stats.requests += len(answered)
        stats.by_engine[number] = stats.by_engine.get(number, 0) + len(answered)

    def stop(self) -> None:
        """Ends every engine."""
        import ray

        for engine in self._engines:
            ray.kill(engine)


def cut(point: WeightPoint, requests: Sequence[Request], slice_size: int) -> list[Slice]:
    """The slices of one point: requests of one kind, in order, at most `slice_size` together."""
    slices = []
    for kind in (Generate, Choice):
        indices = [i for i, request in enumerate(requests) if isinstance(request, kind)]
        slices += [Slice(point, tuple(indices[k : k + slice_size])) for k in range(0, len(indices), slice_size)]
    return slices


def choose(
    waiting: dict[WeightPoint, deque[Slice]], here: WeightPoint | None, elsewhere: set[WeightPoint]
) -> WeightPoint | None:
    """Which point an idle engine works on: the one it is at, else one no engine is at, else the fullest."""
    left = [point for point, slices in waiting.items() if slices]
    if here in left:
        return here
    untouched = [point for point in left if point not in elsewhere]
    return max(untouched or left, key=lambda point: len(waiting[point]), default=None)
