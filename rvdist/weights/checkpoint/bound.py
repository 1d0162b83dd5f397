"""Adapters beside what they were trained on: without it, values that were trained themselves are no difference.

A vector names both; whoever computes it binds them, and has one difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rvdist.core.errors import BadInput
from rvdist.core.point import Vector, WeightPoint
from rvdist.weights.checkpoint.difference import BASED, Difference, Dora, needs_base
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.layouts import Relaid, RelaidDifference, lay_out, turn
from rvdist.weights.checkpoint.remapped import map_of

_HALVES = ("F16", "BF16")


def bind(adapter: Checkpoint, base: Checkpoint) -> Difference:
    """The adapter with the differences that need `base`, in fp64 where either is wider than 16 bits, as those of donors
    are; of a tensor with more rows in one of them, of those that both have. What `base` lacks is left out."""
    assert isinstance(adapter, Difference)
    if isinstance(adapter, RelaidDifference):
        assert adapter.inner is not None
        own = replace(base.inner, path=base.path, hub=base.hub) if isinstance(base, Relaid) and base.inner else base
        inner = bind(adapter.inner, lay_out(own, adapter.inner))
        tensors = {}
        for name, spec in adapter.tensors.items():
            holders = adapter.views[name].ranges() if name in adapter.views else [adapter.names[name]]
            held = [inner.tensors[holder] for holder in holders if holder in inner.tensors]
            if len(held) == len(holders):
                widest = max(held, key=lambda one: one.nbytes // max(1, one.numel))
                shape = spec.shape if name in adapter.views else widest.shape
                tensors[name] = replace(spec, dtype=widest.dtype, shape=shape)
        return replace(adapter, tensors=tensors, inner=inner, base=base)
    adapter = turn(adapter, base)
    tensors = {}
    for name, spec in adapter.tensors.items():
        if not isinstance(adapter.forms[name], BASED):
            tensors[name] = spec
        elif name in base.tensors:
            if isinstance(adapter.forms[name], Dora) and spec.shape != base.tensors[name].shape:
                raise BadInput(
                    f"{base.path}: tensor {name} has shape {list(base.tensors[name].shape)} where {adapter.path} has "
                    f"{list(spec.shape)}, and DoRA needs what it was trained on; name that as vector.minus"
                )
            tensors[name] = _bound(spec, base.tensors[name])
    return replace(adapter, tensors=tensors, base=base)


def _bound(spec: TensorSpec, base: TensorSpec) -> TensorSpec:
    dtype = "F32" if spec.dtype in _HALVES and base.dtype in _HALVES else "F64"
    return replace(spec, dtype=dtype, shape=min(spec.shape, base.shape))


def bound(vector: Vector, sources: dict[str, Checkpoint]) -> Vector:
    """`vector`; where it is an adapter that needs its minus, both as one difference, which `sources` then has."""
    if vector.minus is None or not needs_base(sources[vector.plus]):
        return vector
    name = f"{vector.plus} on {vector.minus}"
    if name not in sources:
        sources[name] = bind(sources[vector.plus], sources[vector.minus])
    return Vector(name)


def settle_vector(vector: Vector, sources: Mapping[str, Checkpoint], base: str | None = None) -> Vector:
    """`vector`; an adapter alone where it stands beside the checkpoint it was trained on, as (minus + Δ) − minus is Δ.
    One that needs that checkpoint has it, or else `base`, the target. Raises BadInput where there is neither."""
    plus = sources[vector.plus]
    if needs_base(plus) and vector.minus is None:
        if base is None or vector.rename:
            raise BadInput(
                f"{plus.path}: holds weights that are a difference only from what it was trained on; name the adapter "
                "as vector.plus, and that as vector.minus"
            )
        return replace(vector, minus=base)
    kinds = [isinstance(sources[source], Difference) for source in vector.sources()]
    return replace(vector, minus=None) if kinds == [True, False] and not needs_base(plus) else vector


def settle(point: WeightPoint, sources: Mapping[str, Checkpoint]) -> WeightPoint:
    """`point` with each of its vectors settled, and without a vocabulary that all of its sources have."""
    terms = tuple(replace(term, vector=settle_vector(term.vector, sources, point.base)) for term in point.terms)
    remapped = any(map_of(sources[source]) for source in point.sources())
    return replace(point, terms=terms, vocabulary=point.vocabulary if remapped else None)
