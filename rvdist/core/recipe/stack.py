"""The slices of a mergekit recipe of `passthrough`: layers of models, one after the other.

Source: mergekit 0.1.5. Knows names of models, and opens none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvdist.core.recipe.file import File, open_recipe


@dataclass(frozen=True)
class Slice:
    """Layers [first, stop) of a model."""

    model: str
    first: int
    stop: int


@dataclass(frozen=True)
class Stack:
    """Slices, in order; `config` is the model whose configuration and tokenizer the whole has."""

    slices: tuple[Slice, ...]
    config: str


def read_stack(path: Path) -> Stack:
    """What the recipe at `path` stacks. Raises BadInput, naming the file and the key."""
    file = open_recipe(path)
    if (method := file.method()) != "passthrough":
        file.refuse(
            "merge_method", f"is {method}, and only a recipe of passthrough is a checkpoint; give recipe={path}"
        )
    if file.content.get("slices") is None:
        file.refuse("slices", "are not there, and a checkpoint of layers wants them")
    return stack_of(file)


def stack_of(file: File) -> Stack:
    """What the slices of a recipe of `passthrough` are. Raises BadInput."""
    _refuse_scale(file, file.content, "")
    listed = file.content.get("slices")
    if not isinstance(listed, list) or not listed:
        file.refuse("slices", "has to be a list of slices")
    slices = tuple(_slice(file, entry, f"slices[{number}]") for number, entry in enumerate(listed))
    given = file.content.get("base_model")
    return Stack(slices, file.source(given, "base_model") if given is not None else slices[0].model)


def _slice(file: File, given: Any, key: str) -> Slice:
    _refuse_scale(file, given, f"{key}.")
    file.only(given, key, {"sources"})
    sources = given.get("sources")
    if not isinstance(sources, list) or len(sources) != 1:
        file.refuse(f"{key}.sources", "has to be a list of one model, for passthrough")
    key = f"{key}.sources[0]"
    _refuse_scale(file, sources[0], f"{key}.")
    file.only(sources[0], key, {"model", "layer_range"})
    span = sources[0].get("layer_range")
    whole = isinstance(span, list) and len(span) == 2 and all(type(layer) is int for layer in span)
    if not whole or not 0 <= span[0] < span[1]:
        file.refuse(f"{key}.layer_range", f"{span!r} is not a range of layers [first, after the last]")
    return Slice(file.source(sources[0].get("model"), f"{key}.model"), span[0], span[1])


def _refuse_scale(file: File, given: Any, within: str) -> None:
    """mergekit multiplies tensors by it, which a checkpoint of layers as they are cannot be."""
    parameters = given.get("parameters") if isinstance(given, dict) else None
    if isinstance(parameters, dict) and "scale" in parameters:
        file.refuse(f"{within}parameters.scale", "is not supported: layers are stacked as they are; leave it out")
