"""The model card of a merged checkpoint: its README.md.

Knows the point and what the caller says of its sources. Cheap to import, since every merge writes one.
A card is published, so it names local checkpoints by the last component of their path only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rvdist.point import Mask, MethodSpec, WeightPoint
from rvdist.report.wording import formula, is_hub_id, printable, source_name

# An absolute path (/a/b, ~/b, file:///a/b), but not the path of a URL; the group is its last component.
_PATH = re.compile(r"(?<![\w/.~-])(?!//)(?:file://)?~?/(?:[^\s/\"'`]+/)*([^\s/\"'`]+)/?")


def model_card(
    point: WeightPoint,
    *,
    digest: str | None,
    sources: Mapping[str, str],
    dtype: str,
    notes: Sequence[str],
    versions: Mapping[str, str],
) -> str:
    """`digest` is the point's, None where the contents of its checkpoints were not hashed. `sources` says of
    each checkpoint of the point where it came from. `notes` is what the reader must know: what was skipped,
    forced or rounded.
    """
    names = _public_names(point)

    def public(text: str) -> str:
        for source in sorted(names, key=len, reverse=True):
            text = text.replace(source, names[source])
        return _line(text)

    hub = [source.split("@")[0] for source in point.sources() if is_hub_id(source)]
    sections = [
        _front_matter(hub),
        f"# {names[point.base]}, merged",
        f"Weight arithmetic with [task vectors](https://arxiv.org/abs/2509.01363), written in {_line(dtype)}:",
        f"    θ = {formula(point, names)}",
        "| checkpoint | part | from |\n|---|---|---|\n"
        + "\n".join(f"| {names[s]} | {_part(point, s)} | {public(sources.get(s, ''))} |" for s in names),
    ]
    if point.method.name != "linear":
        sections.insert(-1, _method(point.method))
    masks = [(i, term.mask) for i, term in enumerate(point.active_terms, 1) if term.mask != Mask()]
    if masks:
        sections += ["## Masks", "\n".join(f"- Term {i}, m = 1 on {_mask(mask)}; 0 elsewhere." for i, mask in masks)]
    if notes:
        sections += ["## Notes", "\n".join(f"- {public(note)}" for note in notes)]
    sections += [
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'path = "."  # this directory, or its name on the Hub\n'
        'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(path)\n```",
        "## Reproduce",
        "Written by rvdist as the weight point below."
        + (f" Its digest, `{digest}`, depends on contents and coefficients, not on names." if digest else ""),
        f"```json\n{json.dumps(_renamed(point.to_json(), names), indent=2)}\n```",
        "Versions: " + ", ".join(f"{_line(name)} {_line(version)}" for name, version in versions.items()) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(hub: Sequence[str]) -> str:
    lines = ["---", "library_name: transformers", "tags:", "- merge", "- task-arithmetic", "- rvdist"]
    if hub:
        lines += ["base_model:", *(f"- {json.dumps(name)}" for name in dict.fromkeys(hub))]
    return "\n".join([*lines, "---"])


def _public_names(point: WeightPoint) -> dict[str, str]:
    """A name for each checkpoint of the point; a counter tells apart directories that end alike."""
    mentioned = [point.base, *(s for term in point.terms for s in term.vector.sources())]
    names: dict[str, str] = {}
    for source in dict.fromkeys(mentioned):
        name, count = _line(source_name(source)), 2
        while name in names.values():
            name, count = f"{_line(source_name(source))} ({count})", count + 1
        names[source] = name
    return names


def _part(point: WeightPoint, source: str) -> str:
    parts = ["base"] if source == point.base else []
    for i, term in enumerate(point.active_terms, 1):
        which = "" if len(point.active_terms) == 1 else f" of term {i}"
        parts += [f"plus{which}"] if source == term.vector.plus else []
        parts += [f"minus{which}"] if source == term.vector.minus else []
    return ", ".join(parts) or "α = 0"


_DROPS = {
    "ties": "in every tensor, each vector keeps that share of its largest elements",
    "dare_ties": "each element of a vector stays with that probability and is divided by it",
}


def _method(method: MethodSpec) -> str:
    said = {
        "ties": "The terms are combined by TIES ([arXiv 2306.01708](https://arxiv.org/abs/2306.01708)) with density "
        f"{method.density:g}: in every tensor, each vector keeps that share of its largest elements, a sign is elected "
        "for each element, and the mean of the terms that agree with it is added.",
        "dare": "The terms are combined by DARE ([arXiv 2311.03099](https://arxiv.org/abs/2311.03099)) with density "
        f"{method.density:g} and seed {method.seed}: each element of a vector stays with that probability and is "
        "divided by it, or else counts as zero, before the terms are added.",
        "slerp": "The target and the other model are interpolated on the sphere, each tensor as one vector.",
    } | {
        f"{name}_{how}": f"The terms are combined as by mergekit's {name}, with density {method.density:g}: {drop}, "
        f"a sign is elected for each element, and the {found} of the terms that agree with it is added."
        for name, drop in _DROPS.items()
        for how, found in (("sum", "sum"), ("mean", "weighted mean"))
    }
    return said[method.name]


def _mask(mask: Mask) -> str:
    said = ["names matching " + _patterns(mask.include) if mask.include else "all names"]
    if mask.exclude:
        said.append("but not " + _patterns(mask.exclude))
    if mask.layers:
        said.append("in layers " + ", ".join(f"{first}–{last}" for first, last in mask.layers))
    if mask.depth:
        said.append("times " + ", ".join(f"{number:g}" for number in mask.depth) + " from the first layer to the last")
    return " ".join(said)


def _patterns(patterns: Sequence[str]) -> str:
    return " or ".join(f"`{printable(pattern)}`" for pattern in patterns)


def _renamed(data: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    terms = []
    for term in data["terms"]:
        donors = {key: source and names[source] for key, source in term["vector"].items() if key in ("plus", "minus")}
        terms.append({**term, "vector": term["vector"] | donors})
    return {**data, "base": names[data["base"]], "terms": terms}


def _line(text: str) -> str:
    """One line of Markdown, also inside a table, without absolute paths."""
    return _PATH.sub(r"\1", printable(text)).replace("|", "\\|")
