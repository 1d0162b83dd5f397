"""From a configuration to the points that it speaks of: what is merged, scored, raced, stored and published.

Knows keys and points; opens nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

from rvdist.core.config.schema import (
    DTYPES,
    PLAIN,
    ArmConfig,
    Config,
    DonorsConfig,
    MaskConfig,
    MergeConfig,
    SearchConfig,
    Storage,
    VectorConfig,
    WeightedVectorConfig,
)
from rvdist.core.errors import BadInput
from rvdist.core.method import MethodSpec
from rvdist.core.point import Arm, Mask, Term, Vector, WeightPoint, name_of
from rvdist.core.text import is_repository
from rvdist.core.vocabulary import vocabulary_of

BASELINE = "baseline"
RECIPE = "recipe"
PLACEHOLDERS = "{alpha}, {target}, {vector} or {recipe}"
MOST_CANDIDATES = 1000


def alphas(value: Any, key: str = "alpha") -> list[float]:
    """One finite number or a list of them. Raises BadInput, naming `key`."""
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise BadInput(f"{key}: {number!r} is not a finite number")
    if not numbers:
        raise BadInput(f"{key} is an empty list; give at least one number")
    return [float(number) for number in numbers]


def alpha_text(alpha: float) -> str:
    """The shortest spelling of α: 1, −1, 0.25."""
    return str(int(alpha)) if alpha.is_integer() else repr(alpha)


def point(config: Config, alpha: float) -> WeightPoint:
    """target + alpha · (the vector, or the weighted sum of `vectors`). Raises BadInput."""
    if not config.target:
        raise BadInput("target is not set; give target=DIRECTORY or target=ORG/NAME")
    weighted = list(config.vectors)
    own = config.vector
    if own.plus or own.minus or own.path:
        if weighted:
            raise BadInput("vector and vectors are both set; put every vector into vectors=[…]")
        weighted = [WeightedVectorConfig(own.plus, own.minus, own.path, own.mask, own.rename)]
    terms = []
    for number, vector in enumerate(weighted):
        key = f"vectors[{number}]" if config.vectors else "vector"
        named, mask = _vector(vector, key), _mask(vector.mask, f"{key}.mask")
        try:
            terms.append(Term(alpha * vector.alpha, named, mask))
        except ValueError as error:
            raise BadInput(f"{key}: {error}") from None
    whole = WeightPoint(config.target, tuple(terms), method(config.merge))
    return replace(whole, vocabulary=vocabulary_of(config.tokenizer, list(whole.sources())))


def method(merge: MergeConfig) -> MethodSpec:
    """What it has no use for stays at its default: points that are computed alike are equal. Raises BadInput."""
    if not 0 < merge.density <= 1:
        raise BadInput(
            f"merge.density: {merge.density:g} is not a share of each vector; give a number above 0 and at most 1"
        )
    return MethodSpec(merge.method, merge.density, merge.seed).without_unused()


def _vector(vector: DonorsConfig, key: str) -> Vector:
    if vector.path and (vector.plus or vector.minus):
        raise BadInput(f"{key}.path is a vector by itself; set it, or plus and minus, but not both")
    if vector.path:
        return _with_rename(Vector(vector.path), vector, key)
    if vector.plus is None or vector.minus is None:
        lacking = "plus" if vector.plus is None else "minus"
        raise BadInput(f"{key}.{lacking} is not set; a vector needs both donors, plus and minus")
    return _with_rename(Vector(vector.plus, vector.minus), vector, key)


def _with_rename(named: Vector, vector: DonorsConfig, key: str) -> Vector:
    for pair in vector.rename:
        if len(pair) != 2:
            raise BadInput(f"{key}.rename: {list(pair)} is not a pair [regular expression, replacement]")
    try:
        return replace(named, rename=tuple((pattern, replacement) for pattern, replacement in vector.rename))
    except ValueError as error:
        raise BadInput(f"{key}.{error}") from None


def _mask(mask: MaskConfig, key: str) -> Mask:
    for span in mask.layers:
        if len(span) != 2:
            raise BadInput(f"{key}.layers: {list(span)} is not a range [first, last]")
    layers = tuple((first, last) for first, last in mask.layers)
    try:
        return Mask(tuple(mask.include), tuple(mask.exclude), layers, tuple(mask.depth))
    except ValueError as error:
        raise BadInput(f"{key.removesuffix('.mask')}: {error}") from None


def outputs(config: Config, recipe: WeightPoint | None = None) -> dict[Path, WeightPoint]:
    """What the merge stage writes: directory → point, that of a `recipe` where there is one. Raises BadInput where a
    vector or a placeholder lacks or two points would share a directory."""
    written: dict[Path, WeightPoint] = {}
    for directory, _, merged in _merges(config, recipe):
        if not merged.terms and recipe is None:
            raise BadInput("vector.plus and vector.minus (or vector.path) are not set; a merge needs a vector")
        if directory in written:
            raise BadInput(f"output: several points would be written to {directory}; put {PLACEHOLDERS} into it")
        written[directory] = merged
    return written


def _merges(config: Config, recipe: WeightPoint | None) -> Iterator[tuple[Path, float, WeightPoint]]:
    """Every directory that `output` names, with its α and its point."""
    if not config.output:
        return
    for alpha in alphas(config.alpha):
        merged = recipe or point(config, alpha)
        yield Path(_fill(config, config.output, merged, alpha)).expanduser().absolute(), alpha, merged


def _fill(config: Config, text: str, merged: WeightPoint, alpha: float) -> str:
    named = {"{alpha}": alpha_text(alpha), "{target}": name_of(merged.base), "{vector}": vector_name(merged)}
    for placeholder, name in (named | {"{recipe}": Path(config.recipe or "").stem}).items():
        text = text.replace(placeholder, name)
    return text


def repositories(config: Config, recipe: WeightPoint | None = None) -> dict[Path, str]:
    """What the publish stage uploads, and where to: directory → `org/name` or `org/name@branch`. Raises BadInput."""
    assert config.publish is not None
    own = vector_to_save(config)
    named = {own.directory: config.publish} if own else {}
    for directory, alpha, merged in _merges(config, recipe):
        named[directory] = _fill(config, config.publish, merged, alpha)
    if not named:
        raise BadInput("publish uploads what was written; set output=DIRECTORY or vector.save=DIRECTORY")
    for repository in named.values():
        if not is_repository(repository):
            raise BadInput(
                f"publish: {repository!r} is not the name of a repository; write it as ORG/NAME or ORG/NAME@BRANCH, of "
                "letters, digits, '-', '_' and '.'"
            )
    names = [repository.casefold() for repository in named.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(
            f"publish: several outputs would be uploaded to {twice[0]}; put {PLACEHOLDERS} into the name, or publish "
            "the vector by a run of its own"
        )
    return named


def vector_name(merged: WeightPoint) -> str:
    """What `{vector}` stands for: the name of what each vector leads to."""
    return "+".join(dict.fromkeys(name_of(term.vector.plus) for term in merged.terms))


def require_recipe_alone(config: Config) -> None:
    """Raises BadInput where something is set that a recipe says itself."""
    default = Config()
    for key in (
        "target", "vector", "vectors", "batch", "alpha", "arms", "sweep.alphas", "search.method", "merge.method",
        "merge.density", "tokenizer",
    ):  # fmt: skip
        of = attrgetter(key)
        if of(config) != of(default):
            raise BadInput(f"recipe and {key} are both set, and a recipe says what is merged; leave {key} out")


def vector_points(config: Config) -> dict[str, WeightPoint]:
    """What the analyze stage looks at: every vector of the configuration and of its arms, by what it is called, as the
    target plus that vector. Raises BadInput."""
    whole = point(config, 1.0)
    names = ["vector"] if len(whole.terms) == 1 else [f"vectors[{k}]" for k in range(len(whole.terms))]
    points = {name: replace(whole, terms=(term,)) for name, term in zip(names, whole.terms, strict=True)}
    for number, entry in enumerate(config.arms):
        if entry.vector is not None:
            (term,) = _entry_arm(config, entry, number).point.terms
            points[entry.name] = replace(whole, terms=(term,))
    if not points:
        raise BadInput("stages: analyze needs a vector; give vector.plus and vector.minus, or vector.path")
    return points


def lines(config: Config) -> dict[str, list[Arm]]:
    """The points along which `analyze.text` is read, evenly from 0 to 1: from minus to plus, and from the target along
    the vector; along several together from the target. Raises BadInput."""
    count = config.analyze.points
    if count < 3:
        raise BadInput(f"analyze.points: {count} points show no barrier; give at least 3")
    whole = point(config, 1.0)
    if not whole.terms:
        raise BadInput("analyze.text needs a vector; give vector.plus and vector.minus, or vector.path, or vectors")
    starts = {"target" if len(whole.terms) == 1 else "vectors": (config.target, whole.terms)}
    if len(whole.terms) == 1 and (vector := whole.terms[0].vector).minus is not None:
        starts = {"donors": (vector.minus, (Term(1.0, vector),))} | starts
    digits = max(3, len(str(count - 2)))  # each arm has another name
    return {
        name: [
            Arm(
                f"{name} {step / (count - 1):.{digits}f}",
                replace(whole, base=base, terms=_at(terms, step / (count - 1))),
            )
            for step in range(count)
        ]
        for name, (base, terms) in starts.items()
    }


def _at(terms: tuple[Term, ...], share: float) -> tuple[Term, ...]:
    return tuple(replace(term, alpha=share * term.alpha) for term in terms) if share else ()


def arms(config: Config, recipe: WeightPoint | None = None) -> list[Arm]:
    """What the evaluate stage scores, the baseline first: the listed `arms`, if there are any, and every α of
    `sweep.alphas`; else the target itself and every α, or of a search every candidate, or the point of a `recipe`.
    Raises BadInput."""
    searched, swept = config.search.method, config.sweep.alphas
    if config.arms and searched:
        raise BadInput("arms and search.method are both set; a search makes its own arms, so leave one out")
    if config.arms:
        listed = [_entry_arm(config, entry, number) for number, entry in enumerate(config.arms)]
    else:
        listed = [Arm(BASELINE, (recipe or point(config, 1.0)).unchanged, alpha=0.0)]
    listed += [Arm(RECIPE, recipe)] if recipe else []
    has_vector = bool(point(config, 1.0).terms)
    if searched and not has_vector:
        raise BadInput("search.method is set, and no vector; give vector.plus and vector.minus, or vector.path")
    if searched:
        listed += [arm for arm in candidates(config) if arm.name != BASELINE]
    elif has_vector and (swept is not None or not config.arms):
        values = alphas(config.alpha) if swept is None else alphas(swept, "sweep.alphas")
        listed += [_alpha_arm(config, alpha) for alpha in sorted(set(values) - {0.0})]
    names = [arm.name for arm in listed]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"arms: {twice[0]!r} is the name of two of them; give each its own")
    for arm in listed:
        if PLAIN not in config.prompts or arm.prompt not in config.prompts:
            raise BadInput(f"prompts: there is no style {arm.prompt!r}; there are {', '.join(config.prompts)}")
    return listed


def require_name(name: str, key: str) -> None:
    """Raises BadInput unless files can have the name of this arm."""
    if not re.fullmatch(r"[^\s./\\][^/\\\x00-\x1f]{0,99}", name):
        raise BadInput(f"{key}: {name!r} cannot be the name of a file; give a short one without / or \\")


def _entry_arm(config: Config, entry: ArmConfig, number: int) -> Arm:
    key = f"arms[{number}]"
    require_name(entry.name, f"{key}.name")
    if (entry.weights is None) == (entry.alpha is None):
        raise BadInput(f"{key}: give weights=CHECKPOINT or alpha=NUMBER, one of them")
    if entry.weights is not None:
        alpha = 0.0 if entry.weights == config.target else None
        return Arm(entry.name, WeightPoint(entry.weights), entry.prompt, alpha)
    (alpha,) = alphas(entry.alpha, f"{key}.alpha")
    if alpha == 0.0:
        return Arm(entry.name, point(config, 1.0).unchanged, entry.prompt, 0.0)
    if entry.vector is not None:
        config = replace(config, vector=VectorConfig(**vars(entry.vector)), vectors=[])
    scaled = point(config, alpha)
    if not scaled.terms:
        raise BadInput(f"{key}.alpha is set, and no vector; give vector.plus and vector.minus, or vector.path")
    own = entry.vector is None and len(scaled.terms) == 1
    return Arm(entry.name, scaled, entry.prompt, scaled.terms[0].alpha if own else None)


def _alpha_arm(config: Config, alpha: float) -> Arm:
    scaled = point(config, alpha)
    single = scaled.terms[0].alpha if len(scaled.terms) == 1 else None
    return Arm(f"alpha={alpha_text(alpha)}", scaled, alpha=single)


def candidates(config: Config) -> list[Arm]:
    """What a search chooses from: every α, or with `search.groups` every choice of one α for each group of tensors. The
    smallest come first: of equals the first is chosen. α = 0 is the baseline. Raises BadInput."""
    search = config.search
    _require_search(search)
    if search.alphas is not None:
        values = alphas(search.alphas, "search.alphas")
    else:
        values = alphas(config.alpha) if config.sweep.alphas is None else alphas(config.sweep.alphas, "sweep.alphas")
    choices = sorted(product(sorted(set(values)), repeat=max(1, len(search.groups))), key=lambda c: sum(map(abs, c)))
    if len(choices) < 2:
        raise BadInput("search.alphas: a search needs at least two values to choose from")
    if len(choices) > MOST_CANDIDATES:
        raise BadInput(
            f"search.groups: {len(search.groups)} groups of {len(set(values))} values each are {len(choices):,} "
            f"candidates; at most {MOST_CANDIDATES:,} can be raced, so give fewer of one"
        )
    raced = []
    for choice in choices:
        if not any(choice):
            raced.append(Arm(BASELINE, point(config, 1.0).unchanged, alpha=0.0))
        elif search.groups:
            raced.append(Arm(f"alpha={','.join(map(alpha_text, choice))}", _grouped_point(config, choice)))
        else:
            raced.append(_alpha_arm(config, choice[0]))
    return raced


def _grouped_point(config: Config, choice: Sequence[float]) -> WeightPoint:
    """target + Σ α_g · (m_g ⊙ v)."""
    whole = point(config, 1.0)
    if len(whole.terms) != 1 or whole.terms[0].mask != Mask():
        raise BadInput("search.groups: are masks of one vector; set vector alone, without a mask of its own")
    (term,) = whole.terms
    masks = [_mask(group, f"search.groups[{number}]") for number, group in enumerate(config.search.groups)]
    weighted = [(alpha * term.alpha, mask) for alpha, mask in zip(choice, masks, strict=True)]
    return replace(whole, terms=tuple(Term(alpha, term.vector, mask) for alpha, mask in weighted))


def _require_search(search: SearchConfig) -> None:
    for key in ("confidence", "holdout"):
        if not 0 < getattr(search, key) < 1:
            raise BadInput(f"search.{key}: {getattr(search, key):g} is not a share; give a number above 0, below 1")
    if not 0 <= search.tolerance < 1:
        raise BadInput(f"search.tolerance: {search.tolerance:g} is not a difference of scores; give 0 or more, below 1")
    if search.round < 1:
        raise BadInput(f"search.round: {search.round} is not a number of documents; give at least 1")


@dataclass(frozen=True)
class Saved:
    """A vector that is stored, where, and how."""

    vector: Vector
    directory: Path
    storage: Storage


def vector_to_save(config: Config) -> Saved | None:
    """What `vector.save` asks for. Raises BadInput."""
    own = config.vector
    if own.save is None:
        for key in ("dtype", "rank", "density", "format", "error"):
            if getattr(own, key) is not None:
                raise BadInput(f"vector.{key} says how to store a vector, and vector.save is not set; set it to a path")
        return None
    if config.tokenizer is not None:
        raise BadInput(
            "vector.save stores a vector with the tokens of its donors, and tokenizer is set; leave it out, or write "
            "both donors with the same tokens before: target=MINUS alpha=0 tokenizer=union output=M, and then "
            "target=PLUS alpha=0 tokenizer=M output=P, each with vector.plus=PLUS vector.minus=MINUS"
        )
    if config.batch:
        raise BadInput("vector.save stores one vector, and batch is set; save it by a run of its own")
    if config.vectors:
        raise BadInput("vector.save stores one vector, and vectors=[…] is set; name it as vector.plus and vector.minus")
    if own.rank is not None and own.rank < 1:
        raise BadInput(f"vector.rank: {own.rank} is not a rank; give a number of at least 1")
    if own.density is not None and not 0 < own.density <= 1:
        raise BadInput(f"vector.density: {own.density} is not a share; give a number above 0, at most 1")
    if own.error is not None and not 0 < own.error < 1:
        raise BadInput(f"vector.error: {own.error} is not a relative error; give a number above 0 and below 1")
    ways = [key for key in ("rank", "error", "density") if getattr(own, key) is not None]
    if len(ways) > 1:
        raise BadInput(f"vector.{ways[0]} and vector.{ways[1]} are two ways to store a vector; set one of them")
    if own.format and ways not in (["rank"], ["error"]):
        raise BadInput("vector.format=peft writes factors; set vector.rank, or vector.error for ranks by that bound")
    dtype = DTYPES[own.dtype] if own.dtype else None
    storage = Storage(dtype, own.rank, own.density, config.output_format.max_shard_size, own.format, own.error)
    return Saved(_vector(own, "vector"), Path(own.save).expanduser().absolute(), storage)
