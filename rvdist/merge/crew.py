"""The workers of one merge on Ray: starts them, gives them what the roster says, replaces those that die, and tells
the journals what is durable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from rvdist.core.cluster import live_nodes
from rvdist.core.errors import BadInput, Failed
from rvdist.core.text import reason
from rvdist.merge.accounts import Accounts, MergeStats, Wrote, is_due, place_of
from rvdist.merge.actor import Hello, WorkerActor, WorkerSettings
from rvdist.merge.plan import Plan, Unit, UnitDone
from rvdist.merge.roster import ATTEMPTS, Need, Roster
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.staging import Staging

_AHEAD = 2  # units given to a worker at a time, so that it never waits for the driver
_MOMENT = 3.0  # seconds that an interrupt leaves for making durable what was written
_PATIENCE = 1.0  # seconds without an answer, after which it is seen again which nodes are alive


@dataclass(eq=False)
class _Worker:
    """One actor in a bundle of the placement group. `home`: the node of the worker it replaces, if any; `in_vain`: how
    many of its predecessors in a row died before they had finished a unit; `node`: its own, once it has spoken;
    `running`, `finished`: how many units it is at and has done; `unsynced`: what it wrote that is not durable yet."""

    actor: Any
    bundle: int
    home: str | None = None
    in_vain: int = 0
    node: str | None = None
    unreadable: frozenset[tuple[str, str]] = frozenset()
    running: int = 0
    heard: float = math.inf  # when it last answered, or was given work while it had none
    finished: int = 0
    unsynced: list[Wrote] = field(default_factory=list)
    synced: float = field(default_factory=time.monotonic)  # when it was last asked to make durable what it wrote
    cpu_seconds: float = 0.0


@dataclass
class _Task:
    """What a worker was asked: to say hello (nothing else set), a unit, or to make durable what it `wrote`."""

    worker: _Worker
    unit: Unit | None = None
    wrote: list[Wrote] = field(default_factory=list)

    @property
    def is_hello(self) -> bool:
        return self.unit is None and not self.wrote

    @property
    def units(self) -> list[Unit]:
        return [self.unit] if self.unit else [unit for unit, _ in self.wrote]


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
        self._accounts = Accounts(plan, stagings, sources, allow_nonfinite, stats, progress)
        self._stats, self._progress, self._say = stats, progress, say
        self._settings, self._count = settings, max(1, min(settings.workers, len(plan.units)))
        self._sources, self._dtype = dict(sources), plan.dtype
        self._roster = Roster(plan)
        self._workers: list[_Worker] = []
        self._running: dict[Any, _Task] = {}  # in the order they were asked
        self._why_none_starts = ""
        self._met = math.inf  # when the first worker spoke
        self._is_given = False  # whether a worker was given a unit

    def run(self) -> None:
        """Returns when everything is durable and journalled. Raises BadInput and Failed."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        cores = share_cores([node["Resources"] for node in live_nodes()], self._settings, self._count)
        bundle = {"CPU": cores} | ({"GPU": self._settings.gpus} if self._settings.gpus else {})
        self._group = placement_group([bundle] * self._count, strategy="SPREAD")
        try:
            if not self._group.wait(self._settings.timeout):
                raise BadInput(self._no_room(bundle))
            for number in range(self._count):
                self._start(number)
            self._heard = time.monotonic()
            while self._roster.is_left or any(not task.is_hello for task in self._running.values()):
                self._step()
        except KeyboardInterrupt:
            self._keep()
            raise
        finally:
            for worker in self._workers:
                ray.kill(worker.actor)
            remove_placement_group(self._group)

    @cached_property
    def _made_of(self) -> tuple[Any, ...]:
        """What workers are made of. The first time takes Ray imports, and a worker's process begins meanwhile."""
        import ray

        # Workers of a cluster that is there already stand in other directories than this process
        sources = {name: replace(one, path=one.path.absolute()) for name, one in self._sources.items()}
        return ray.put(self._accounts.partial), ray.put(sources), self._dtype, self._settings

    @property
    def _is_gathering(self) -> bool:
        """Whether files are not given out yet: workers that speak within a moment of the first begin together, so
        that it is known which node can read what."""
        missing = any(worker.node is None and worker.home is None for worker in self._workers)
        return missing and time.monotonic() - self._met < _PATIENCE

    def _no_room(self, bundle: Mapping[str, float]) -> str:
        import ray

        want = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        free = ray.available_resources()
        have = " and ".join(f"{free.get(name, 0):g} {name}" for name in bundle)
        return (
            f"the cluster found no room for {self._count} workers of {want} each in {self._settings.timeout:g} s: "
            f"{have} are free on its {len(live_nodes())} nodes; lower merge.workers or wait for more nodes"
        )

    def _start(self, bundle: int, home: str | None = None, in_vain: int = 0) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        resources = self._group.bundle_specs[bundle]
        actor_class = ray.remote(WorkerActor).options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
        )
        worker = _Worker(actor_class.remote(), bundle, home, in_vain)
        self._workers.append(worker)
        hello = worker.actor.hello.remote(*self._made_of, self._roster.needs, self._accounts.probes)
        self._running[hello] = _Task(worker)

    def _step(self) -> None:
        """Waits for the next answer and acts on it."""
        import ray

        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=_PATIENCE)
        self._replace_silent()
        if not ready:
            self._rescue()
            return
        if ready[0] not in self._running:
            return
        self._heard = time.monotonic()
        task = self._running[ready[0]]
        try:
            answer = ray.get(ready[0])
        except ray.exceptions.RayError as error:
            if isinstance(cause := getattr(error, "cause", None), BadInput | Failed):
                raise cause from None
            self._replace(task.worker, error, task if isinstance(error, ray.exceptions.RayTaskError) else None)
        else:
            del self._running[ready[0]]
            task.worker.heard = time.monotonic()
            if isinstance(answer, Hello):
                self._welcome(task.worker, answer)
                for worker in self._workers:
                    self._feed(worker)
            elif task.unit is not None:
                self._account(task.worker, task.unit, answer)
            else:
                self._accounts.journal(task.wrote)
            self._feed(task.worker)
        if self._roster.is_left and not self._running:
            self._rescue()
            if not self._running:
                raise self._stuck()

    def _welcome(self, worker: _Worker, hello: Hello) -> None:
        if hello.unseen:
            sentence = (
                f"{hello.unseen[0].parent}: is not visible on node {hello.node[:8]}; an output must be on a file "
                "system that all nodes share"
            )
            raise BadInput(sentence) if worker.home is None else Failed(sentence)
        self._met = min(self._met, time.monotonic())
        worker.node, worker.unreadable = hello.node, hello.unreadable
        self._roster.meet(hello.node, hello.unreadable)
        if all(worker.node for worker in self._workers) and (lack := self._roster.unreadable()):
            path = self._path(lack.need)
            raise BadInput(
                f"{path}: no node has it together with all else that {lack.file} is made of"
                if lack.together
                else f"{path}: it changed or was truncated, or no node can see it; run again when it is whole"
            )
        if worker.home not in (None, worker.node):
            self._free_files()

    def _path(self, need: Need) -> str:
        source, name = need
        return place_of(self._sources[source], name)

    def _feed(self, worker: _Worker) -> None:
        """Keeps a worker busy; when there is nothing left for it, what it wrote is made durable."""
        if worker.node is None or self._is_gathering:
            return
        others = {w.node: w.unreadable for w in self._workers if w.node is not None and w.node != worker.node}
        asked = [task for task in self._running.values() if task.worker is worker]
        if any(task.unit and self._roster.is_suspect(task.unit) for task in asked):
            return
        if not asked:
            worker.heard = time.monotonic()
        idle = not asked and not worker.unsynced
        while worker.running < _AHEAD and (unit := self._roster.take(worker.node, worker.unreadable, others, idle)):
            if not self._is_given:
                self._is_given = True
                self._progress(0)
            self._running[worker.actor.run.remote(unit, self._accounts.claims(unit))] = _Task(worker, unit)
            worker.running += 1
            if self._roster.is_suspect(unit):
                return
            idle = False
        if worker.unsynced and (is_due(worker.unsynced, worker.synced) or not worker.running):
            self._sync(worker)

    def _sync(self, worker: _Worker) -> None:
        """Asks a worker to make durable what it wrote, after the units that it was given before."""
        wrote, worker.unsynced, worker.synced = worker.unsynced, [], time.monotonic()
        self._running[worker.actor.sync.remote()] = _Task(worker, wrote=wrote)

    def _keep(self) -> None:
        """Makes durable and journals what was written, as far as workers come to it in a moment: one that is at a long
        unit does not."""
        import ray

        until = time.monotonic() + _MOMENT
        for worker in self._workers:
            if worker.unsynced:
                self._sync(worker)
        while any(task.wrote for task in self._running.values()):
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=max(0.0, until - time.monotonic()))
            if not ready:
                return
            if wrote := self._running.pop(ready[0]).wrote:
                with suppress(ray.exceptions.RayError, BadInput, Failed):  # what is lost is done again
                    ray.get(ready[0])
                    self._accounts.journal(wrote)

    def _account(self, worker: _Worker, unit: Unit, done: UnitDone) -> None:
        self._accounts.count(unit, done, str(worker.node))
        self._stats.cpu_seconds += done.cpu_seconds - worker.cpu_seconds
        worker.cpu_seconds = done.cpu_seconds
        worker.running -= 1
        worker.finished += 1
        if done.bytes_written:
            worker.unsynced.append((unit, done.digests))

    def _replace_silent(self) -> None:
        """Ends the workers that have not answered for too long."""
        now, silence = time.monotonic(), self._settings.silence
        for worker in {task.worker for task in self._running.values() if not task.is_hello}:
            if now - worker.heard > silence:
                late = f"it said nothing for {silence:g} s; if it needs more, raise merge.timeout"
                self._replace(worker, TimeoutError(late))

    def _replace(self, worker: _Worker, error: Exception, task: _Task | None = None) -> None:
        """A worker died, was silent, or raised at a `task`: what it was doing, and what it wrote without making it
        durable, is done again by another. Of the tasks of one that died the first may be done, its answer lost."""
        import ray

        asked = [one for one in self._running.values() if one.worker is worker]
        self._running = {ref: one for ref, one in self._running.items() if one.worker is not worker}
        self._workers.remove(worker)
        ray.kill(worker.actor)
        speechless = worker.node is None
        raised = isinstance(error, ray.exceptions.RayTaskError | TimeoutError)
        failed = (
            getattr(error, "actor_init_failed", False)
            or isinstance(error, ray.exceptions.RuntimeEnvSetupError)
            or (raised and speechless)
        )
        why = f" ({reason(getattr(error, 'cause', None) or error, 300)})" if raised else ""
        self._why_none_starts = reason(str(error).strip().splitlines()[-1], 500) if failed else ""
        lost = [unit for one in asked for unit in one.units]
        known = task is not None or len(asked) == 1
        if lethal := self._roster.count_deaths(task.units if task else lost, known):
            raise Failed(
                f"{lethal.file}: {ATTEMPTS} workers {'failed' if why else 'died'} while writing it"
                f"{why or ', perhaps for want of memory'}; what is done is kept, and the same command goes on from "
                "there"
            )
        if worker.node is not None:
            self._roster.give_back(worker.node, lost + [unit for unit, _ in worker.unsynced])
        home, in_vain = worker.node or worker.home, worker.in_vain + 1 if known and not worker.finished else 0
        patience = ATTEMPTS - any(w.node for w in self._workers)
        self._say(
            f"a worker {f'on node {home[:8]} ' if home else ''}{'failed' if why else 'died'}"
            f"{' before it could begin' if speechless else ''}{why}; "
            + ("another takes its place" if in_vain < patience else "those that are left do its work")
        )
        if in_vain < patience:
            self._start(worker.bundle, home, in_vain)
        self._rescue()

    def _rescue(self) -> None:
        """Gives the files of nodes that are gone to those that are left."""
        silent = time.monotonic() - self._heard > self._settings.timeout
        for worker in self._workers:
            if silent and worker.home:  # who comes to replace another may never find room there
                worker.home = ""
        self._free_files()
        for worker in self._workers:
            self._feed(worker)
        if silent and self._roster.is_left and all(task.is_hello for task in self._running.values()):
            raise self._stuck()
        if silent:
            nodes = sorted({str(task.worker.node)[:8] for task in self._running.values() if not task.is_hello})
            self._say(f"no worker has answered for {self._settings.timeout:g} s; waiting for nodes {', '.join(nodes)}")
            self._heard = time.monotonic()

    def _free_files(self) -> None:
        """Files of a node are free for others when it has no worker left and, if it lives, none will come: another
        node must not write into a file of which this one may still hold pages."""
        orphaned = self._roster.orphans({worker.node for worker in self._workers})
        if not orphaned:
            return
        coming = {worker.home for worker in self._workers if worker.node is None}
        alive = {node["NodeID"] for node in live_nodes()}
        for node in orphaned:
            if node not in coming or node not in alive:
                self._roster.free(node)

    def _stuck(self) -> Exception:
        """Why nobody can go on."""
        kept = "what is done is kept, and the same command goes on from there"
        here = [worker for worker in self._workers if worker.node]
        if here and (need := self._roster.missing(here[0].unreadable)):
            return Failed(f"{self._path(need)}: the node that could read it is gone; {kept} when it is back")
        if self._why_none_starts:
            return Failed(f"no worker could start: {self._why_none_starts}; {kept}")
        if not self._roster.has_met_a_node and not self._workers:
            return Failed(
                "every worker died before it could begin; Ray's logs on the nodes say why (such as another version "
                f"of Python or Ray there, or a token that only one side has); {kept}"
            )
        if not self._roster.has_met_a_node:
            return Failed(f"no worker has begun in {self._settings.timeout:g} s; raise cluster.timeout; {kept}")
        return Failed(
            "every worker died, perhaps for want of memory or because its node is gone, and none could be started in "
            f"its place; {kept}"
        )


def share_cores(nodes: Sequence[Mapping[str, float]], settings: WorkerSettings, count: int) -> float:
    """The cores that each of `count` workers gets of nodes with such resources: its threads, or the most that lets all
    of them fit where there are fewer. Workers that take GPUs fit where there are some."""
    room = [
        (has.get("CPU", 0.0), int(has.get("GPU", 0)) * int(1 / settings.gpus) if settings.gpus else count)
        for has in nodes
    ]
    threads = float(settings.threads)
    parts = {int(cores / k * 1000) / 1000 for cores, most in room if most for k in range(1, count + 1)}
    for share in sorted((part for part in parts if 0 < part < threads), reverse=True):
        if sum(min(int(cores / threads), most) for cores, most in room) >= count:
            break
        threads = share
    return threads
