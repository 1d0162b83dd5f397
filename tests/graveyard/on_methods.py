"""Situations of several vectors, and of methods that see a tensor as a matrix. Right is the paper's formula by numpy's
singular values in fp64, of whole tensors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from checkpoints import near
from on_adapters import LACKS, SKIPS, adapter, added, deltas, factors
from situations import Asked, Refused, Right, Weights, ask, llama, situation, write

from rvdist.core.config import MergeConfig, VectorConfig, WeightedVectorConfig

ALPHAS = (0.5, -0.25)


def several(place: Path, verdict: Right | Refused, paths: list[dict[str, str]], **merge: str) -> Asked:
    """These vectors, each times its own α."""
    vectors = [WeightedVectorConfig(**path, alpha=alpha) for path, alpha in zip(paths, ALPHAS, strict=True)]
    return ask(place, verdict, vector=VectorConfig(), vectors=vectors, alpha=1.0, merge=MergeConfig(**merge))


def iso_c(target: torch.Tensor, terms: list[torch.Tensor]) -> torch.Tensor:
    """The paper's algorithm 1; of a tensor of one dimension the mean of the terms."""
    total = sum(terms, torch.zeros_like(terms[0]))
    if target.dim() < 2:
        return (target.double() + total / len(terms)).to(target.dtype)
    left, values, right = np.linalg.svd(total.numpy(), full_matrices=False)
    return (target.double() + torch.from_numpy(values.mean() * left @ right)).to(target.dtype)


def of_donors(place: Path, refused: Refused | None = None, spoil: str = "", **merge: str) -> Asked:
    """Two vectors of three siblings; `spoil` names a tensor of the first in which an element is infinite."""
    base = llama()
    weights: dict[str, Weights] = {"target": base}
    weights |= {name: near(base, seed) for seed, name in enumerate(("one", "two", "minus"), 1)}
    if spoil:
        weights["one"][spoil][0, 0] = math.inf
    for name, own in weights.items():
        write(place / name, own)
    paths = [{"plus": str(place / name), "minus": str(place / "minus")} for name in ("one", "two")]
    if refused:
        return several(place, refused, paths, **merge)
    pairs = list(zip(ALPHAS, ("one", "two"), strict=True))
    right = {
        name: iso_c(t, [a * (weights[one][name].double() - weights["minus"][name].double()) for a, one in pairs])
        for name, t in base.items()
    }
    return several(place, Right(right), paths, **merge)


@situation(
    "methods", "Iso-C of two vectors, of which one is subtracted", "ljleb/sd-mecha#64",
    right="the paper's: all singular values of every matrix are their mean; other tensors get the mean of the terms",
)  # fmt: skip
def isotropic(place: Path) -> Asked:
    return of_donors(place, method="iso_c")


@situation(
    "methods", "Iso-C of a donor with an infinity, which has no singular values", "none found",
    refused="names the tensor and the source that holds it",
)  # fmt: skip
def isotropic_infinity(place: Path) -> Asked:
    name = "model.layers.1.mlp.up_proj.weight"
    return of_donors(place, Refused([name, "one"], underway=True), spoil=name, method="iso_c")


@situation(
    "methods", "Iso-C of a matrix that takes more memory than is allowed", "s1dlx/meh#50",
    refused="names the tensor, its shape, what it takes and merge.memory",
)  # fmt: skip
def isotropic_memory(place: Path) -> Asked:
    return of_donors(
        place,
        Refused(["target: iso_c decomposes a matrix", r"\(40 × 16\)", "merge.memory"]),
        method="iso_c",
        memory="4KiB",
    )


@situation(
    "methods", "Core Space of checkpoints that are no adapters", "none found",
    refused="names a donor, a tensor and another method",
)  # fmt: skip
def core_space_of_donors(place: Path) -> Asked:
    return of_donors(place, Refused(["one: holds", "not as two factors", "tsv_m"]), method="core_space")


@situation(
    "methods", "two adapters, of which one is subtracted", "huggingface/peft#3013",
    right="the sum of both products: no A of one meets a B of the other",
)  # fmt: skip
def two_adapters(place: Path) -> Asked:
    target, pairs = llama(), [factors(seed=seed) for seed in (1, 2)]
    write(place / "target", target)
    paths = [{"path": str(adapter(place / str(number), own).path)} for number, own in enumerate(pairs)]
    one, two = (deltas(own) for own in pairs)
    change = {name: ALPHAS[0] * one[name] + ALPHAS[1] * two[name] for name in one}
    return several(place, Right(added(target, change, 1.0), notes=[SKIPS, LACKS]), paths)
