"""The workers of one merge on Ray: who does which unit, on which node, and what happens when one of them dies.

A node owns the files it began, since pages that two nodes write in part would be lost on a network file system.
It takes the largest file that is left whenever it has nothing to do, so that a slow node takes fewer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.journal import Written
from rvdist.checkpoint.staging import DISCARD, Staging
from rvdist.errors import BadInput, Failed
from rvdist.merge.plan import Output, OutputFile, Plan, Unit, UnitDone

if TYPE_CHECKING:
    from rvdist.merge.engine import MergeStats

_AHEAD = 2  # units given to a worker at a time, so that it never waits for the driver
_ATTEMPTS = 3  # of a unit whose worker died, and of a worker that dies before it has said a word
_SYNC_BYTES = 1 << 30  # written by a worker before it is asked to make them durable and they are journalled


@dataclass(frozen=True)
class WorkerSettings:
    """How many workers, and what each is: its CPU threads, its device (`cpu` or `cuda`), the share of a GPU it
    takes, and how many seconds the cluster has to find room for all of them, and the first of them to begin."""

    workers: int
    threads: int = 1
    device: str = "cpu"
    gpus: float = 0.0
    timeout: float = 120.0


@dataclass(frozen=True)
class Hello:
    """What a worker says first: its node, the source files (source, name) it cannot read, the outputs it cannot see."""

    node: str
    unreadable: frozenset[tuple[str, str]]
    unseen: tuple[Path, ...]


class WorkerActor:
    """A worker as a Ray actor. Imports torch where it runs: the driver has no need of it."""

    def __init__(
        self, outputs: Sequence[Output], sources: Mapping[str, Checkpoint], dtype: str | None, settings: WorkerSettings
    ) -> None:
        self._made_of = outputs, sources, dtype, settings.threads, settings.device

    def hello(self, needs: Sequence[tuple[str, str]], visible: Sequence[Path]) -> Hello:
        import ray

        from rvdist.merge.worker import MergeWorker

        self._worker = MergeWorker(*self._made_of)
        node = ray.get_runtime_context().get_node_id()
        unseen = tuple(path for path in visible if not path.exists())
        return Hello(node, frozenset(key for key in needs if not self._worker.can_read(*key)), unseen)

    def run(self, unit: Unit, claims: tuple[Written | None, ...]) -> UnitDone:
        return self._worker.run(unit, claims)

    def sync(self) -> None:
        self._worker.sync()


@dataclass(eq=False)
class _Worker:
    """One actor: its node once it has spoken, what it cannot read, what it wrote that is not yet durable, and how
    many of its predecessors died without a word."""

    actor: Any
    bundle: int
    silent_deaths: int = 0
    node: str | None = None
    unreadable: frozenset[tuple[str, str]] = frozenset()
    unsynced: list[tuple[Unit, tuple[str, ...]]] = field(default_factory=list)
    running: int = 0
    cpu_seconds: float = 0.0


@dataclass
class _Task:
    """What a worker was asked: to say hello (nothing else set), a unit, or to make durable what it `wrote`."""

    worker: _Worker
    unit: Unit | None = None
    wrote: list[tuple[Unit, tuple[str, ...]]] = field(default_factory=list)


class Crew:
    """Runs a plan's units on workers spread over the cluster's nodes; the outputs' journals learn what is durable."""

    def __init__(
        self,
        plan: Plan,
        stagings: Sequence[Sequence[Staging | None]],
        sources: Mapping[str, Checkpoint],
        settings: WorkerSettings,
        allow_nonfinite: bool,
        stats: MergeStats,
        progress: Callable[[int], None],
        say: Callable[[str], None],
    ) -> None:
        self._stagings, self._allow_nonfinite = stagings, allow_nonfinite
        self._stats, self._progress, self._say = stats, progress, say
        self._settings, self._count = settings, max(1, min(settings.workers, len(plan.units)))
        self._partial = [
            Output(output.points, tuple(s.partial if s else DISCARD for s in staged))
            for output, staged in zip(plan.outputs, stagings, strict=True)
        ]
        self._sources, self._dtype = dict(sources), plan.dtype
        self._needs = sorted({key for file in plan.files for key in file.needs})
        self._files = list(plan.files)  # that no node has taken yet, largest first
        self._needed_by = {(u.output, u.file): frozenset(file.needs) for file in plan.files for u in file.units}
        self._queues: dict[str, deque[Unit]] = {}  # of each node, units of the files it has taken
        self._deaths: Counter[tuple[int, str, int]] = Counter()  # of workers over a unit: (output, file, start)
        self._workers: list[_Worker] = []
        self._running: dict[Any, _Task] = {}

    def run(self) -> None:
        """Returns when everything is durable and journalled. Raises BadInput and Failed."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        cores = ray.cluster_resources().get("CPU", 1)
        share = min(self._settings.threads, int(cores / self._count * 1000) / 1000)  # more workers than cores may be
        bundle = {"CPU": share} | ({"GPU": self._settings.gpus} if self._settings.gpus else {})
        self._group = placement_group([bundle] * self._count, strategy="SPREAD")
        try:
            if not self._group.wait(self._settings.timeout):
                raise BadInput(self._no_room(bundle))
            self._arguments = (ray.put(self._partial), ray.put(self._sources), self._dtype, self._settings)
            for number in range(self._count):
                self._start(number)
            while self._running:
                self._step()
        finally:
            for worker in self._workers:
                ray.kill(worker.actor)
            remove_placement_group(self._group)

    def _no_room(self, bundle: Mapping[str, float]) -> str:
        import ray

        want = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        free = ray.available_resources()
        have = " and ".join(f"{free.get(name, 0):g} {name}" for name in bundle)
        return (
            f"the cluster found no room for {self._count} workers of {want} each in {self._settings.timeout:g} s: "
            f"{have} are free on its {len(_live_nodes())} nodes; lower merge.workers or wait for more nodes"
        )

    def _start(self, bundle: int, silent_deaths: int = 0) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        resources = self._group.bundle_specs[bundle]
        actor_class = ray.remote(WorkerActor).options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
        )
        worker = _Worker(actor_class.remote(*self._arguments), bundle, silent_deaths)
        self._workers.append(worker)
        visible = [s.visible() for staged in self._stagings for s in staged if s]
        self._running[worker.actor.hello.remote(self._needs, visible)] = _Task(worker)

    def _step(self) -> None:
        """Waits for the next answer and acts on it."""
        import ray

        speechless = all(task.unit is None and not task.wrote for task in self._running.values())
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=self._settings.timeout if speechless else None)
        if not ready:
            raise Failed(
                f"no worker answered in {self._settings.timeout:g} s and none is left; what is done is kept, and the "
                "same command goes on from there"
            )
        task = self._running.pop(ready[0])
        try:
            answer = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError):
            self._bury(task)
        else:
            worker = task.worker
            if isinstance(answer, Hello):
                self._welcome(worker, answer)
            elif task.unit is not None:
                worker.running -= 1
                self._account(worker, task.unit, answer)
            else:
                self._journal(task.wrote)
            self._feed(worker)
        if not any(self._queues.values()) and not self._files:
            if any(worker.node is None for worker in self._workers) and not any(w.running for w in self._workers):
                self._dismiss_late()
        elif not self._running:
            raise Failed(
                "every worker died, perhaps for want of memory or because its node is gone; what is done is kept, "
                "and the same command goes on from there"
            )

    def _welcome(self, worker: _Worker, hello: Hello) -> None:
        if hello.unseen:
            raise BadInput(
                f"{hello.unseen[0].parent}: is not visible on node {hello.node[:8]}; an output must be on a file "
                "system that all nodes share"
            )
        worker.node, worker.unreadable, worker.silent_deaths = hello.node, hello.unreadable, 0
        self._queues.setdefault(hello.node, deque())

    def _feed(self, worker: _Worker) -> None:
        """Keeps a worker busy; when there is nothing left for it, what it wrote is made durable."""
        if worker not in self._workers or worker.node is None:
            return
        queue = self._queues[worker.node]
        while worker.running < _AHEAD:
            if not queue and (file := self._next_file(worker)):
                queue.extend(file.units)
            if not queue:
                break
            unit = queue.popleft()
            key = (unit.file, unit.start, unit.nbytes)
            claims = tuple(staging.claims.get(key) if staging else None for staging in self._stagings[unit.output])
            self._running[worker.actor.run.remote(unit, claims)] = _Task(worker, unit)
            worker.running += 1
        pending = sum(unit.nbytes * len(digests) for unit, digests in worker.unsynced)
        if pending > _SYNC_BYTES or (pending and not worker.running):
            wrote, worker.unsynced = worker.unsynced, []
            self._running[worker.actor.sync.remote()] = _Task(worker, wrote=wrote)

    def _next_file(self, worker: _Worker) -> OutputFile | None:
        """The largest file left whose sources the worker's node can read; of those, one that fewest nodes can."""
        readable = [file for file in self._files if not worker.unreadable & file.needs.keys()]
        if not readable:
            if self._files and not self._running:
                self._require_a_reader(self._files[0])
            return None
        others = {w.node: w.unreadable for w in self._workers if w.node not in (None, worker.node)}
        file = min(readable, key=lambda f: sum(not blind & f.needs.keys() for blind in others.values()))
        self._files.remove(file)
        return file

    def _require_a_reader(self, file: OutputFile) -> None:
        blind = [w.unreadable & file.needs.keys() for w in self._workers]
        if blind and all(blind):
            source, name = min(blind[0])
            checkpoint = self._sources[source]
            path = f"{checkpoint.hub}: {name}" if checkpoint.hub else str(checkpoint.path / name)
            if all(sees == blind[0] for sees in blind):
                raise BadInput(
                    f"{path}: it changed or was truncated, or no node can see it; run again when it is whole"
                )
            raise BadInput(f"{path}: no node has it together with all else that {file.units[0].file} is made of")

    def _account(self, worker: _Worker, unit: Unit, done: UnitDone) -> None:
        if any(done.nonfinite) and not self._allow_nonfinite:
            tensors = ", ".join(segment.tensor for segment in unit.segments[:3])
            raise BadInput(
                f"{sum(done.nonfinite)} results in {unit.file} ({tensors}, …) are infinite or not a number; "
                "choose a smaller alpha, another dtype, or set allow_nonfinite=true"
            )
        stats = self._stats
        stats.bytes_read += done.bytes_read
        stats.bytes_written += done.bytes_written
        stats.peak_anonymous_bytes = max(stats.peak_anonymous_bytes, done.peak_anonymous_bytes)
        stats.began = min(stats.began, done.began)
        stats.cpu_seconds += done.cpu_seconds - worker.cpu_seconds
        worker.cpu_seconds = done.cpu_seconds
        node = str(worker.node)
        stats.nodes[node] = stats.nodes.get(node, 0) + done.bytes_read + done.bytes_written
        self._progress(unit.nbytes * len(done.digests))
        if done.bytes_written:
            worker.unsynced.append((unit, done.digests))

    def _journal(self, wrote: Sequence[tuple[Unit, tuple[str, ...]]]) -> None:
        """Each output's journal learns what is durable in it now."""
        durable: dict[Staging, list[Written]] = {}
        for unit, digests in wrote:
            for staging, digest in zip(self._stagings[unit.output], digests, strict=True):
                if staging is not None:
                    durable.setdefault(staging, []).append(Written(unit.file, unit.start, unit.nbytes, digest))
        for staging, written in durable.items():
            staging.journal(written)

    def _bury(self, task: _Task) -> None:
        """A worker died: what it was doing, and what it wrote without making it durable, is done again by another."""
        import ray

        worker = task.worker
        first = worker in self._workers
        if first:
            self._workers.remove(worker)
            ray.kill(worker.actor)
        again = [unit for unit, _ in task.wrote + worker.unsynced]
        worker.unsynced = []
        if task.unit is not None:
            at = (task.unit.output, task.unit.file, task.unit.start)
            self._deaths[at] += 1
            if self._deaths[at] == _ATTEMPTS:
                raise Failed(
                    f"{task.unit.file}: {_ATTEMPTS} workers died while writing it, perhaps for want of memory; "
                    "what is done is kept, and the same command goes on from there"
                )
            again.append(task.unit)
        if worker.node is not None:
            self._queues[worker.node].extend(again)
        if first:
            self._say(f"a worker on node {str(worker.node)[:8]} died; another takes over what it had not finished")
            silent_deaths = worker.silent_deaths + (worker.node is None)
            if silent_deaths < _ATTEMPTS:
                self._start(worker.bundle, silent_deaths)
        self._disown()
        for other in list(self._workers):
            self._feed(other)

    def _disown(self) -> None:
        """Files of nodes without a worker left are free for the others."""
        alive = {worker.node for worker in self._workers}
        for node, queue in self._queues.items():
            if node in alive or not queue:
                continue
            by_file: dict[tuple[int, str], list[Unit]] = {}
            for unit in queue:
                by_file.setdefault((unit.output, unit.file), []).append(unit)
            queue.clear()
            for key, units in by_file.items():
                self._files.append(OutputFile(tuple(units), dict.fromkeys(self._needed_by[key], 0), 0))

    def _dismiss_late(self) -> None:
        """Everything is done: workers that have not begun are not waited for."""
        late = [worker for worker in self._workers if worker.node is None]
        self._running = {ref: task for ref, task in self._running.items() if task.worker not in late}


def _live_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
