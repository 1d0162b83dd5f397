"""A command whose workers and engines are objects in its own process: everything that it does to files is real, and a
kill a moment away. Imported before the command, in the process that forks (tests/forked.py).

Workers are real ones; engines make answers up, always the same.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import ray.util.placement_group
import ray.util.scheduling_strategies

from rvdist.core import cluster
from rvdist.evaluate.fleet.arguments import versions
from rvdist.evaluate.request import Answered, Completion, Generate, Loglikelihood
from rvdist.merge import accounts, plan

_NODE = "inline" * 5
_CORES = 2


class _Answer:
    """What a call gave, or raised, which was made at once."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._error = None
        try:
            self._value = call()
        except Exception as error:
            self._error = ray.exceptions.RayTaskError("inline", "", error)

    def get(self) -> Any:
        if self._error:
            raise self._error
        return self._value


class _Actor:
    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        if name == "__ray_ready__":
            return types.SimpleNamespace(remote=lambda: _Answer(lambda: None))
        return types.SimpleNamespace(remote=lambda *given: _Answer(partial(getattr(self._made, name), *given)))


class _Class:
    def __init__(self, made_of: type[Any]) -> None:
        self._of = made_of

    def options(self, **settings: Any) -> _Class:
        return self

    def remote(self, *given: Any) -> _Actor:
        return _Actor(self._of(*given))


def _wait(answers: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
    return answers[:num_returns], answers[num_returns:]


def _group(bundles: list[Any], strategy: str) -> Any:
    return types.SimpleNamespace(bundle_specs=bundles, wait=lambda timeout: True)


class MadeUp:
    """An engine that knows no weights: what it answers depends on the point and the request alone."""

    def __init__(self, base: str, settings: Any) -> None:
        self._at = ""

    def info(self) -> dict[str, Any]:
        return {**versions(), "mode": "made up"}

    def answer(self, piece: Any, requests: Any) -> tuple[Answered, float]:
        if source := os.environ.get("TOUCHED"):  # which is not the same any more
            os.utime(source)
        at = str([term.alpha for term in piece.point.terms])
        moved, self._at = float(at != self._at) / 1000, at
        return Answered(tuple(_made_up(at, request) for request in requests), 0, 0.001 * len(requests)), moved


def _made_up(at: str, request: Any) -> Completion | Loglikelihood:
    number = int.from_bytes(hashlib.blake2b(f"{at}{request}".encode(), digest_size=4).digest(), "big")
    if isinstance(request, Generate):
        return Completion(f"#### {number % 90}", "stop", 9, 3)
    return Loglikelihood(-(number % 1000) / 100, number % 2 == 0, 2)


def _remote(made_of: type[Any]) -> _Class:
    from rvdist.evaluate.fleet.actor import EngineActor

    return _Class(MadeUp if made_of is EngineActor else made_of)


atexit.unregister(ray.shutdown)
ray.remote = _remote
ray.get = lambda answer, timeout=None: answer.get() if isinstance(answer, _Answer) else answer
ray.put = lambda value: value
ray.wait = _wait
ray.kill = lambda actor: None
ray.nodes = lambda: [{"NodeID": _NODE, "Alive": True, "Resources": {"CPU": _CORES}, "NodeManagerHostname": "inline"}]
ray.cluster_resources = ray.available_resources = lambda: {"CPU": _CORES}
ray.get_runtime_context = lambda: types.SimpleNamespace(get_node_id=lambda: _NODE)
groups: Any = sys.modules["ray.util.placement_group"]  # ray.util has a function of that name
groups.placement_group, groups.remove_placement_group = _group, lambda group: None
ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy = lambda *given, **named: None
cluster.connect = lambda *given, **named: cluster.Resources((cluster.Node(_NODE, _CORES, 0),))
cluster.disconnect = lambda: None
cluster.blind_nodes = lambda file: []
plan.UNIT_BYTES = int(os.environ.get("UNIT_BYTES", 64 << 10))
accounts.SYNC_BYTES = 2 * plan.UNIT_BYTES
