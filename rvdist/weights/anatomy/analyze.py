"""Streams vectors beside a target and measures them: one pass over the tensors of all sources, in chunks.

A tensor's sums are kept, its elements are not; layers, kinds and the whole are sums of those. Matrices whose spectrum
is wanted are read again, right after, by rows (see `spectrum`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from rvdist.core.errors import BadInput
from rvdist.core.point import Vector, layer_of
from rvdist.weights.anatomy.findings import Anatomy, Measures, Part, Spectrum
from rvdist.weights.anatomy.kind import in_order, kind_of
from rvdist.weights.anatomy.spectrum import spectrum
from rvdist.weights.anatomy.sums import BLOCK, Dot, Floats
from rvdist.weights.arithmetic.method import torch_threads
from rvdist.weights.checkpoint.bound import settle_vector
from rvdist.weights.checkpoint.difference import Difference
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.values import AT_ONCE, Values

THRESHOLDS = (1e-3, 1e-2, 1e-1)
assert AT_ONCE % BLOCK == 0


def analyze(
    vectors: Mapping[str, Vector],
    target: str,
    sources: Mapping[str, Checkpoint],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    spectra: bool = True,
    progress: Callable[[int], None] = lambda nbytes: None,
    account: Callable[[int], None] = lambda nbytes: None,
) -> Anatomy:
    """Measures `vectors`, by what they are called, beside the source `target`; `compat.check` has let them pass.

    v is plus − minus in fp64; an adapter's own difference, which begins at minus where minus is a checkpoint. Of a
    tensor that has more rows in one source than in another, v has those that all of its own have. `progress` is told
    how many bytes of the target are done since it was last told, `account` how many were read in all. The numbers do
    not depend on chunks or threads, to the bit; those of spectra, to fp64's rounding.

    Raises BadInput where v or θ is not finite or a source cannot be used, Failed where the Hub does not answer.
    """
    base = sources[target]
    names = list(vectors)
    displacements = [_displacement(vector, sources, target) for vector in vectors.values()]
    used = {target, *(source for vector in vectors.values() for source in vector.sources())}
    tensors: list[_Tensor] = []
    opened = closing(Values({source: sources[source] for source in used}))
    with torch_threads(1), np.errstate(over="ignore", invalid="ignore"), opened as values:
        for spec in base.tensors.values():
            if spec.is_floating_point:
                surveyed = _survey(spec.name, target, displacements, values, thresholds)
                _require_finite(surveyed, names, sources, target, displacements)
                if spectra and len(spec.shape) == 2:
                    _add_spectra(surveyed, spec.shape[1], displacements, values)
                tensors.append(surveyed)
            progress(spec.nbytes)
        account(values.bytes_read)
    for source in used:
        sources[source].require_unchanged()
    if not any(one.elements for tensor in tensors for one in tensor.vectors):
        raise BadInput(f"{base.path}: has no floating-point tensor in common with a vector; check the sources")
    return _findings(base.path.name, names, tuple(thresholds), tensors)


@dataclass(frozen=True)
class _Displacement:
    """What v is computed from, and the checkpoint it begins at, if it begins at one."""

    vector: Vector
    origin: str | None


def _displacement(vector: Vector, sources: Mapping[str, Checkpoint], target: str) -> _Displacement:
    begins = vector.minus is not None and not isinstance(sources[vector.minus], Difference)
    return _Displacement(settle_vector(vector, sources, target), vector.minus if begins else None)


@dataclass
class _Sums:
    """Of one vector on one tensor. `shared`: ‖θ‖² where the origin is too, `distance`: ‖θ − origin‖² there."""

    elements: int = 0
    square: float = 0.0
    largest: float = 0.0
    zeros: int = 0
    below: tuple[int, ...] = ()
    shared: float = 0.0
    distance: float = 0.0
    toward: float = 0.0
    spectrum: Spectrum | None = None


@dataclass
class _Tensor:
    """Of one tensor: `square` is ‖θ‖², `dots` the inner products of the vectors i < j, `signs` how many elements both
    change, and how many of these in the same direction."""

    name: str
    elements: int
    square: float
    vectors: list[_Sums]
    dots: dict[tuple[int, int], float] = field(default_factory=dict)
    signs: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)


def _survey(
    name: str, target: str, displacements: Sequence[_Displacement], values: Values, thresholds: Sequence[float]
) -> _Tensor:
    count = len(displacements)
    numel = values.numel(name, [target])
    covered = [values.numel(name, [target, *one.vector.sources()]) for one in displacements]
    shared = [values.numel(name, [target, one.origin]) if one.origin else 0 for one in displacements]
    sums = [_Sums(elements=elements, below=(0,) * len(thresholds)) for elements in covered]
    square = Dot()
    own, common, distance, toward = ([Dot() for _ in displacements] for _ in range(4))
    dots = {(i, j): Dot() for i in range(count) for j in range(i + 1, count)}
    signs = dict.fromkeys(dots, (0, 0))
    room = np.empty((count + 4, AT_ONCE))

    def fill(vector: Vector, out: Floats) -> Floats:
        values.difference(name, begin, vector.plus, vector.minus, torch.from_numpy(out))
        return out

    for begin in range(0, numel, AT_ONCE):
        end = min(begin + AT_ONCE, numel)
        theta, size, apart, scratch = (row[: end - begin] for row in room[count:])
        fill(Vector(target), theta)
        square.add(theta, theta, scratch)
        taken = []
        for k, one in enumerate(displacements):
            v = room[k, : max(0, min(end, covered[k]) - begin)]
            taken.append(fill(one.vector, v))
            if one.origin is not None:
                ours = theta[: max(0, shared[k] - begin)]
                d = fill(Vector(one.origin), apart[: len(ours)])
                np.subtract(ours, d, out=d)
                common[k].add(ours, ours, scratch)
                distance[k].add(d, d, scratch)
                both = min(len(d), len(v))
                toward[k].add(d[:both], v[:both], scratch)
        np.abs(theta, out=theta)
        for k, v in enumerate(taken):
            own[k].add(v, v, scratch)
            for j in range(k + 1, count):
                both = min(len(v), len(taken[j]))
                dots[k, j].add(v[:both], taken[j][:both], scratch)
                np.multiply(np.sign(v[:both]), np.sign(taken[j][:both]), out=scratch[:both])
                shared_by, same = signs[k, j]
                shared_by += int(np.count_nonzero(scratch[:both]))
                signs[k, j] = shared_by, same + int(np.count_nonzero(scratch[:both] > 0))
            _count(sums[k], np.abs(v, out=size[: len(v)]), theta[: len(v)], thresholds, scratch[: len(v)])
    for k, one_sums in enumerate(sums):
        one_sums.square, one_sums.shared = own[k].value, common[k].value
        one_sums.distance, one_sums.toward = distance[k].value, toward[k].value
    return _Tensor(name, numel, square.value, sums, {pair: dot.value for pair, dot in dots.items()}, signs)


def _count(sums: _Sums, size: Floats, theta: Floats, thresholds: Sequence[float], scratch: Floats) -> None:
    """Adds a chunk of |v| and |θ|."""
    if len(size):
        sums.largest = float(np.maximum(sums.largest, size.max()))
        sums.zeros += len(size) - int(np.count_nonzero(size))
        within = [int(np.count_nonzero(size <= np.multiply(theta, limit, out=scratch))) for limit in thresholds]
        sums.below = tuple(before + count for before, count in zip(sums.below, within, strict=True))


def _require_finite(
    tensor: _Tensor,
    names: Sequence[str],
    sources: Mapping[str, Checkpoint],
    target: str,
    displacements: Sequence[_Displacement],
) -> None:
    suspects = {str(sources[target].path): tensor.square}
    for name, one, sums in zip(names, displacements, tensor.vectors, strict=True):
        suspects[f"vector {name}"] = sums.square
        if one.origin is not None:
            suspects[str(sources[one.origin].path)] = sums.distance
    for suspect, square in suspects.items():
        if not math.isfinite(square):
            raise BadInput(
                f"{suspect}: tensor {tensor.name} is infinite or not a number in places, or too large to be squared; "
                "check the checkpoints"
            )


def _add_spectra(tensor: _Tensor, columns: int, displacements: Sequence[_Displacement], values: Values) -> None:
    for one, sums in zip(displacements, tensor.vectors, strict=True):
        if sums.square:

            def read(first: int, rows: Floats, one: _Displacement = one) -> None:
                flat = torch.from_numpy(rows.reshape(-1))
                values.difference(tensor.name, first * columns, one.vector.plus, one.vector.minus, flat)

            sums.spectrum = spectrum(read, (sums.elements // columns, columns), sums.square)


def _findings(target: str, names: Sequence[str], thresholds: tuple[float, ...], tensors: Sequence[_Tensor]) -> Anatomy:
    cells: dict[tuple[int | None, str], list[_Tensor]] = {}
    for tensor in tensors:
        cells.setdefault((layer_of(tensor.name), kind_of(tensor.name)), []).append(tensor)
    layers = [*sorted({layer for layer, _ in cells if layer is not None}), None]
    kinds = in_order(kind for _, kind in cells)

    def within(layer: int | None = None, kind: str | None = None) -> list[_Tensor]:
        return [
            t
            for (own, what), members in cells.items()
            if layer in (None, own) and kind in (None, what)
            for t in members
        ]

    return Anatomy(
        target=target,
        vectors=tuple(names),
        thresholds=thresholds,
        whole=_part("all", None, None, names, tensors),
        layers=tuple(_part(f"layer {n}", n, None, names, within(layer=n)) for n in layers if n is not None),
        kinds=tuple(_part(kind, None, kind, names, within(kind=kind)) for kind in kinds),
        cells=tuple(
            _part(kind if n is None else f"layer {n} {kind}", n, kind, names, cells[n, kind])
            for n in layers
            for kind in kinds
            if (n, kind) in cells
        ),
        tensors=tuple(_tensor_part(names, tensor) for tensor in tensors),
    )


def _tensor_part(names: Sequence[str], tensor: _Tensor) -> Part:
    part = _part(tensor.name, layer_of(tensor.name), kind_of(tensor.name), names, [tensor])
    spectra = {name: sums.spectrum for name, sums in zip(names, tensor.vectors, strict=True)}
    return replace(part, vectors={name: replace(own, spectrum=spectra[name]) for name, own in part.vectors.items()})


def _part(name: str, layer: int | None, kind: str | None, names: Sequence[str], members: Sequence[_Tensor]) -> Part:
    norm = math.sqrt(math.fsum(tensor.square for tensor in members))
    sums = {vector: [tensor.vectors[k] for tensor in members] for k, vector in enumerate(names)}
    measured = {vector: _measures(own, norm) for vector, own in sums.items() if any(one.elements for one in own)}
    norms = [measured[vector].norm if vector in measured else 0.0 for vector in names]

    def cosine(i: int, j: int) -> float | None:
        if i == j:
            return 1.0 if norms[i] else None
        pair = (min(i, j), max(i, j))
        return _cosine(math.fsum(tensor.dots[pair] for tensor in members), norms[i], norms[j])

    changed = [sum(one.elements - one.zeros for one in own) for own in sums.values()]

    def shares(i: int, j: int) -> tuple[float | None, float | None]:
        """Of what either changes what both do, and of that what in the same direction."""
        if i == j:
            return (1.0, 1.0) if changed[i] else (None, None)
        pair = (min(i, j), max(i, j))
        both, same = (sum(tensor.signs[pair][k] for tensor in members) for k in (0, 1))
        either = changed[i] + changed[j] - both
        return both / either if either else None, same / both if both else None

    pairs = [[shares(i, j) for j in range(len(names))] for i in range(len(names))]
    return Part(
        name=name,
        layer=layer,
        kind=kind,
        elements=sum(tensor.elements for tensor in members),
        norm=norm,
        vectors=measured,
        cosines=tuple(tuple(cosine(i, j) for j in range(len(names))) for i in range(len(names))),
        overlaps=tuple(tuple(overlap for overlap, _ in row) for row in pairs),
        agreements=tuple(tuple(agreement for _, agreement in row) for row in pairs),
    )


def _measures(sums: Sequence[_Sums], theta: float) -> Measures:
    elements = sum(one.elements for one in sums)
    norm = math.sqrt(math.fsum(one.square for one in sums))
    distance = math.sqrt(math.fsum(one.distance for one in sums))
    shared = math.sqrt(math.fsum(one.shared for one in sums))
    return Measures(
        elements=elements,
        norm=norm,
        relative=norm / theta if theta else None,
        largest=max(one.largest for one in sums),
        zeros=sum(one.zeros for one in sums) / elements,
        below=tuple(sum(counts) / elements for counts in zip(*(one.below for one in sums), strict=True)),
        distance=distance / shared if shared else None,
        toward=_cosine(math.fsum(one.toward for one in sums), norm, distance),
        reach=norm / distance if distance else None,
    )


def _cosine(dot: float, one: float, other: float) -> float | None:
    return max(-1.0, min(1.0, dot / one / other)) if one and other else None
