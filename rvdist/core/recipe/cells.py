"""The tensors of a recipe by what its parameters come to for them, told in masks: filters, gradients over the layers.

Source: mergekit 0.1.5, whose rules these are. Knows names of tensors, and nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rvdist.core.point import Mask, Term, Vector, layer_of

Numbers = tuple[float, ...]  # one value, or a gradient over the layers
Rules = list[tuple[str, Numbers]]  # (what the name contains, value), the first that fits counts
_INSIDE_LAYERS = r"(?:.*\.)?\d+(?:\..*)?"


def cells(
    rules: Sequence[Rules], tensors: Iterable[str]
) -> list[tuple[tuple[Numbers | None, ...], bool, tuple[str, ...]]]:
    """The tensors by what their parameters are: (the value of every parameter, whether they are outside the layers,
    patterns of their names, none for all names). Only what is a gradient somewhere parts layers from the others."""
    filters = list(dict.fromkeys(wanted for one in rules for wanted, _ in one if wanted))
    cells: dict[tuple[tuple[Numbers | None, ...], bool], dict[tuple[bool, ...], None]] = {}
    for name in tensors:
        values = tuple(next((value for wanted, value in one if wanted in name), None) for one in rules)
        outside = layer_of(name) is None and any(value is not None and len(value) > 1 for value in values)
        cells.setdefault((values, outside), {})[tuple(wanted in name for wanted in filters)] = None
    return [
        (values, outside, tuple(_pattern(filters, signs) for signs in signatures) if filters else ())
        for (values, outside), signatures in cells.items()
    ]


def _pattern(filters: Sequence[str], contained: Sequence[bool]) -> str:
    """Matches the names that contain just these of the filters."""
    looks = [f"(?{'=' if yes else '!'}.*{re.escape(text)})" for text, yes in zip(filters, contained, strict=True)]
    return "".join(looks) + ".*"


def columns(values: Sequence[Numbers], layers: int) -> list[list[float]]:
    """The values at every layer, or with no layers at their beginning; just one column where there is no gradient."""
    if all(len(value) == 1 for value in values) or not layers:
        return [[value[0] for value in values]]
    places = [layer / (layers - 1) for layer in range(layers)] if layers > 1 else [1.0]
    return [[_interpolate(value, place) for value in values] for place in places]


def _interpolate(gradient: Numbers, place: float) -> float:
    at = place * (len(gradient) - 1)
    low = int(at)
    high = min(len(gradient) - 1, low + 1)
    return (1 - (at - low)) * gradient[low] + (at - low) * gradient[high]


def to_terms(
    vector: Vector, alphas: Numbers, include: tuple[str, ...], outside: bool, layers: int, kept: Numbers
) -> list[Term]:
    """The terms of a vector with these α in one cell, a number or one for each layer; none where all are 0."""
    exclude = (_INSIDE_LAYERS,) if outside else ()
    if not any(alphas):
        return []
    density = kept[:1] if len(set(kept)) == 1 else kept
    if len(alphas) == 1:
        return [Term(alphas[0], vector, Mask(include, exclude), density)]
    return [Term(1.0, vector, Mask(include, exclude, ((0, layers - 1),), alphas), density)]
