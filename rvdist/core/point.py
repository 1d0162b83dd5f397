"""The weight point: a name for a model that need not exist.

    θ_base + Σ_k α_k (m_k ⊙ v_k)        v_k = plus_k − minus_k

A point says which checkpoints and which coefficients; it knows nothing of bytes, tensors,
Ray or vLLM. The merge path writes points as checkpoints, the fleet path scores them in place.
Source: task vectors (arXiv 2509.01363, section 3; arXiv 2212.04089).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from rvdist.core.method import LINEAR, MethodSpec
from rvdist.core.vocabulary import Vocabulary

Rename = tuple[tuple[str, str], ...]
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to: the first all-digit component of its dotted name."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def with_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer."""
    match = _LAYER.search(name)
    return f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}" if match else name


def name_of(source: str) -> str:
    """What a source is called: the last component of its path, whatever that is written as (`.`, `a/b/`, `a/..`)."""
    return os.path.basename(os.path.abspath(os.path.expanduser(source)))


def layer_count(names: Iterable[str]) -> int:
    """How many layers these tensor names speak of: one more than the highest."""
    return max((layer for name in names if (layer := layer_of(name)) is not None), default=-1) + 1


def _interpolate(numbers: tuple[float, ...], at: float) -> float:
    """Of numbers that stand at 0, 1, 2, … the one at `at`, linearly between two."""
    low = min(int(at), len(numbers) - 1)
    high = min(low + 1, len(numbers) - 1)
    return numbers[low] + (at - low) * (numbers[high] - numbers[low])


@dataclass(frozen=True)
class Mask:
    """The paper's m: a coefficient for each tensor, from its name and its layer.

    `include` and `exclude` are regular expressions matched against the whole tensor name; an empty
    `include` means every name. `layers` are inclusive ranges; when any is given, tensors outside
    the layers (embeddings, final norm) are masked out too. `depth` lists coefficients from the first
    layer to the last, interpolated linearly in between; tensors outside the layers keep 1. Raises
    ValueError for a bad pattern, range or number.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: tuple[tuple[int, int], ...] = ()
    depth: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"mask pattern {pattern!r} is not a regular expression: {error}") from None
        for span in self.layers:
            if len(span) != 2 or not 0 <= span[0] <= span[1]:
                raise ValueError(f"mask layers {list(span)} is not a range [first, last] with 0 <= first <= last")
        for number in self.depth:
            if not math.isfinite(number):
                raise ValueError(f"mask depth {list(self.depth)}: {number} is not a finite number")

    def coefficient(self, name: str, layers: int) -> float:
        """m of the tensor `name` of a checkpoint with so many `layers`."""
        if self.include and not any(re.fullmatch(p, name) for p in self.include):
            return 0.0
        if any(re.fullmatch(p, name) for p in self.exclude):
            return 0.0
        layer = layer_of(name)
        if self.layers and (layer is None or not any(first <= layer <= last for first, last in self.layers)):
            return 0.0
        if not self.depth or layer is None:
            return 1.0
        at = layer / max(1, layers - 1) * (len(self.depth) - 1)
        return _interpolate(self.depth, at)


@dataclass(frozen=True)
class Vector:
    """v = plus − minus, named by its two donors (directories or repositories). Without `minus`, `plus` is
    itself a difference: a stored vector, or a LoRA adapter. `rename` makes the donors' tensor names the base's:
    (regular expression, replacement) pairs, in order. Raises ValueError for a bad pattern."""

    plus: str
    minus: str | None = None
    rename: Rename = ()

    def __post_init__(self) -> None:
        for pattern, replacement in self.rename:
            try:
                re.compile(pattern)
                re.sub(f"(?:{pattern})?", replacement, "")  # its groups are known
            except (re.error, IndexError) as error:
                raise ValueError(f"rename [{pattern!r}, {replacement!r}] is no substitution: {error}") from None

    def sources(self) -> tuple[str, ...]:
        """plus and, if there is one, minus."""
        return (self.plus,) if self.minus is None else (self.plus, self.minus)


@dataclass(frozen=True)
class Term:
    """α · (m ⊙ v). `density` is the share of this vector that the method keeps, from the first layer to the last as
    `Mask.depth` has it; empty where that is the method's own. Raises ValueError unless α is a finite number."""

    alpha: float
    vector: Vector
    mask: Mask = Mask()
    density: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", float(self.alpha))  # it may be a scalar of NumPy or torch
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha={self.alpha} is not a finite number")


@dataclass(frozen=True)
class WeightPoint:
    """θ_base + Σ_k α_k (m_k ⊙ v_k), or another method's combination of these terms. No terms: `base` itself. With a
    `vocabulary` all of them have its tokens."""

    base: str
    terms: tuple[Term, ...] = ()
    method: MethodSpec = LINEAR
    vocabulary: Vocabulary | None = None

    @cached_property
    def active_terms(self) -> tuple[Term, ...]:
        """The terms that can change a weight. α = 0 names the base itself, to the bit."""
        return tuple(term for term in self.terms if term.alpha != 0)

    @cached_property
    def active(self) -> WeightPoint:
        """The point of the same weights without the terms that change none, and without a method where there is no
        other."""
        return replace(self, terms=self.active_terms, method=self.method if self.active_terms else LINEAR)

    @property
    def unchanged(self) -> WeightPoint:
        """The base; where there is a vocabulary, with the tokens of the point."""
        if self.vocabulary is None:
            return WeightPoint(self.base)
        return replace(self, terms=tuple(replace(term, alpha=0.0) for term in self.terms), method=LINEAR)

    def recipe(self, name: str, layers: int, has: Callable[[str], bool]) -> list[tuple[float, Vector]]:
        """(α·m, v) of every term that changes the floating-point tensor `name` of a base with so many `layers`;
        `has` says whether a source has that tensor."""
        return [(alpha, term.vector) for alpha, term in self._changes(name, layers, has)]

    def densities(self, name: str, layers: int, has: Callable[[str], bool]) -> tuple[float, ...]:
        """The density of each term in `recipe`; empty where no term has one of its own."""
        if not any(term.density for term in self.terms):
            return ()
        at = (layer_of(name) or 0) / max(1, layers - 1)
        return tuple(
            _interpolate(term.density, at * (len(term.density) - 1)) if term.density else self.method.density
            for _, term in self._changes(name, layers, has)
        )

    def _changes(self, name: str, layers: int, has: Callable[[str], bool]) -> Iterator[tuple[float, Term]]:
        for term in self.active_terms:
            alpha = term.alpha * term.mask.coefficient(name, layers)
            if alpha != 0 and has(term.vector.plus):
                yield alpha, term

    def sources(self) -> Iterator[str]:
        """Every checkpoint the point names, base first, each once."""
        seen = dict.fromkeys([self.base])
        for term in self.terms:
            seen |= dict.fromkeys(term.vector.sources())
        return iter(seen)

    def renames(self) -> dict[tuple[str, Rename], None]:
        """Every checkpoint the point names, and how its tensors are renamed; base first, each pair once."""
        pairs: dict[tuple[str, Rename], None] = {(self.base, ()): None}
        for term in self.terms:
            pairs |= dict.fromkeys((source, term.vector.rename) for source in term.vector.sources())
        return pairs

    def relocate(self, places: Mapping[str, str]) -> WeightPoint:
        """The same point with each source replaced by the place where it was found."""
        terms = tuple(
            replace(term, vector=Vector(places[v.plus], places[v.minus] if v.minus else None, v.rename))
            for term in self.terms
            for v in [term.vector]
        )
        vocabulary = self.vocabulary and self.vocabulary.relocate(places)
        return replace(self, base=places[self.base], terms=terms, vocabulary=vocabulary)

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold, and `from_json` reads."""
        fields = asdict(self)
        for term in fields["terms"]:
            if not term["density"]:
                del term["density"]
        if self.vocabulary is None:
            del fields["vocabulary"]
        return fields | {"method": self.method.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WeightPoint:
        """The point of `to_json`. Raises LookupError, TypeError or ValueError for what is none."""
        terms = tuple(
            Term(
                alpha=float(term["alpha"]),
                vector=Vector(
                    term["vector"]["plus"],
                    term["vector"]["minus"],
                    tuple((pattern, replacement) for pattern, replacement in term["vector"]["rename"]),
                ),
                mask=Mask(
                    include=tuple(term["mask"]["include"]),
                    exclude=tuple(term["mask"]["exclude"]),
                    layers=tuple((first, last) for first, last in term["mask"]["layers"]),
                    depth=tuple(term["mask"]["depth"]),
                ),
                density=tuple(term.get("density", ())),
            )
            for term in data["terms"]
        )
        vocabulary = Vocabulary.from_json(data["vocabulary"]) if data.get("vocabulary") else None
        return cls(data["base"], terms, MethodSpec.from_json(data["method"]), vocabulary)

    def digest(self, contents: Mapping[str, str]) -> str:
        """A hash of what the point is made of: `contents` maps each source to a digest of its bytes,
        so that neither a path nor the order of the files on disk matters. A vocabulary counts as what it makes of
        the sources. 32 hexadecimal digits."""
        made_of = {
            "base": contents[self.base],
            "terms": [
                {
                    "alpha": term.alpha,
                    "vector": [contents[source] for source in term.vector.sources()],
                    "rename": term.vector.rename,
                    "mask": asdict(term.mask),
                }
                | ({"density": term.density} if term.density else {})
                for term in self.active_terms
            ],
            "method": self.method.to_json(),
        }
        return hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Arm:
    """One row of an experiment: a weight point asked in one prompt style.

    `alpha` is set when the point is the target plus α times the one vector (0 for the baseline),
    None otherwise (a donor, a composition).
    """

    name: str
    point: WeightPoint
    prompt: str = "plain"
    alpha: float | None = None
