"""What was found out about vectors in tables, sentences, and everything as CSV.

Knows findings; measures nothing. Names in cells and sentences are as they come, so
whoever puts them into a page escapes them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import median
from typing import NamedTuple

from rvdist.core.text import cell as csv_cell
from rvdist.report.wording import printable
from rvdist.weights.anatomy.findings import Anatomy, Measures, Part, Spectrum


class Table(NamedTuple):
    """Rows of text under a title; the first cell of a row says what it is of."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def anatomy_tables(anatomy: Anatomy) -> list[Table]:
    """For each vector a table by kind of module and one by layer; the whole stands first in both."""
    limits = [f"≤ {100 * limit:g} % of θ" for limit in anatomy.thresholds]
    head = (
        "‖θ‖",
        "‖v‖",
        "‖v‖ / ‖θ‖",
        "max |v|",
        "zero",
        *limits,
        "effective rank",
        "stable rank",
        "‖θ − minus‖ / ‖θ‖",
        "cos(v, θ − minus)",
    )
    tables = []
    for vector in anatomy.vectors:
        for title, parts in {"module": anatomy.kinds, "layer": anatomy.layers}.items():
            rows = [_row(anatomy, part, vector) for part in (anatomy.whole, *parts) if vector in part.vectors]
            tables.append(Table(f"{vector}, by {title}", (title, *head), tuple(rows)))
    return tables


def _row(anatomy: Anatomy, part: Part, vector: str) -> tuple[str, ...]:
    m = part.vectors[vector]
    spectra = [
        spectrum
        for tensor in anatomy.tensors
        if part.layer in (None, tensor.layer) and part.kind in (None, tensor.kind) and vector in tensor.vectors
        if (spectrum := tensor.vectors[vector].spectrum)
    ]
    name = "all" if part is anatomy.whole else str(part.kind if part.layer is None else part.layer)
    return (
        name,
        f"{part.norm:.4g}",
        f"{m.norm:.4g}",
        _share(m.relative),
        f"{m.largest:.3g}",
        _share(m.zeros),
        *map(_share, m.below),
        _rank(spectra),
        f"{median(s.stable_rank for s in spectra):.3g}" if spectra else "",
        _share(m.distance),
        "" if m.toward is None else f"{m.toward:.3f}".replace("-", "−"),
    )


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g} %"


def _rank(spectra: Sequence[Spectrum]) -> str:
    """The median matrix's: "50 of 128", "180 to 2900 of 8192"; "39 % of full" where their sizes differ."""
    sizes = {spectrum.size for spectrum in spectra}
    if not sizes:
        return ""
    alike = len(sizes) == 1
    ends = [median(s.effective_rank[end] / (1 if alike else s.size / 100) for s in spectra) for end in (0, 1)]
    text = " to ".join(dict.fromkeys(f"{end:.3g}" for end in ends))
    return f"{text} of {min(sizes)}" if alike else f"{text} % of full"


def anatomy_sentences(anatomy: Anatomy) -> list[str]:
    """What is most worth knowing of each vector and of each pair."""
    sentences = [sentence for vector in anatomy.vectors for sentence in _said_of(anatomy, vector)]
    for i, j in combinations(range(len(anatomy.vectors)), 2):
        cosine = anatomy.whole.cosines[i][j]
        if cosine is not None:
            pair = f"“{anatomy.vectors[i]}” and “{anatomy.vectors[j]}”"
            sentences.append(f"The cosine between {pair} is {cosine:.3f}.".replace("-", "−"))
            overlap, agreement = anatomy.whole.overlaps[i][j], anatomy.whole.agreements[i][j]
            if agreement is not None:
                both = f"Of what either of them changes, both change {_share(overlap)}"
                sentences.append(f"{both}; of this, {_share(agreement)} in the same direction.")
    return [printable(sentence) for sentence in sentences]


def _said_of(anatomy: Anatomy, vector: str) -> Iterator[str]:
    m = anatomy.whole.vectors.get(vector)
    if m is None:
        yield f"“{vector}” has no tensor in common with {anatomy.target}."
        return
    size, zeros = _share(m.relative), _share(m.zeros)
    equal = f"{zeros} of its elements are 0, as where donors are equal"
    yield f"“{vector}” has {size} of the norm of {anatomy.target}; {equal}."
    if m.elements < anatomy.whole.elements:
        yield f"It covers {_share(m.elements / anatomy.whole.elements)} of the target's elements."
    ranked = sorted((x, part.kind or "") for part in anatomy.kinds if (x := part.percent(vector)) is not None)
    if len(ranked) > 1:
        (least, small), (most, large) = ranked[0], ranked[-1]
        yield f"Beside θ it is largest in {large} ({most:.3g} %) and smallest in {small} ({least:.3g} %)."
    if spectra := anatomy.spectra(vector):
        stable = median(spectrum.stable_rank for spectrum in spectra)
        yield f"Its median matrix has effective rank {_rank(spectra)} and stable rank {stable:.3g}."


def anatomy_csv(anatomy: Anatomy) -> str:
    """A line for each part and vector, with every number as it was found."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            *("level", "name", "layer", "kind", "elements", "theta_norm", "vector", "covered", "norm", "relative"),
            *("largest", "zeros", *(f"below_{limit:g}" for limit in anatomy.thresholds), "distance", "toward", "reach"),
            *("singular_values", "stable_rank", "effective_rank_low", "effective_rank_high", "captured", "error"),
            *(csv_cell(f"{of}_{vector}") for of in ("cosine", "overlap", "agreement") for vector in anatomy.vectors),
        ]
    )
    levels = {"all": (anatomy.whole,), "layer": anatomy.layers, "kind": anatomy.kinds, "cell": anatomy.cells}
    for level, parts in {**levels, "tensor": anatomy.tensors}.items():
        for part in parts:
            for k, vector in enumerate(anatomy.vectors):
                if vector in part.vectors:
                    own = [level, part.name, part.layer, part.kind, part.elements, part.norm, vector]
                    writer.writerow([*map(csv_cell, own), *_numbers_of(part.vectors[vector]), *_beside(part, k)])
    return out.getvalue()


def _beside(part: Part, k: int) -> list[float | None]:
    """What there is of a vector and each of the others."""
    return [number for row in (part.cosines[k], part.overlaps[k], part.agreements[k]) for number in row]


def _numbers_of(m: Measures) -> list[float | None]:
    s = m.spectrum
    spectrum = [s.size, s.stable_rank, *s.effective_rank, s.captured, s.error] if s else [None] * 6
    return [m.elements, m.norm, m.relative, m.largest, m.zeros, *m.below, m.distance, m.toward, m.reach, *spectrum]
