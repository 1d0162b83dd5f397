"""A mergekit recipe (YAML) as a weight point: what every tensor's parameters come to, told in masks.

Source: mergekit 0.1.5, whose rules for filters, gradients and defaults these are; docs/recipes.md says where the
arithmetic differs. What we lack is refused by name. Knows the names of the base's tensors, and nothing of bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from rvdist.core.config.schema import DTYPES
from rvdist.core.errors import BadInput
from rvdist.core.foreign import parse_yaml
from rvdist.core.mergekit import ROWS
from rvdist.core.method import MethodSpec
from rvdist.core.point import Mask, Term, Vector, WeightPoint, layer_count, layer_of
from rvdist.core.regular import read_regular

_MOST = 1 << 20  # bytes of a file that is read
_KEYS = {
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer",
}  # fmt: skip
_PARAMETERS = {  # of any method; some say nothing there, to mergekit too
    "weight", "density", "normalize", "rescale", "lambda", "int8_mask", "t",
}  # fmt: skip
_ALSO = {"multislerp": {"normalize_weights"}, "nuslerp": {"nuslerp_row_wise"}}
_INSIDE_LAYERS = r"(?:.*\.)?\d+(?:\..*)?"

Numbers = tuple[float, ...]  # one value, or a gradient over the layers
Rules = list[tuple[str, Numbers]]  # (what the name contains, value), the first that fits counts
Names = Callable[[str], Collection[str]]


@dataclass(frozen=True)
class Recipe:
    """`dtype` is that of the output: bfloat16, float16 or float32; None keeps the base's own."""

    point: WeightPoint
    dtype: str | None


def read_recipe(path: Path, names: Names, seed: int = 0) -> Recipe:
    """What the recipe at `path` asks for. `names` gives the tensor names of a source; it is asked for the base's only.
    `seed` begins DARE's draws. Raises BadInput, naming the file and the key."""
    try:
        content = parse_yaml(read_regular(path, _MOST))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give recipe=FILE.yml") from None
    except ValueError as error:
        raise BadInput(f"{path}: is not YAML that a recipe can be: {error}") from None
    if not isinstance(content, Mapping):
        raise BadInput(f"{path}: is not a mergekit recipe; its top level has to be a mapping with merge_method")
    return _File(path, content).recipe(names, seed)


@dataclass(frozen=True)
class _Model:
    name: str
    key: str
    parameters: Mapping[str, Any]


class _File:
    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self._path = path
        self._content = content
        self._scopes: list[tuple[str, Mapping[str, Any]]] = []  # parameters of all models, the nearest first
        self._spans: list[tuple[str, Any]] = []

    def _refuse(self, key: str, why: str) -> NoReturn:
        raise BadInput(f"{self._path}: {key} {why}")

    def recipe(self, names: Names, seed: int) -> Recipe:
        method = self._content.get("merge_method")
        if method not in ROWS:
            self._refuse("merge_method", f"{method!r} is not one we have; choose one of {', '.join(ROWS)}")
        for key in self._content:
            if key not in _KEYS:
                self._refuse(str(key), "is not supported; leave it out")
        self._check_tokenizer()
        models = self._models(_PARAMETERS | ROWS[method].parameters() | _ALSO.get(method, set()))
        base = self._base(method, models)
        tensors = names(base)
        self._check_spans(layer_count(tensors))
        point = self._point(method, base, models, tensors, seed)
        return Recipe(point, self._dtype())

    def _check_tokenizer(self) -> None:
        if self._content.get("tokenizer_source") not in (None, "base"):
            self._refuse("tokenizer_source", f"{self._content['tokenizer_source']!r} is not supported, only base")
        if self._content.get("tokenizer") not in (None, {"source": "base"}):
            self._refuse("tokenizer", f"{self._content['tokenizer']!r} is not supported, only {{source: base}}")

    def _dtype(self) -> str | None:
        for key in ("dtype", "out_dtype"):
            if self._content.get(key) is not None and self._content[key] not in DTYPES:
                self._refuse(key, f"{self._content[key]!r} is not one of {', '.join(DTYPES)}")
        return self._content.get("out_dtype") or self._content.get("dtype")

    def _models(self, known: set[str]) -> list[_Model]:
        """The inputs, in order; from `models`, or from the sources of the one slice. `known` are their parameters."""
        listed, key = self._content.get("models"), "models"
        if (listed is None) == (self._content.get("slices") is None):
            self._refuse("models", "or slices has to be there, one of them")
        self._scopes = [("parameters", self._mapping(self._content.get("parameters"), "parameters"))]
        if listed is None:
            slices = self._content["slices"]
            if not isinstance(slices, list) or len(slices) != 1:
                self._refuse("slices", "has to be a list of one slice of all layers; layers are not moved or left out")
            (only,) = slices
            self._only(only, "slices[0]", {"sources", "parameters"})
            listed, key = only.get("sources"), "slices[0].sources"
            parameters = self._mapping(only.get("parameters"), "slices[0].parameters")
            self._scopes.insert(0, ("slices[0].parameters", parameters))
        if not isinstance(listed, list) or not listed:
            self._refuse(key, "has to be a list of models")
        models = []
        for number, entry in enumerate(listed):
            own = f"{key}[{number}]"
            sliced = key != "models"
            self._only(entry, own, {"model", "parameters"} | ({"layer_range"} if sliced else set()))
            if sliced:
                self._spans.append((f"{own}.layer_range", entry.get("layer_range")))
            parameters = self._mapping(entry.get("parameters"), f"{own}.parameters")
            models.append(_Model(self._source(entry.get("model"), f"{own}.model"), own, parameters))
            if [model.name for model in models].count(models[-1].name) > 1:
                self._refuse(f"{own}.model", f"{models[-1].name} is listed before; give each model once")
        scopes = [(f"{model.key}.parameters", model.parameters) for model in models]
        for where, parameters in scopes + self._scopes:
            for name in parameters:
                if name not in known:
                    self._refuse(f"{where}.{name}", f"is not a parameter we have ({', '.join(sorted(known))})")
        return models

    def _base(self, method: str, models: list[_Model]) -> str:
        """The model that the others are differences to; of `linear` and `karcher` it is an input like the others."""
        given, row = self._content.get("base_model"), ROWS[method]
        if given is None:
            if not row.base_is_input and not row.of_models:
                self._refuse("base_model", f"is not set; {method} needs one")
            return models[0].name
        base = self._source(given, "base_model")
        if row.base_is_input and base not in [model.name for model in models]:
            models.append(_Model(base, "base_model", {}))
        return base

    def _source(self, given: Any, key: str) -> str:
        if not isinstance(given, str) or not given:
            self._refuse(key, f"{given!r} is not the name of a model")
        if "+" in given:
            self._refuse(key, f"{given!r}: an adapter beside a model is not supported; merge the adapter first")
        return given

    def _check_spans(self, layers: int) -> None:
        for key, span in self._spans:
            if span != [0, layers]:
                self._refuse(key, f"{span!r} is not [0, {layers}]; layers are not moved or left out")

    def _mapping(self, given: Any, key: str) -> Mapping[str, Any]:
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            self._refuse(key, f"{given!r} is not a mapping")
        return given

    def _only(self, given: Any, key: str, known: set[str]) -> None:
        for name in self._mapping(given, key) if given is not None else self._refuse(key, "is empty"):
            if name not in known:
                self._refuse(f"{key}.{name}", f"is not supported here, only {', '.join(sorted(known))}")

    def _rules(self, name: str, own: _Model | None, default: float | None) -> Rules:
        """What a parameter is: the model's own rules first, the default last."""
        rules: Rules = []
        nearest = [(f"{own.key}.parameters", own.parameters)] if own else []
        for where, parameters in nearest + self._scopes:
            if parameters.get(name) is not None:
                rules += self._setting(parameters[name], f"{where}.{name}")
        return rules if default is None else [*rules, ("", (default,))]

    def _setting(self, given: Any, key: str) -> Rules:
        listed = isinstance(given, list) and any(isinstance(entry, Mapping) for entry in given)
        conditions = given if listed else [given] if isinstance(given, Mapping) else [{"value": given}]
        rules = []
        for entry in conditions:
            self._only(entry, key, {"filter", "value"})
            wanted = entry.get("filter")
            if wanted is not None and not isinstance(wanted, str):
                self._refuse(f"{key}.filter", f"{wanted!r} is not a part of a tensor's name")
            value = entry.get("value")
            numbers = [self._number(one, key) for one in (value if isinstance(value, list) else [value])]
            if not numbers:
                self._refuse(key, "is an empty list; give a number, or a gradient of them")
            rules.append(("" if wanted in (None, "*") else wanted, tuple(numbers)))
        return rules

    def _number(self, given: Any, key: str) -> float:
        try:  # YAML takes 1e-3 for a string
            number = math.nan if given is None or isinstance(given, bool) else float(given)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self._refuse(key, f"{given!r} is not a finite number")
        return number

    def _flag(self, name: str, default: bool) -> bool:
        for where, parameters in self._scopes:
            if (given := parameters.get(name)) is not None:
                if not isinstance(given, bool):
                    self._refuse(f"{where}.{name}", f"{given!r} is not true or false")
                return given
        return default

    def _point(self, method: str, base: str, models: list[_Model], tensors: Collection[str], seed: int) -> WeightPoint:
        row = ROWS[method]
        of_models = bool(row.of_models) and self._content.get("base_model") is None
        normalize = self._flag("normalize_weights" if method == "multislerp" else "normalize", row.normalize)
        rescale = self._flag("rescale", row.rescale)
        self._flag("int8_mask", False)  # saves mergekit memory, no more
        self._flag("nuslerp_row_wise", False)  # says nothing where the tensor is one vector
        for name, needed in row.only.items():
            if self._flag(name, needed) != needed:
                self._refuse(f"parameters.{name}", f"{str(not needed).lower()} is not supported for {method}")
        if method == "ties" and rescale:
            self._refuse("parameters.rescale", "true is not supported for ties")
        as_inputs = row.base_is_input or of_models
        inputs = [model for model in models if model.name != base or as_inputs]
        self._count_inputs(method, len(inputs) - as_inputs, of_models)
        given = row.weight
        rules = [self._rules(given, None if given == "t" else model, None) for model in inputs]
        if not given:
            rules = [[("", (1.0,))] for _ in inputs]
        if row.density:
            scope = [None if row.density == "select_topk" else model for model in inputs]
            rules += [self._rules(row.density, model, 1.0) for model in scope]
        factor = 1.0
        if method not in ("linear", "slerp"):
            factor = self._constant("lambda", [self._rules("lambda", None, 1.0)], tensors)
        options = {
            name: self._constant(name, [self._rules(name, model, usual) for model in inputs], tensors)
            for name, usual in row.options.items()
        }
        elects = row.elects
        if "gamma" in options and not 0 <= options["gamma"] < 1:
            self._refuse("parameters.gamma", f"{options['gamma']:g} is not at least 0 and below 1")
        if elects and options:
            options |= {"normalize": float(normalize), "factor": factor}
            factor = 1.0
        if elects and factor != 1 and (normalize or factor < 0):
            self._refuse("parameters.lambda", f"{factor:g} is not supported for {method}, only 1; scale the weights")
        terms: list[Term] = []
        for values, outside, include in _cells(rules, tensors):
            for model, value in zip(inputs, values[: len(inputs)], strict=True):
                if value is None:
                    example = next(name for name in tensors if any(re.fullmatch(p, name) for p in include or (".*",)))
                    where = "" if given == "t" else f"{model.key}."
                    self._refuse(f"{where}parameters.{given}", f"is not set for tensor {example}")
            layers = layer_count(tensors)
            both = _columns([value for value in values if value is not None], 0 if outside else layers)
            columns = [self._share(method, column[: len(inputs)], normalize, factor, of_models) for column in both]
            for number, model in enumerate(inputs):
                if model.name == base:
                    continue
                alphas = tuple(column[number] for column in columns)
                kept = tuple(column[len(inputs) + number] for column in both) if len(rules) > len(inputs) else ()
                for density in kept:
                    if not 0 < density <= 1:
                        self._refuse(row.density, f"{density:g} is not above 0 and at most 1")
                if method == "dare_ties" and not rescale and normalize and set(kept) != {1.0}:
                    self._refuse("parameters.rescale", "false is not supported for dare_ties with normalize")
                if method.startswith("dare") and not rescale:  # what the method divides by again
                    alphas = tuple(alpha * density for alpha, density in zip(alphas, kept, strict=True))
                terms += _term(Vector(model.name, base), alphas, include, outside, layers, kept)
        name = row.of_models if of_models else row.ours
        if elects and not options:
            name = f"{method}_{'mean' if normalize else 'sum'}"
        densities = {density for term in terms for density in term.density}
        one = densities.pop() if len(densities) == 1 else 1.0
        if not densities:  # the method's own, not the terms'
            terms = [replace(term, density=()) for term in terms]
        return WeightPoint(base, tuple(terms), MethodSpec(name, one, seed, tuple(options.items())).without_unused())

    def _count_inputs(self, method: str, others: int, of_models: bool) -> None:
        """Refuses too many models, or too few, beside the base."""
        least, most = (number - of_models for number in ROWS[method].others)
        if least <= others <= most:
            return
        goes = {
            "slerp": "slerp goes from the base to one other",
            "nearswap": "nearswap goes from the base to one other",
            "model_stock": "model_stock needs two or more",
            "nuslerp": f"nuslerp goes between {'that and one other' if of_models else 'two'}",
        }
        self._refuse("models", f"name {others} models beside the base; {goes[method]}")

    def _share(
        self, method: str, weights: Sequence[float], normalize: bool, factor: float, of_models: bool
    ) -> list[float]:
        """The coefficients of the inputs' differences, at one layer."""
        total = math.fsum(weights)
        row = ROWS[method]
        if method == "nuslerp" and of_models:
            return [weights[0], 0.5 if abs(total) < 1e-6 else weights[1] / total]
        if method == "multislerp":
            if normalize and total == 0:
                self._refuse("weight", "adds up to 0 somewhere, and normalize_weights divides by that sum")
            if not normalize and of_models and abs(total - 1) > 1e-6:
                self._refuse(
                    "parameters.normalize_weights",
                    f"is false and the weights add up to {total:g}; without a base_model, make them add up to 1",
                )
            return [weight / total if normalize else weight for weight in weights]
        if method == "linear":
            if normalize and total == 0:
                self._refuse("weight", "adds up to 0 somewhere, and normalize divides by that sum")
            if not normalize and abs(total - 1) > 1e-6:
                self._refuse(
                    "parameters.normalize",
                    f"is false and the weights add up to {total:g}: a model scaled as a whole is not a point of ours; "
                    "make them add up to 1, or normalize",
                )
        if row.weight != "weight" or method == "nuslerp":
            return list(weights)
        divides = normalize and not row.elects and (method == "linear" or abs(total) >= 1e-8)
        return [weight * factor / total if divides else weight * factor for weight in weights]

    def _constant(self, name: str, rules: list[Rules], tensors: Collection[str]) -> float:
        """The one value of a parameter that we have once for all vectors and tensors."""
        constants = {value for values, _, _ in _cells(rules, tensors) for value in values if value is not None}
        numbers = {number for value in constants for number in value}
        if len(numbers) > 1:
            self._refuse(
                name, f"differs between models or tensors ({', '.join(f'{n:g}' for n in sorted(numbers))}); give one"
            )
        return numbers.pop() if numbers else 1.0


def _cells(
    rules: Sequence[Rules], tensors: Iterable[str]
) -> list[tuple[tuple[Numbers | None, ...], bool, tuple[str, ...]]]:
    """The tensors by what their parameters are: (the value of every parameter, whether they are outside the layers,
    patterns of their names, none for all names). Only what is a gradient somewhere parts layers from the others."""
    filters = list(dict.fromkeys(wanted for one in rules for wanted, _ in one if wanted))
    cells: dict[tuple[tuple[Numbers | None, ...], bool], dict[tuple[bool, ...], None]] = {}
    for name in tensors:
        values = tuple(next((value for wanted, value in one if wanted in name), None) for one in rules)
        outside = layer_of(name) is None and any(value is not None and len(value) > 1 for value in values)
        cells.setdefault((values, outside), {})[tuple(wanted in name for wanted in filters)] = None
    return [
        (values, outside, tuple(_pattern(filters, signs) for signs in signatures) if filters else ())
        for (values, outside), signatures in cells.items()
    ]


def _pattern(filters: Sequence[str], contained: Sequence[bool]) -> str:
    """Matches the names that contain just these of the filters."""
    looks = [f"(?{'=' if yes else '!'}.*{re.escape(text)})" for text, yes in zip(filters, contained, strict=True)]
    return "".join(looks) + ".*"


def _columns(values: Sequence[Numbers], layers: int) -> list[list[float]]:
    """The values at every layer, or with no layers at their beginning; just one column where there is no gradient."""
    if all(len(value) == 1 for value in values) or not layers:
        return [[value[0] for value in values]]
    places = [layer / (layers - 1) for layer in range(layers)] if layers > 1 else [1.0]
    return [[_interpolate(value, place) for value in values] for place in places]


def _interpolate(gradient: Numbers, place: float) -> float:
    at = place * (len(gradient) - 1)
    low = int(at)
    high = min(len(gradient) - 1, low + 1)
    return (1 - (at - low)) * gradient[low] + (at - low) * gradient[high]


def _term(
    vector: Vector, alphas: Numbers, include: tuple[str, ...], outside: bool, layers: int, kept: Numbers
) -> list[Term]:
    exclude = (_INSIDE_LAYERS,) if outside else ()
    if not any(alphas):
        return []
    density = kept[:1] if len(set(kept)) == 1 else kept
    if len(alphas) == 1:
        return [Term(alphas[0], vector, Mask(include, exclude), density)]
    return [Term(1.0, vector, Mask(include, exclude, ((0, layers - 1),), alphas), density)]
