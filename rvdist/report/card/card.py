"""The card of a merged checkpoint or a stored vector: its README.md.

Knows the point, or what vector.json says, and what the caller says of its sources. Cheap to import, since every merge
writes one. A card is published, so it names local checkpoints by the last component of their path only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rvdist.core.point import Mask, WeightPoint, name_of
from rvdist.report.card.metadata import Licence, Result, front_matter, licence_fields, model_index, task_name
from rvdist.report.wording import (
    MARK_NOTE,
    Scale,
    formula,
    is_hub_id,
    mark,
    metric_name,
    printable,
    source_name,
    verdict_text,
)

_MARKUP = re.compile(r"[\\`*~|\[\]]|(?<![^\W_])_|_(?![^\W_])")  # underscores within words are none
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
    licences: Mapping[str, Licence | None] | None = None,
    stacked: Mapping[str, Mapping[str, Licence | None]] | None = None,
    name: str | None = None,
    results: Sequence[Result] = (),
) -> str:
    """`digest` is the point's, None where the contents of its checkpoints were not hashed. `sources` says of
    each checkpoint of the point where it came from, `licences` what its own card says, and `stacked` the same of those
    that one of them stacks. `notes` is what the reader must know: what was skipped, forced or rounded. `name` is the
    one on the Hub, `org/name` or `org/name@branch`, and `results` its scores.
    """
    licences = {source: (licences or {}).get(source) for source in point.sources()}
    names, stacked = _public_names(point), stacked or {}
    stacks = {
        source: [(name_of(part), f"in {names[source]}", "", licence) for part, licence in parts.items()]
        for source, parts in stacked.items()
    }
    own = [licence for source, licence in licences.items() if source not in stacked]
    own += [licence for parts in stacked.values() for licence in parts.values()]

    def public(text: str) -> str:
        for source in sorted(names, key=len, reverse=True):
            text = text.replace(source, names[source])
        return _line(text)

    title = _title(name) if name else f"{names[point.base]}, merged"
    sections = [
        front_matter(
            {
                "library_name": "transformers",
                **_origin([source.split("@")[0] for source in point.sources() if is_hub_id(source)]),
                **licence_fields(own),
                "tags": ["merge", "task-arithmetic", "rvdist"],
                "model-index": model_index(title, results),
            }
        ),
        f"# {_line(title)}",
        f"Weight arithmetic with [task vectors](https://arxiv.org/abs/2509.01363), written in {_line(dtype)}:",
        f"    θ = {formula(point, names)}",
        _table(
            ("checkpoint", "part", "from", "licence"),
            [
                row
                for s in point.sources()
                for row in (
                    (
                        names[s],
                        _part(point, s),
                        public(sources.get(s, "")),
                        "" if s in stacks else _licence(licences[s]),
                    ),
                    *((_line(part), _line(of), where, _licence(said)) for part, of, where, said in stacks.get(s, [])),
                )
            ],
        ),
    ]
    if said := _method(point):
        sections.insert(-1, said)
    if results:
        sections += ["## Results", *_results(results)]
    masks = [(i, term.mask) for i, term in enumerate(point.active_terms, 1) if term.mask != Mask()]
    if masks:
        sections += ["## Masks", "\n".join(f"- Term {i}, m = 1 on {_mask(mask)}; 0 elsewhere." for i, mask in masks)]
    if notes:
        sections += ["## Notes", "\n".join(f"- {public(note)}" for note in notes)]
    sections += [
        "## Use",
        _how_to_load(name),
        "## Reproduce",
        "Written by rvdist as the weight point below."
        + (f" Its digest, `{digest}`, depends on contents and coefficients, not on names." if digest else ""),
        f"```json\n{json.dumps(point.relocate(names).to_json(), indent=2)}\n```",
        _versions(versions),
    ]
    return "\n\n".join(sections) + "\n"


def vector_card(
    description: Mapping[str, Any],
    *,
    versions: Mapping[str, str],
    licences: Mapping[str, Licence | None] | None = None,
    name: str | None = None,
) -> str:
    """`description` is what vector.json holds; `licences` are its donors', by their part in it (plus, minus)."""
    donors: Mapping[str, Mapping[str, Any]] = description["donors"]
    licences = {part: (licences or {}).get(part) for part in donors}
    made_of = " − ".join(_line(donor["name"]) for donor in donors.values())
    exact_for, skipped = description["exact_for"], description["skipped"]
    rows = [
        (_line(donor["name"]), part, _line(donor["revision"] or "a local directory"), _licence(licences[part]))
        for part, donor in donors.items()
    ]
    sections = [
        front_matter(
            {
                "library_name": "rvdist",
                **_origin([donor["name"] for donor in donors.values() if donor["revision"]]),
                **licence_fields(list(licences.values())),
                "tags": ["task-vector", "task-arithmetic", "rvdist"],
            }
        ),
        f"# {_line(_title(name) if name else made_of)}",
        "A [task vector](https://arxiv.org/abs/2509.01363): no model by itself, but what is added to one.",
        f"    {_line(description['formula'])} = {made_of}",
        _table(("checkpoint", "part", "revision", "licence"), rows),
        "## How it is stored",
        f"{len(description['tensors'])} tensors in {description['bytes']:,} bytes, "
        f"{_storage(description['storage'])}. Against the donors the relative error, ‖stored − v‖ / ‖v‖, is "
        f"{description['relative_error']:.3g}, the largest of an element "
        f"{description['max_error']:.3g}; "
        + (f"exact for {_line(exact_for)}." if exact_for else "it is not exact.")
        + (f" {len(skipped)} tensors that are not floating-point were skipped." if skipped else "")
        + " `vector.json` says so of every tensor.",
        "## Use",
        f"```sh\npython -m rvdist.launch vector.path={name or 'DIR'} target=DIR_OR_REPO alpha=1 output=DIR\n```",
        _versions(versions),
    ]
    return "\n\n".join(sections) + "\n"


def _title(name: str) -> str:
    return name.partition("@")[0].split("/")[-1]


def _how_to_load(name: str | None) -> str:
    where, _, branch = (name or "").partition("@")
    path = f"path = {json.dumps(where)}" if name else 'path = "."  # this directory, or its name on the Hub'
    revision = f", revision={json.dumps(branch)}" if branch else ""
    return (
        f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n{path}\n"
        f'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto"{revision})\n'
        f"tokenizer = AutoTokenizer.from_pretrained(path{revision})\n```"
    )


def _origin(hub: Sequence[str]) -> dict[str, Any]:
    return {"base_model": list(dict.fromkeys(hub)), "base_model_relation": "merge"} if hub else {}


def _storage(stored: Mapping[str, Any]) -> str:
    dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(stored["dtype"], "their working precision")
    if stored["rank"] is not None:
        return f"matrices as two factors of rank {stored['rank']}, in {dtype}"
    if stored["density"] is not None:
        return f"of each the largest elements, a share of {stored['density']:g}, in {dtype}"
    return f"every element in {dtype}"


def _results(results: Sequence[Result]) -> list[str]:
    """The table, and what its reader must know."""
    rows = []
    for result in results:
        row, baseline = result.row, result.baseline
        scale = Scale([one for one in (row, baseline) if one])
        rows.append(
            (
                _line(task_name(row)),
                _line(f"{metric_name(row.metric, row.filter)} {scale.unit}".strip()),
                str(row.n),
                scale.score(baseline) if baseline else "",
                scale.score(row),
                scale.delta(row),
                _verdict(result),
            )
        )
    head = ("task", "metric", "documents", "baseline [95 %]", "this [95 %]", "change [95 %]", "verdict")
    said = ["Scored with lm-eval; this model and the baseline answered the same documents."]
    if any(mark(result.row) for result in results):
        said.append(MARK_NOTE)
    return [_table(head, rows), " ".join(said)]


def _verdict(result: Result) -> str:
    others = "; ".join(f"by {_line(one.filter)}: {verdict_text(one)}" for one in result.dissent)
    return verdict_text(result.row) + (f" ({others})" if others else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" if cells else "|---" * len(head) + "|" for cells in (head, (), *rows))


def _licence(licence: Licence | None) -> str:
    if licence is None:
        return "unknown"
    text = _line(str(licence))
    return f"[{text}]({licence.link})" if licence.link else text


def _versions(versions: Mapping[str, str]) -> str:
    return "Versions: " + ", ".join(f"{_line(name)} {_line(version)}" for name, version in versions.items()) + "."


def _public_names(point: WeightPoint) -> dict[str, str]:
    """A name for each checkpoint and tokenizer of the point; a counter tells apart directories that end alike."""
    mentioned = [*point.sources(), *(point.vocabulary.places() if point.vocabulary else ())]
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


def _method(point: WeightPoint) -> str:
    own = any(term.density for term in point.terms)
    density = "a density of each term's own (see the JSON)" if own else f"density {point.method.density:g}"
    method = point.method
    return method.facts.sentence.format(density=density, seed=f"seed {method.seed}", **method.all_options)


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


def _line(text: str) -> str:
    """One line of Markdown, also inside a table, that shows as it is written: without absolute paths, HTML, links or
    emphasis of its own."""
    text = _PATH.sub(r"\1", printable(text)).replace("&", "&amp;").replace("<", "&lt;")
    text = _MARKUP.sub(r"\\\g<0>", text)
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")
