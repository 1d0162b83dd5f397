"""How much of a vector reaches a base: by tensors, by elements, and by its size ‖m ⊙ v‖, estimated from a sample.

Tensors meet by name, so a model whose names another version of a library spells otherwise gets nothing of what the
vector says of them. Reads a bounded sample, and that only where some of a vector reaches nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass

from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import TensorSpec

LEAST = 0.5  # of ‖m ⊙ v‖, below which a vector is not applied unless one insists
_TENSORS = 512  # sampled of those that are applied, and of those that are not
_PLACES, _ELEMENTS = 4, 1024  # of a sampled tensor, and at each place
_LONGEST_PREFIX = 4  # parts of a name


@dataclass(frozen=True)
class Coverage:
    """What of a vector is applied, and of how much. `size` is the share of ‖m ⊙ v‖, estimated: between tensors of one
    model it varies far more than a sample of one does. None where the vector is 0 wherever it was sampled."""

    tensors: int
    of_tensors: int
    elements: int
    of_elements: int
    size: float | None

    def __str__(self) -> str:
        size = "" if self.size is None else f", {self.size:.0%} of its size ‖v‖ by a sample"
        return (
            f"of the vector {self.tensors} of {self.of_tensors} tensors are applied, {self.elements / 1e6:.4g} of "
            f"{self.of_elements / 1e6:.4g} million elements{size}"
        )


def measure_coverage(
    base: Checkpoint, plus: Checkpoint, minus: Checkpoint | None, coefficient: Callable[[str], float]
) -> Coverage | None:
    """What of plus − minus (of `plus` alone where there is no `minus`) reaches `base`; None where all of it does.
    `coefficient` is m of a tensor. What m leaves out is no part of the vector."""
    vector = {name: spec for name, spec in plus.tensors.items() if spec.is_floating_point and coefficient(name)}
    if minus is not None:
        vector = {name: spec for name, spec in vector.items() if name in minus.tensors}
    applied = {name: spec for name, spec in vector.items() if _reaches(base, name)}
    left = {name: spec for name, spec in vector.items() if name not in applied}
    if not left:
        return None
    inside, outside = (_squared_size(plus, minus, part, coefficient) for part in (applied, left))
    total = inside + outside
    return Coverage(
        len(applied),
        len(vector),
        sum(spec.numel for spec in applied.values()),
        sum(spec.numel for spec in vector.values()),
        math.sqrt(inside / total) if total > 0 else None,
    )


def _reaches(base: Checkpoint, name: str) -> bool:
    return name in base.tensors and base.tensors[name].is_floating_point


def _squared_size(
    plus: Checkpoint, minus: Checkpoint | None, specs: Mapping[str, TensorSpec], coefficient: Callable[[str], float]
) -> float:
    """‖m ⊙ v‖² over these tensors, from the means of a few elements of each, or of evenly many tensors of them."""
    import torch

    from rvdist.weights.values import Values

    names = sorted(name for name, spec in specs.items() if spec.numel)
    chosen = names[:: -(-len(names) // _TENSORS)] if names else []
    out = torch.empty(_ELEMENTS, dtype=torch.float64)
    sources = {"plus": plus} if minus is None else {"plus": plus, "minus": minus}
    square = weight = 0.0
    with closing(Values(sources)) as values:
        for name in chosen:
            numel = values.numel(name, sources)
            squares, count = 0.0, 0
            for begin, end in _places(numel):
                value = values.difference(name, begin, "plus", "minus" if minus else None, out[: end - begin])
                squares += float(value.nan_to_num(0.0, 0.0, 0.0).square().sum())
                count += end - begin
            square += coefficient(name) ** 2 * specs[name].numel * squares / max(1, count)
            weight += specs[name].numel
    whole = sum(specs[name].numel for name in names)
    return square * (whole / weight) if weight else 0.0


def _places(numel: int) -> list[tuple[int, int]]:
    """[begin, end) of what is sampled: all of it, or a few ranges spread evenly."""
    if numel <= _PLACES * _ELEMENTS:
        return [(begin, min(begin + _ELEMENTS, numel)) for begin in range(0, numel, _ELEMENTS)]
    starts = [(2 * k + 1) * numel // (2 * _PLACES) - _ELEMENTS // 2 for k in range(_PLACES)]
    return [(start, start + _ELEMENTS) for start in starts]


def fitting_rename(base: Checkpoint, names: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    """(regular expression, replacement) under which most of these tensors, of which `base` has none by name, are some
    of its own by name and shape; None where no one prefix explains more than half of them."""
    ends: defaultdict[str, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    for name, spec in base.tensors.items():
        for prefix, rest in _cuts(name):
            ends[rest].append((prefix, spec.shape))
    explained: Counter[tuple[str, str]] = Counter()
    for name, spec in names.items():
        explained.update(
            {
                (prefix, its): 1
                for prefix, rest in _cuts(name)
                for its, shape in ends.get(rest, ())
                if shape == spec.shape and its != prefix
            }
        )
    if not explained:
        return None
    (prefix, its), count = min(explained.items(), key=lambda one: (-one[1], len(one[0][0]) + len(one[0][1])))
    if 2 * count <= len(names):
        return None
    firsts = sorted({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
    firsts = [first for first in firsts if any(_rename(base, n, prefix, its, first) for n in names)]
    return f"^{re.escape(prefix)}({'|'.join(map(re.escape, firsts))})\\.", its + "\\1."


def _rename(base: Checkpoint, name: str, prefix: str, its: str, first: str) -> bool:
    rest = name.removeprefix(prefix)
    return name.startswith(prefix) and rest.startswith(first + ".") and its + rest in base.tensors


def _cuts(name: str) -> Iterable[tuple[str, str]]:
    """(prefix, rest) of a name, at the beginning and after each of its first dots."""
    parts = name.split(".")
    for k in range(min(len(parts), _LONGEST_PREFIX + 1)):
        yield "".join(part + "." for part in parts[:k]), ".".join(parts[k:])
