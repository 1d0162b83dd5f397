"""Whether vectors that are added get into each other's way: how alike they are, on a sample of their elements.

Reads some kilobytes of the largest tensors of every source. Why it warns where it does stands in docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations

import torch

from rvdist.core.point import Term, WeightPoint, layer_count
from rvdist.weights.arithmetic.method import torch_threads
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.values import Values

LEAST, MOST = 0.5, 1.7  # of the way along a vector that the sum should go
_TENSORS, _ELEMENTS = 16, 8192


@dataclass(frozen=True)
class Pair:
    """Two vectors of a point, by their numbers, each times its α and mask, on the elements that were sampled.

    `norms`: of the two; `cosine` between them. `overlap`: the elements that both change, of those that either does.
    `agreement`: those of the same sign, of those that both change. None where there are none.
    """

    one: int
    other: int
    norms: tuple[float, float]
    cosine: float | None
    overlap: float | None
    agreement: float | None

    def __str__(self) -> str:
        names = f"vectors[{self.one}] and vectors[{self.other}]"
        if self.overlap is None or self.cosine is None:
            return f"{names}: one of them changes nothing of what was sampled"
        signs = "" if self.agreement is None else f", {self.agreement:.0%} of it in the same direction"
        lengths = " and ".join(f"{norm:.3g}" for norm in self.norms)
        return (
            f"{names}: norms {lengths}, cosine {self.cosine:.3f}; of what either changes both change "
            f"{self.overlap:.0%}{signs} (a sample)"
        ).replace("cosine -", "cosine −")


@dataclass(frozen=True)
class Interference:
    """`pairs` of different vectors, and by the number of each vector `along`: how far the sum goes along it, by how far
    it goes itself, with its α; None of one that changes nothing."""

    pairs: tuple[Pair, ...]
    along: dict[int, float | None]
    alphas: dict[int, float]

    def warnings(self) -> list[str]:
        """A sentence for each vector that the others undo, or that they repeat."""
        said = []
        for number, along in self.along.items():
            most = max(MOST, MOST / abs(self.alphas[number]))
            if along is None or not math.isfinite(along) or LEAST <= along <= most:
                continue
            way = f"vectors[{number}]: along it the sum goes {along:.2f} of its way (a sample)".replace(
                "goes -", "goes −"
            )
            if along < LEAST:
                said.append(
                    f"{way}, since others go against it; stages=[analyze] measures where, and method=ties elects a "
                    "direction for each element"
                )
            else:
                said.append(f"{way}, since others go the same one; choose alphas that add up to about 1")
        return said


def measure_interference(point: WeightPoint, sources: Mapping[str, Checkpoint]) -> Interference:
    """Of the terms of a settled point. Raises BadInput where a file cannot be used, Failed where the Hub does not
    answer."""
    base, terms = sources[point.base], point.active_terms
    numbers = [number for number, term in enumerate(point.terms) if term.alpha != 0]
    used = {source: _ranged(sources[source]) for source in point.sources()}
    layers = layer_count(base.tensors)
    sizes = sorted((spec for spec in base.tensors.values() if spec.is_floating_point), key=lambda spec: -spec.numel)
    taken: list[list[torch.Tensor]] = [[] for _ in terms]
    with torch_threads(1), closing(Values(used)) as values:
        for spec in [spec for spec in sizes if len(spec.shape) > 1][:_TENSORS] or sizes[:_TENSORS]:
            numel = min([spec.numel, *(n for term in terms if (n := _numel(term, spec.name, values)))])
            count = min(numel, _ELEMENTS)
            for term, found in zip(terms, taken, strict=True):
                elements = torch.zeros(count, dtype=torch.float64)
                coefficient = term.alpha * term.mask.coefficient(spec.name, layers)
                if coefficient and _numel(term, spec.name, values):
                    vector = term.vector
                    values.difference(spec.name, (numel - count) // 2, vector.plus, vector.minus, elements)
                    elements.mul_(coefficient)
                found.append(elements)
    whole = [torch.cat(found) if found else torch.empty(0, dtype=torch.float64) for found in taken]
    total = sum(whole, torch.zeros_like(whole[0])) if whole else torch.empty(0)
    squares = [float(own.dot(own)) for own in whole]
    pairs = [(i, j) for i, j in combinations(range(len(terms)), 2) if terms[i].vector != terms[j].vector]
    along = [float(own.dot(total)) / square if square else None for own, square in zip(whole, squares, strict=True)]
    return Interference(
        tuple(_compare((numbers[i], numbers[j]), whole[i], whole[j]) for i, j in pairs),
        dict(zip(numbers, along, strict=True)),
        {number: term.alpha for number, term in zip(numbers, terms, strict=True)},
    )


def _numel(term: Term, name: str, values: Values) -> int:
    """Elements that the vector has of a tensor; 0 where it lacks it."""
    return values.numel(name, term.vector.sources())


def _compare(numbers: tuple[int, int], one: torch.Tensor, other: torch.Tensor) -> Pair:
    norms = float(one.norm()), float(other.norm())
    products = one * other
    shared, same = int(products.count_nonzero()), int((products > 0).sum())
    either = int(one.count_nonzero()) + int(other.count_nonzero()) - shared
    return Pair(
        *numbers,
        norms,
        float(products.sum()) / norms[0] / norms[1] if all(norms) else None,
        shared / either if either else None,
        same / shared if shared else None,
    )


def _ranged(checkpoint: Checkpoint) -> Checkpoint:
    """Of a Hub repository only what is sampled is fetched."""
    if checkpoint.hub is None:
        return checkpoint
    from rvdist.weights.checkpoint.hub import by_ranges

    return by_ranges(checkpoint, {})
