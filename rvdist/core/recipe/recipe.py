"""A mergekit recipe (YAML) as a weight point.

Source: mergekit 0.1.5, whose rules for defaults these are; docs/recipes.md says where the arithmetic differs. Knows the
names of the base's tensors, and nothing of bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rvdist.core.method import MethodSpec
from rvdist.core.point import Term, Vector, WeightPoint, layer_count
from rvdist.core.recipe.cells import cells, columns, to_terms
from rvdist.core.recipe.file import File, Model, open_recipe
from rvdist.core.recipe.rows import ROWS
from rvdist.core.recipe.stack import stack_of

Names = Callable[[str], Collection[str]]


@dataclass(frozen=True)
class Recipe:
    """`dtype` is that of the output: bfloat16, float16 or float32; None keeps the base's own."""

    point: WeightPoint
    dtype: str | None


def read_recipe(path: Path, names: Names, seed: int = 0) -> Recipe:
    """What the recipe at `path` asks for. `names` gives the tensor names of a source; it is asked for the base's only.
    Layers that are stacked are a point without terms, whose base is the recipe. `seed` begins DARE's draws. Raises
    BadInput, naming the file and the key."""
    file = open_recipe(path)
    method = file.method()
    if method == "passthrough" and file.content.get("slices") is not None:
        stack_of(file)
        file.require_own_tokenizer()
        return Recipe(WeightPoint(str(path)), file.dtype())
    models = file.models(method)
    base = file.base(method, models)
    tensors = names(base)
    file.check_spans(layer_count(tensors))
    vocabulary = file.vocabulary(list(dict.fromkeys([base, *(model.name for model in models)])))
    point = _point(file, method, base, models, tensors, seed)
    return Recipe(replace(point, vocabulary=vocabulary), file.dtype())


def _point(file: File, method: str, base: str, models: list[Model], tensors: Collection[str], seed: int) -> WeightPoint:
    row = ROWS[method]
    of_models = bool(row.of_models) and file.content.get("base_model") is None
    normalize = file.flag("normalize_weights" if method == "multislerp" else "normalize", row.normalize)
    rescale = file.flag("rescale", row.rescale)
    file.flag("int8_mask", False)  # saves mergekit memory, no more
    file.flag("nuslerp_row_wise", False)  # says nothing where the tensor is one vector
    for name, needed in row.only.items():
        if file.flag(name, needed) != needed:
            file.refuse(f"parameters.{name}", f"{str(not needed).lower()} is not supported for {method}")
    if method == "ties" and rescale:
        file.refuse("parameters.rescale", "true is not supported for ties")
    as_inputs = row.base_is_input or of_models
    inputs = [model for model in models if model.name != base or as_inputs]
    _count_inputs(file, method, len(inputs) - as_inputs, of_models)
    given = row.weight
    rules = [file.rules(given, None if given == "t" else model, None) for model in inputs]
    if not given:
        rules = [[("", (1.0,))] for _ in inputs]
    if row.density:
        scope = [None if row.density == "select_topk" else model for model in inputs]
        rules += [file.rules(row.density, model, 1.0) for model in scope]
    factor = 1.0
    if method not in ("linear", "slerp"):
        factor = file.constant("lambda", [file.rules("lambda", None, 1.0)], tensors)
    options = {
        name: file.constant(name, [file.rules(name, model, usual) for model in inputs], tensors)
        for name, usual in row.options.items()
    }
    elects = row.elects
    if "gamma" in options and not 0 <= options["gamma"] < 1:
        file.refuse("parameters.gamma", f"{options['gamma']:g} is not at least 0 and below 1")
    if method.startswith("della"):
        options["rescale"] = float(rescale)
    if elects and options:
        options |= {"normalize": float(normalize), "factor": factor}
        factor = 1.0
    if elects and factor != 1 and (normalize or factor < 0):
        file.refuse("parameters.lambda", f"{factor:g} is not supported for {method}, only 1; scale the weights")
    terms: list[Term] = []
    for values, outside, include in cells(rules, tensors):
        for model, value in zip(inputs, values[: len(inputs)], strict=True):
            if value is None:
                example = next(name for name in tensors if any(re.fullmatch(p, name) for p in include or (".*",)))
                where = "" if given == "t" else f"{model.key}."
                file.refuse(f"{where}parameters.{given}", f"is not set for tensor {example}")
        layers = layer_count(tensors)
        both = columns([value for value in values if value is not None], 0 if outside else layers)
        shares = [_share(file, method, column[: len(inputs)], normalize, factor, of_models) for column in both]
        for number, model in enumerate(inputs):
            if model.name == base:
                continue
            alphas = tuple(column[number] for column in shares)
            kept = tuple(column[len(inputs) + number] for column in both) if len(rules) > len(inputs) else ()
            for density in kept:
                if not 0 < density <= 1:
                    file.refuse(row.density, f"{density:g} is not above 0 and at most 1")
                if (
                    method.startswith("della")
                    and density < 1
                    and not 0 < density - options["epsilon"] <= density + options["epsilon"] < 1
                ):
                    file.refuse(
                        "epsilon",
                        f"{options['epsilon']:g} and density {density:g} do not keep what is dropped between 0 and 1",
                    )
            if method == "dare_ties" and not rescale and normalize and set(kept) != {1.0}:
                file.refuse("parameters.rescale", "false is not supported for dare_ties with normalize")
            if method.startswith("dare") and not rescale:  # what the method divides by again
                alphas = tuple(alpha * density for alpha, density in zip(alphas, kept, strict=True))
            terms += to_terms(Vector(model.name, base), alphas, include, outside, layers, kept)
    name = row.of_models if of_models else row.ours
    if elects and not options:
        name = f"{method}_{'mean' if normalize else 'sum'}"
    densities = {density for term in terms for density in term.density}
    one = densities.pop() if len(densities) == 1 else 1.0
    if not densities:  # the method's own, not the terms'
        terms = [replace(term, density=()) for term in terms]
    return WeightPoint(base, tuple(terms), MethodSpec(name, one, seed, tuple(options.items())).without_unused())


def _count_inputs(file: File, method: str, others: int, of_models: bool) -> None:
    """Refuses too many models, or too few, beside the base."""
    least, most = (number - of_models for number in ROWS[method].others)
    if least <= others <= most:
        return
    goes = {
        "slerp": "slerp goes from the base to one other",
        "nearswap": "nearswap goes from the base to one other",
        "passthrough": "passthrough passes one on",
        "arcee_fusion": "arcee_fusion goes from the base to one other",
        "model_stock": "model_stock needs two or more",
        "nuslerp": f"nuslerp goes between {'that and one other' if of_models else 'two'}",
    }
    file.refuse("models", f"name {others} models beside the base; {goes[method]}")


def _share(
    file: File, method: str, weights: Sequence[float], normalize: bool, factor: float, of_models: bool
) -> list[float]:
    """The coefficients of the inputs' differences, at one layer."""
    total = math.fsum(weights)
    row = ROWS[method]
    if method == "nuslerp" and of_models:
        return [weights[0], 0.5 if abs(total) < 1e-6 else weights[1] / total]
    if method == "multislerp":
        if normalize and total == 0:
            file.refuse("weight", "adds up to 0 somewhere, and normalize_weights divides by that sum")
        if not normalize and of_models and abs(total - 1) > 1e-6:
            file.refuse(
                "parameters.normalize_weights",
                f"is false and the weights add up to {total:g}; without a base_model, make them add up to 1",
            )
        return [weight / total if normalize else weight for weight in weights]
    if method == "linear":
        if normalize and total == 0:
            file.refuse("weight", "adds up to 0 somewhere, and normalize divides by that sum")
        if not normalize and abs(total - 1) > 1e-6:
            file.refuse(
                "parameters.normalize",
                f"is false and the weights add up to {total:g}: a model scaled as a whole is not a point of ours; "
                "make them add up to 1, or normalize",
            )
    if row.weight != "weight" or method == "nuslerp":
        return list(weights)
    divides = normalize and not row.elects and (method == "linear" or abs(total) >= 1e-8)
    return [weight * factor / total if divides else weight * factor for weight in weights]
