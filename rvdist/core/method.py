"""The merge methods: a row of facts each, which configuration, arithmetic, cards, reports and docs read.

Knows no arithmetic: a row names the file below `rvdist/weights/arithmetic/` that has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Options = tuple[tuple[str, float], ...]  # a number by name; flags are 0 and 1


@dataclass(frozen=True)
class Facts:
    """What is known of a method.

    `made_by`: FILE.NAME, a class or function below `rvdist/weights/arithmetic/` that takes `parameters` and `options`
    by keyword. `parameters`: which of `density` and `seed` it has a use for; `options`: its other numbers, and their
    defaults. `whole_tensors`: all of a tensor must be seen before any of it can be computed, so that no unit holds a
    part of one. `whole_rows`: its chunks are whole rows of the last dimension. `whole_matrices`: a worker holds what is
    added to a matrix, one point's at a time. `low_rank`: its vectors are of low rank, of adapters or so stored.
    `one_vector`: it goes from the base to one other model. `formula`: r as docs/methods.md has it; empty where only a
    recipe chooses the method, else `merge.method` may name it. `sentence`: what a card says, with {density} and {seed}
    filled in; empty where the terms are simply added.
    """

    name: str
    made_by: str
    formula: str = ""
    sentence: str = ""
    parameters: tuple[str, ...] = ()
    options: Options = ()
    whole_tensors: bool = False
    whole_rows: bool = False
    whole_matrices: bool = False
    low_rank: bool = False
    one_vector: bool = False

    @property
    def by_element(self) -> bool:
        """Whether an element of the result needs no others of the sources, and not its place."""
        return not self.whole_tensors and "seed" not in self.parameters


def _mergekit(name: str, drops: str, adds: str) -> str:
    return (
        f"The terms are combined as by mergekit's {name}, with {{density}}: {drops}, a sign is elected for each "
        f"element, and the {adds} of the terms that agree with it is added."
    )


_TRIMMED = "in every tensor, each vector keeps that share of its largest elements"
_DROPPED = "each element of a vector stays with that probability and is divided by it"
_BREADCRUMBS = (
    "The terms are combined by Model Breadcrumbs ([arXiv 2312.06795](https://arxiv.org/abs/2312.06795)) with "
    "{density} and gamma {gamma:g}: in every tensor, each vector leaves out that share of its largest elements, and "
    "then the smallest"
)
_DELLA = (
    "The terms are combined by DELLA ([arXiv 2406.11617](https://arxiv.org/abs/2406.11617)) with {density}, epsilon "
    "{epsilon:g} and {seed}: each element of a vector stays with a probability between the density less epsilon and "
    "the density plus epsilon, by its rank among the magnitudes of its row"
)
_RAM = (
    "The terms are combined by Reinforced Agent Merging ([arXiv 2601.13572](https://arxiv.org/abs/2601.13572)) with "
    "epsilon {epsilon:g}: elements that one vector alone changes are taken whole"
)
_AVERAGED = "and those that several change are averaged over these"
_ELECTED = "a sign is elected for each element, and only terms that agree with it are taken"
_CORE = (
    "The terms, adapters of low rank, are combined in the small space that they span, matrix by matrix: Core Space "
    "([arXiv 2509.17786](https://arxiv.org/abs/2509.17786))"
)

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
        "iso_c",
        "isotropic.IsoC",
        "t + σ̄·U·Vᵀ, where Σ α_k·d_k = U·diag(σ)·Vᵀ",
        "The terms are combined by Iso-C ([arXiv 2502.04959](https://arxiv.org/abs/2502.04959)): of every matrix, the "
        "sum of the terms is added with all of its singular values replaced by their mean.",
        whole_tensors=True,
        whole_matrices=True,
    ),
    Facts(
        "tsv_m",
        "singular.TsvM",
        "t + U⊥·diag(σ)·V⊥ᵀ of the first 1/K of every d_k's singular vectors",
        "The terms are combined by TSV-M ([arXiv 2412.00081](https://arxiv.org/abs/2412.00081)): of every matrix, each "
        "term keeps its share of the largest singular vectors, which are made orthogonal to those of the others.",
        whole_tensors=True,
        whole_matrices=True,
    ),
    Facts(
        "core_space",
        "core_space.CoreTsvM",
        "t + U·TSV-M(Uᵀ·d_1·V, …, Uᵀ·d_K·V)·Vᵀ",
        f"{_CORE}. Each keeps its share of the largest singular vectors there, which are made orthogonal to those of "
        "the others (TSV-M).",
        whole_tensors=True,
        whole_matrices=True,
        low_rank=True,
    ),
    Facts(
        "core_space_iso",
        "core_space.CoreIsoC",
        "t + U·Iso-C(Uᵀ·d_1·V, …, Uᵀ·d_K·V)·Vᵀ",
        f"{_CORE}. Their sum there is added with all of its singular values replaced by their mean (Iso-C).",
        whole_tensors=True,
        whole_matrices=True,
        low_rank=True,
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
    Facts(
        "breadcrumbs",
        "breadcrumbs.Breadcrumbs",
        sentence=f"{_BREADCRUMBS}, and the terms are added.",
        parameters=("density",),
        options=(("gamma", 0.01),),
        whole_tensors=True,
    ),
    Facts(
        "breadcrumbs_ties",
        "breadcrumbs.BreadcrumbsTies",
        sentence=f"{_BREADCRUMBS}, {_ELECTED}.",
        parameters=("density",),
        options=(("gamma", 0.01), ("normalize", 0), ("factor", 1)),
        whole_tensors=True,
    ),
    Facts(
        "sce",
        "sce.Sce",
        sentence="The terms are combined by SCE ([arXiv 2408.07990](https://arxiv.org/abs/2408.07990)) with "
        "{density}: that share of the elements, those that vary most between the vectors, is merged, each vector "
        f"weighs as much as its mean square, {_ELECTED}.",
        parameters=("density",),
        whole_tensors=True,
    ),
    Facts(
        "model_stock",
        "model_stock.ModelStock",
        sentence="The target goes towards the mean of the models as far as the angles between their vectors say, each "
        "tensor by itself: Model Stock ([arXiv 2403.19522](https://arxiv.org/abs/2403.19522)).",
        whole_tensors=True,
    ),
    Facts(
        "nuslerp",
        "nuslerp.Nuslerp",
        sentence="The two vectors are interpolated on the sphere, each tensor as one vector, and added.",
        whole_tensors=True,
    ),
    Facts(
        "nuslerp_models",
        "nuslerp.NuslerpModels",
        sentence="The target and the other model are interpolated on the sphere, each tensor as one vector.",
        whole_tensors=True,
        one_vector=True,
    ),
    Facts(
        "multislerp",
        "multislerp.Multislerp",
        sentence="The vectors' mean direction at their mean length is added, each tensor as one vector.",
        whole_tensors=True,
    ),
    Facts(
        "multislerp_models",
        "multislerp.MultislerpModels",
        sentence="The models' mean direction at their mean length is taken, each tensor as one vector.",
        whole_tensors=True,
    ),
    Facts(
        "karcher",
        "karcher.Karcher",
        sentence="The point of the sphere nearest to all models, their Karcher mean, is taken at their mean length, "
        "each tensor as one vector.",
        options=(("max_iter", 10), ("tol", 1e-5)),
        whole_tensors=True,
    ),
    Facts(
        "nearswap",
        "nearswap.Nearswap",
        sentence="Elements that are nearer to the target's than the coefficient become the other model's; others go "
        "that far towards it.",
        one_vector=True,
    ),
    Facts(
        "della_linear",
        "della.Della",
        sentence=f"{_DELLA}, and the terms are added.",
        parameters=("density", "seed"),
        options=(("epsilon", 0.15), ("rescale", 1)),
        whole_tensors=True,
        whole_rows=True,
    ),
    Facts(
        "della",
        "della.DellaTies",
        sentence=f"{_DELLA}, {_ELECTED}.",
        parameters=("density", "seed"),
        options=(("epsilon", 0.15), ("rescale", 1), ("normalize", 1), ("factor", 1)),
        whole_tensors=True,
        whole_rows=True,
    ),
    Facts(
        "arcee_fusion",
        "arcee_fusion.ArceeFusion",
        sentence="The other model's elements are taken where their change matters most: where its size times the "
        "divergence of the row's softmax is an outlier of the tensor (Arcee Fusion).",
        whole_tensors=True,
        whole_rows=True,
        one_vector=True,
    ),
    Facts("ram", "ram.Ram", sentence=f"{_RAM}, {_AVERAGED}.", options=(("epsilon", 1e-5),)),
    Facts(
        "ramplus_tl",
        "ram.RamPlus",
        sentence=f"{_RAM} and strengthened (r {{r:g}}, alpha {{alpha:g}}), {_AVERAGED}.",
        options=(("r", 0.1), ("alpha", 0.2), ("epsilon", 1e-5)),
        whole_tensors=True,
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
    kept, the `seed` that a random choice begins with, and what of the method's `options` is not at its default."""

    name: str = "linear"
    density: float = 1.0
    seed: int = 0
    options: Options = ()

    @property
    def facts(self) -> Facts:
        """Raises ValueError where there is no such method."""
        return facts(self.name)

    def without_unused(self) -> MethodSpec:
        """What the method has no use for is at its default: points that are computed alike are equal."""
        given = dict(self.options)
        unusual = tuple((key, given[key]) for key, usual in self.facts.options if given.get(key, usual) != usual)
        return MethodSpec(self.name, **{key: getattr(self, key) for key in self.facts.parameters}, options=unusual)

    @property
    def parameters(self) -> dict[str, Any]:
        """What the method has a use for, by name."""
        return {key: getattr(self, key) for key in self.facts.parameters} | self.all_options

    @property
    def all_options(self) -> dict[str, float]:
        """The method's options by name, those at their defaults, too."""
        return dict(self.facts.options) | dict(self.options)

    def to_json(self) -> dict[str, Any]:
        """Its fields; `options` only where there are some."""
        fields = {"name": self.name, "density": self.density, "seed": self.seed}
        return fields | ({"options": [list(option) for option in self.options]} if self.options else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MethodSpec:
        """The method of `to_json`. Raises TypeError or ValueError for what is none."""
        options = tuple((str(key), float(number)) for key, number in data.get("options", ()))
        return cls(**{**data, "options": options})

    def check(self) -> None:
        """Raises ValueError where there is no such method, it has no such option, or its density is out of range."""
        known = [key for key, _ in self.facts.options]
        for key, _ in self.options:
            if key not in known:
                raise ValueError(f"{self.name} has no option {key!r}{f', only {known}' if known else ''}")
        if "density" in self.facts.parameters and not 0 < self.density <= 1:
            raise ValueError(f"density {self.density} is not above 0 and at most 1")


LINEAR = MethodSpec()
