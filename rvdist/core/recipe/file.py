"""A mergekit recipe as it is written: its keys, its models, and the rules that its parameters are, each checked.

What we lack is refused by name. Source: mergekit 0.1.5. Knows nothing of tensors' bytes, nor of weight points.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rvdist.core.config.schema import DTYPES
from rvdist.core.errors import BadInput
from rvdist.core.foreign import parse_yaml
from rvdist.core.recipe.cells import Rules, cells
from rvdist.core.recipe.rows import ROWS
from rvdist.core.regular import read_regular
from rvdist.core.vocabulary import Vocabulary, read_vocabulary

_MOST = 1 << 20  # bytes of a file that is read
_KEYS = {
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer",
}  # fmt: skip
_TOKENIZER = ("tokenizer_source", "tokenizer")
_PARAMETERS = {  # of any method; some say nothing there, to mergekit too
    "weight", "density", "normalize", "rescale", "lambda", "int8_mask", "t",
}  # fmt: skip
_ALSO = {"multislerp": {"normalize_weights"}, "nuslerp": {"nuslerp_row_wise"}}


@dataclass(frozen=True)
class Model:
    """An input: its name, the key that lists it, and its own parameters."""

    name: str
    key: str
    parameters: Mapping[str, Any]


class File:
    """What was read of the recipe at `path`. Every method raises BadInput, naming the file and the key."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self.content = content
        self._scopes: list[tuple[str, Mapping[str, Any]]] = []  # parameters of all models, the nearest first
        self._spans: list[tuple[str, Any]] = []

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raises BadInput, naming the file and the key."""
        raise BadInput(f"{self.path}: {key} {why}")

    def method(self) -> str:
        """The merge method; what else stands at the top level is known."""
        method = self.content.get("merge_method")
        if not isinstance(method, str) or method not in ROWS:
            self.refuse("merge_method", f"{method!r} is not one we have; choose one of {', '.join(ROWS)}")
        for key in self.content:
            if key not in _KEYS:
                self.refuse(str(key), "is not supported; leave it out")
        return method

    def require_own_tokenizer(self) -> None:
        """Refuses another tokenizer than that which layers come with."""
        for key in _TOKENIZER:
            if self.content.get(key) not in (None, "base", {"source": "base"}):
                self.refuse(key, f"{self.content[key]!r} is not supported for layers, only base")

    def vocabulary(self, models: Sequence[str]) -> Vocabulary | None:
        """Whose tokens the output has, of these models, the base first; None where the recipe does not say."""
        given = {key: self.content[key] for key in _TOKENIZER if self.content.get(key) is not None}
        if len(given) > 1:
            self.refuse("tokenizer", "and tokenizer_source are both set; give one of them")
        for key, value in given.items():
            if self.content.get("base_model") is None:
                self.refuse(key, "is set and base_model is not, so that it is not known whose ids stay; set base_model")
            return read_vocabulary(value, key, models, self.refuse)
        return None

    def dtype(self) -> str | None:
        """That of the output, None where the recipe does not say."""
        for key in ("dtype", "out_dtype"):
            if self.content.get(key) is not None and self.content[key] not in DTYPES:
                self.refuse(key, f"{self.content[key]!r} is not one of {', '.join(DTYPES)}")
        return self.content.get("out_dtype") or self.content.get("dtype")

    def models(self, method: str) -> list[Model]:
        """The inputs, in order; from `models`, or from the sources of the one slice."""
        known = _PARAMETERS | ROWS[method].parameters() | _ALSO.get(method, set())
        listed, key = self.content.get("models"), "models"
        if (listed is None) == (self.content.get("slices") is None):
            self.refuse("models", "or slices has to be there, one of them")
        self._scopes = [("parameters", self._mapping(self.content.get("parameters"), "parameters"))]
        if listed is None:
            slices = self.content["slices"]
            if not isinstance(slices, list) or len(slices) != 1:
                self.refuse("slices", "has to be a list of one slice of all layers; layers are not moved or left out")
            (only,) = slices
            self.only(only, "slices[0]", {"sources", "parameters"})
            listed, key = only.get("sources"), "slices[0].sources"
            parameters = self._mapping(only.get("parameters"), "slices[0].parameters")
            self._scopes.insert(0, ("slices[0].parameters", parameters))
        if not isinstance(listed, list) or not listed:
            self.refuse(key, "has to be a list of models")
        models = []
        for number, entry in enumerate(listed):
            own = f"{key}[{number}]"
            sliced = key != "models"
            self.only(entry, own, {"model", "parameters"} | ({"layer_range"} if sliced else set()))
            if sliced:
                self._spans.append((f"{own}.layer_range", entry.get("layer_range")))
            parameters = self._mapping(entry.get("parameters"), f"{own}.parameters")
            models.append(Model(self.source(entry.get("model"), f"{own}.model"), own, parameters))
            if [model.name for model in models].count(models[-1].name) > 1:
                self.refuse(f"{own}.model", f"{models[-1].name} is listed before; give each model once")
        scopes = [(f"{model.key}.parameters", model.parameters) for model in models]
        for where, parameters in scopes + self._scopes:
            for name in parameters:
                if name not in known:
                    self.refuse(f"{where}.{name}", f"is not a parameter we have ({', '.join(sorted(known))})")
        return models

    def base(self, method: str, models: list[Model]) -> str:
        """The model that the others are differences to; of `linear` and `karcher` it is an input like the others."""
        given, row = self.content.get("base_model"), ROWS[method]
        if given is None:
            if not row.base_is_input and not row.of_models:
                self.refuse("base_model", f"is not set; {method} needs one")
            return models[0].name
        base = self.source(given, "base_model")
        if row.base_is_input and base not in [model.name for model in models]:
            models.append(Model(base, "base_model", {}))
        return base

    def source(self, given: Any, key: str) -> str:
        """The name of a model."""
        if not isinstance(given, str) or not given:
            self.refuse(key, f"{given!r} is not the name of a model")
        if "+" in given:
            self.refuse(key, f"{given!r}: an adapter beside a model is not supported; merge the adapter first")
        return given

    def check_spans(self, layers: int) -> None:
        """Refuses slices that are not of all these layers."""
        for key, span in self._spans:
            if span != [0, layers]:
                self.refuse(key, f"{span!r} is not [0, {layers}]; layers are not moved or left out")

    def _mapping(self, given: Any, key: str) -> Mapping[str, Any]:
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            self.refuse(key, f"{given!r} is not a mapping")
        return given

    def only(self, given: Any, key: str, known: set[str]) -> None:
        """Refuses what is no mapping, or one with other keys."""
        for name in self._mapping(given, key) if given is not None else self.refuse(key, "is empty"):
            if name not in known:
                self.refuse(f"{key}.{name}", f"is not supported here, only {', '.join(sorted(known))}")

    def rules(self, name: str, own: Model | None, default: float | None) -> Rules:
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
            self.only(entry, key, {"filter", "value"})
            wanted = entry.get("filter")
            if wanted is not None and not isinstance(wanted, str):
                self.refuse(f"{key}.filter", f"{wanted!r} is not a part of a tensor's name")
            value = entry.get("value")
            numbers = [self._number(one, key) for one in (value if isinstance(value, list) else [value])]
            if not numbers:
                self.refuse(key, "is an empty list; give a number, or a gradient of them")
            rules.append(("" if wanted in (None, "*") else wanted, tuple(numbers)))
        return rules

    def _number(self, given: Any, key: str) -> float:
        try:  # YAML takes 1e-3 for a string
            number = math.nan if given is None or isinstance(given, bool) else float(given)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self.refuse(key, f"{given!r} is not a finite number")
        return number

    def flag(self, name: str, default: bool) -> bool:
        """True or false, for all models."""
        for where, parameters in self._scopes:
            if (given := parameters.get(name)) is not None:
                if not isinstance(given, bool):
                    self.refuse(f"{where}.{name}", f"{given!r} is not true or false")
                return given
        return default

    def constant(self, name: str, rules: list[Rules], tensors: Collection[str]) -> float:
        """The one value of a parameter that we have once for all vectors and tensors."""
        constants = {value for values, _, _ in cells(rules, tensors) for value in values if value is not None}
        numbers = {number for value in constants for number in value}
        if len(numbers) > 1:
            self.refuse(
                name, f"differs between models or tensors ({', '.join(f'{n:g}' for n in sorted(numbers))}); give one"
            )
        return numbers.pop() if numbers else 1.0


def open_recipe(path: Path) -> File:
    """The recipe at `path`, read and parsed. Raises BadInput."""
    try:
        content = parse_yaml(read_regular(path, _MOST))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give recipe=FILE.yml") from None
    except ValueError as error:
        raise BadInput(f"{path}: is not YAML that a recipe can be: {error}") from None
    if not isinstance(content, Mapping):
        raise BadInput(f"{path}: is not a mergekit recipe; its top level has to be a mapping with merge_method")
    return File(path, content)
