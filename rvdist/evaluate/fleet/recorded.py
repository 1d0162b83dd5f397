"""What vLLM's reload found out once: which tensor of a checkpoint is given to which loader of which layer.

Later swaps give it to these loaders at once. They leave out vLLM's search and its counting of elements, and nothing
else: what a loader does, and what becomes of a layer then, is vLLM's business. Knows nothing of points.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rvdist.evaluate.fleet.deferred import Deferred, Steps, take
from rvdist.evaluate.fleet.private_vllm import PARAMETER, Weights, noting_layers, reload, reload_layer, replaying


@dataclass
class _Layer:
    """What its loaders are given, but for the tensors, and by which of their arguments they are given those."""

    layer: Any
    weights: Weights
    arguments: list[str] = field(default_factory=list)

    def release(self) -> None:
        """Keeps no tensor."""
        for (_, given), argument in zip(self.weights, self.arguments, strict=True):
            given.arguments.update({argument: None, PARAMETER: None})


class Recorded:
    """Of a rank of vLLM, `worker`: nothing, until the first `load`."""

    def __init__(self, worker: Any) -> None:
        self._worker, self._records = worker, True
        self._layers: list[_Layer] = []
        self._places: dict[str, list[tuple[_Layer, int, Steps]]] = {}  # of each tensor, and what is taken of it
        self._shapes: Mapping[str, Sequence[int]] = {}

    def load(
        self, tensors: Iterator[tuple[str, torch.Tensor]], shapes: Mapping[str, Sequence[int]], expected: set[str]
    ) -> set[str]:
        """Loads the tensors, which have these `shapes`; returns the parameters that were to be loaded and were not.
        The first call records, and forgets it where a loader is given something else than a deferred tensor or a part
        of one, or none what is `expected`."""
        if self._layers and shapes == self._shapes:
            self._replay(tensors)
            return set()
        if not self._records:
            return reload(self._worker, tensors)
        self._records, self._shapes = False, shapes
        with noting_layers(self._note):
            stale = reload(self._worker, tensors)
        if stale or "" in self._places or not expected <= self._places.keys():
            self.forget()
            print("what vLLM loads is not all as it comes; every swap has it search anew", file=sys.stderr, flush=True)
        return stale

    def forget(self) -> bool:
        """Leaves all to vLLM from now on. Whether it did not before."""
        known = bool(self._layers)
        self._layers, self._places = [], {}
        return known

    def _note(self, layer: Any, weights: Weights) -> None:
        noted = _Layer(layer, weights)
        self._layers.append(noted)
        for place, (_, given) in enumerate(weights):
            came = [key for key, value in given.arguments.items() if key != PARAMETER and torch.is_tensor(value)]
            tensor = given.arguments[came[0]] if len(came) == 1 else None
            name, taken = (tensor.origin, tensor.taken) if isinstance(tensor, Deferred) else ("", ())
            self._places.setdefault(name, []).append((noted, place, taken))
            noted.arguments.append(came[0] if came else PARAMETER)
        noted.release()

    def _replay(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        left = {id(layer): len(layer.weights) for layer in self._layers}
        with replaying(self._worker):
            for name, tensor in tensors:
                for layer, place, taken in self._places.get(name, ()):
                    layer.weights[place][1].arguments[layer.arguments[place]] = take(tensor, taken)
                    left[id(layer)] -= 1
                    if not left[id(layer)]:
                        reload_layer(layer.layer, layer.weights)
                        layer.release()
