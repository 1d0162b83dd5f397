"""The measures of vectors as plain numbers: `analyze` returns them, a report shows them.

Computes nothing, and imports the standard library only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spectrum:
    """The singular values σ₁ ≥ σ₂ ≥ … of v in one matrix.

    `size`: how many there are, the smaller side. `values`: those whose places, from 1, are `ranks`: all up to 128,
    beyond it a choice. `stable_rank`: ‖v‖² / σ₁². `effective_rank`: e^H, with H the entropy of σ / Σσ (Roy and
    Vetterli 2007): the least and the most that it may be, which differ where only the largest values were computed.
    `error`: every σ² is within error · σ₁² of a true one. `captured`: the share of ‖v‖² in the values computed.
    """

    size: int
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    stable_rank: float
    effective_rank: tuple[float, float]
    error: float
    captured: float


@dataclass(frozen=True)
class Measures:
    """One vector on a part of the target.

    `elements`: of the target's, those that v has; the shares are of these. `relative`: ‖v‖ / ‖θ‖ of the whole part,
    None where θ is 0. `zeros`: the share that is exactly 0. `below`: for each threshold τ the share with
    |v| ≤ τ · |θ|, zeros included. `distance`: ‖θ − origin‖ / ‖θ‖ over the elements that both have, where the origin
    is the checkpoint v begins at (minus); `toward`: the cosine between v and θ − origin; `reach`: ‖v‖ / ‖θ − origin‖.
    They are None where there is no origin to compare with, or no direction. `spectrum`: of a tensor that is a
    matrix and not all 0.
    """

    elements: int
    norm: float
    relative: float | None
    largest: float
    zeros: float
    below: tuple[float, ...]
    distance: float | None = None
    toward: float | None = None
    reach: float | None = None
    spectrum: Spectrum | None = None


@dataclass(frozen=True)
class Part:
    """The floating-point tensors of the target that share a layer, a kind of module, both, or a name.

    `norm`: ‖θ‖. `vectors`: by the name of each vector that has any of these elements. `cosines`: between vectors, in
    the order of `Anatomy.vectors`; None beside one that is 0 here. What a vector lacks counts as 0. `overlaps`: of the
    elements that either of two vectors changes, the share that both do; `agreements`: of these, the share that they
    change in the same direction.
    """

    name: str
    layer: int | None
    kind: str | None
    elements: int
    norm: float
    vectors: dict[str, Measures]
    cosines: tuple[tuple[float | None, ...], ...]
    overlaps: tuple[tuple[float | None, ...], ...] = ()
    agreements: tuple[tuple[float | None, ...], ...] = ()

    def percent(self, vector: str) -> float | None:
        """‖v‖ of ‖θ‖, in percent."""
        measures = self.vectors.get(vector)
        return None if measures is None or measures.relative is None else 100 * measures.relative


@dataclass(frozen=True)
class Anatomy:
    """Vectors beside a target. `layers`, `kinds` and `cells` (a kind in a layer, or outside of all) are in the order
    in which a token meets them, `tensors` in that of the target's files."""

    target: str
    vectors: tuple[str, ...]
    thresholds: tuple[float, ...]
    whole: Part
    layers: tuple[Part, ...]
    kinds: tuple[Part, ...]
    cells: tuple[Part, ...]
    tensors: tuple[Part, ...]

    def spectra(self, vector: str, kind: str | None = None) -> list[Spectrum]:
        """Of the vector's matrices of a kind, or of all."""
        parts = [part for part in self.tensors if kind in (None, part.kind) and vector in part.vectors]
        return [spectrum for part in parts if (spectrum := part.vectors[vector].spectrum)]

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)
