"""The merge methods: a row of facts each, which configuration, arithmetic, cards, reports and docs read.

Knows no arithmetic: a row names the file below `rvdist/weights/arithmetic/` that has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What is known of a method.

    `made_by`: FILE.NAME, a class or function below `rvdist/weights/arithmetic/` that takes `parameters` by keyword.
    `parameters`: which of `density` and `seed` it has a use for. `whole_tensors`: all of a tensor must be seen before
    any of it can be computed, so that no unit holds a part of one. `one_vector`: it goes from the base to one other
    model. `formula`: r as docs/methods.md has it; empty where only a recipe chooses the method, else `merge.method` may
    name it. `sentence`: what a card says, with {density} and {seed} filled in; empty where the terms are simply added.
    """

    name: str
    made_by: str
    formula: str = ""
    sentence: str = ""
    parameters: tuple[str, ...] = ()
    whole_tensors: bool = False
    one_vector: bool = False


def _mergekit(name: str, drops: str, adds: str) -> str:
    return (
        f"The terms are combined as by mergekit's {name}, with {{density}}: {drops}, a sign is elected for each "
        f"element, and the {adds} of the terms that agree with it is added."
    )


_TRIMMED = "in every tensor, each vector keeps that share of its largest elements"
_DROPPED = "each element of a vector stays with that probability and is divided by it"

FACTS = (
    Facts("linear", "linear.Linear", "t + Σ α_k·d_k"),
    Facts(
        "ties",
        "ties.Ties",
        "t + the mean of the trimmed α_k·d_k that have the elected sign",
        "The terms are combined by TIES ([arXiv 2306.01708](https://arxiv.org/abs/2306.01708)) with {density}: "
        f"{_TRIMMED}, a sign is elected for each element, and the mean of the terms that agree with it is added.",
        ("density",),
        whole_tensors=True,
    ),
    Facts(
        "dare",
        "dare.Dare",
        "t + Σ b_k·(α_k / density)·d_k",
        "The terms are combined by DARE ([arXiv 2311.03099](https://arxiv.org/abs/2311.03099)) with {density} and "
        f"{{seed}}: {_DROPPED}, or else counts as zero, before the terms are added.",
        ("density", "seed"),
    ),
    Facts(
        "slerp",
        "slerp.Slerp",
        sentence="The target and the other model are interpolated on the sphere, each tensor as one vector.",
        whole_tensors=True,
        one_vector=True,
    ),
    Facts(
        "ties_sum",
        "consensus.ties_sum",
        sentence=_mergekit("ties", _TRIMMED, "sum"),
        parameters=("density",),
        whole_tensors=True,
    ),
    Facts(
        "ties_mean",
        "consensus.ties_mean",
        sentence=_mergekit("ties", _TRIMMED, "weighted mean"),
        parameters=("density",),
        whole_tensors=True,
    ),
    Facts(
        "dare_ties_sum",
        "consensus.dare_ties_sum",
        sentence=_mergekit("dare_ties", _DROPPED, "sum"),
        parameters=("density", "seed"),
    ),
    Facts(
        "dare_ties_mean",
        "consensus.dare_ties_mean",
        sentence=_mergekit("dare_ties", _DROPPED, "weighted mean"),
        parameters=("density", "seed"),
    ),
)
METHODS = tuple(row.name for row in FACTS if row.formula)  # those that merge.method may name
_BY_NAME = {row.name: row for row in FACTS}


def facts(name: str) -> Facts:
    """The row of the method. Raises ValueError where there is none."""
    if name not in _BY_NAME:
        raise ValueError(f"{name!r} is not one of {', '.join(METHODS)}")
    return _BY_NAME[name]


@dataclass(frozen=True)
class MethodSpec:
    """How the terms of a weight point are combined: a method by its name, the share `density` of each vector that is
    kept, and the `seed` that a random choice begins with."""

    name: str = "linear"
    density: float = 1.0
    seed: int = 0

    @property
    def facts(self) -> Facts:
        """Raises ValueError where there is no such method."""
        return facts(self.name)

    def without_unused(self) -> MethodSpec:
        """What the method has no use for is at its default: points that are computed alike are equal."""
        return MethodSpec(self.name, **self.parameters)

    @property
    def parameters(self) -> dict[str, Any]:
        """What the method has a use for, by name."""
        return {key: getattr(self, key) for key in self.facts.parameters}

    def check(self) -> None:
        """Raises ValueError where there is no such method, or its density is out of range."""
        if "density" in self.facts.parameters and not 0 < self.density <= 1:
            raise ValueError(f"density {self.density} is not above 0 and at most 1")


LINEAR = MethodSpec()
