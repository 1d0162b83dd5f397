"""Layers of several checkpoints as one: mergekit's `passthrough` of slices.

A tensor is one of a part's, under the name of its new layer; nothing is copied or computed. The embeddings are the
first part's, what else is outside the layers the last part's, as mergekit has it. Touches no tensor data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.core.point import layer_count, layer_of, name_of, with_layer
from rvdist.core.recipe import Stack, read_stack
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.pieces import Assembled

SUFFIXES = (".yml", ".yaml")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PARTS = ("text_config", "llm_config", "language_config")
_BY_LAYER = re.compile(r".*(?:layer_types|layers_block_type|no_rope_layers)")  # lists with an entry for each layer
_EMBEDDING = re.compile(r"(?:.+\.)?(?:embed_\w+|wte|wpe|word_embeddings\w*|embeddings?|shared)(?:\..+)?")
_LAST = re.compile(r"(?:.+\.)?embed_out\..+")  # GPT-NeoX's head


@dataclass(frozen=True)
class Part:
    """Layers [first, stop) of a checkpoint."""

    checkpoint: Checkpoint
    first: int
    stop: int


@dataclass(frozen=True)
class Stacked(Checkpoint):
    """`path` is the recipe that says so; weight files have whole paths. `described`: the checkpoint whose configuration
    and tokenizer are taken."""

    parts: tuple[Part, ...] = field(default=(), repr=False)
    described: Checkpoint | None = field(default=None, repr=False)

    def __str__(self) -> str:
        runs = [f"{p.first} to {p.stop - 1} of {name_of(str(p.checkpoint.path))}" for p in self.parts]
        return f"{self.path.name} stacks layers {', then '.join(runs)}"

    @property
    def models(self) -> list[Path]:
        """The checkpoints that have its layers, and the one that describes it, each once."""
        every = [part.checkpoint for part in self.parts] + ([self.described] if self.described else [])
        return list(dict.fromkeys(one.path for one in every))

    @property
    def mapping(self) -> dict[str, tuple[str, int]]:
        """Where each tensor lies: its file and its first byte there."""
        return {name: (spec.file, spec.offset) for name, spec in self.tensors.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """That of the described checkpoint, for as many layers. Raises BadInput where it does not count its own."""
        assert self.described is not None
        config = self.described.config
        if not config:
            return {}
        where, key = _counted(self.described)
        own = config[where] if where else config
        changed = own | {key: sum(part.stop - part.first for part in self.parts)}
        for name, value in own.items():
            if isinstance(value, list) and len(value) == own[key] and _BY_LAYER.fullmatch(name):
                changed[name] = [entry for part in self.parts for entry in _entries(part, name)]
        return config | {where: changed} if where else changed


def is_stack(path: Path) -> bool:
    """Whether a source of this path is a recipe of layers."""
    return path.suffix in SUFFIXES and path.is_file()


def open_stack(path: Path, open_source: Callable[[str], Checkpoint]) -> Stacked:
    """The layers that the recipe at `path` stacks, from checkpoints that `open_source` opens. Raises BadInput."""
    stack = read_stack(path)
    for name in _models(stack):
        if is_stack(Path(name).expanduser()):
            raise BadInput(f"{path}: stacks layers of {name}, a recipe itself; write that as a checkpoint first")
    opened = {name: _plain(path, open_source(name)) for name in dict.fromkeys([stack.config, *_models(stack)])}
    parts = tuple(Part(opened[one.model], one.first, one.stop) for one in stack.slices)
    for part in parts:
        if (count := layer_count(part.checkpoint.tensors)) < part.stop:
            raise BadInput(
                f"{path}: layer_range [{part.first}, {part.stop}] is wanted of {part.checkpoint.path}, which has "
                f"{count} layers"
            )
    tensors: dict[str, TensorSpec] = {}
    at = 0
    for number, part in enumerate(parts):
        own: dict[int | None, list[TensorSpec]] = {}
        for spec in part.checkpoint.tensors.values():
            own.setdefault(layer_of(spec.name), []).append(spec)
        outside = own.get(None, [])
        if number == 0:
            _put(tensors, part, {spec.name: spec for spec in outside if _begins(spec.name)})
        for layer in range(part.first, part.stop):
            _put(tensors, part, {with_layer(spec.name, at): spec for spec in own.get(layer, [])})
            at += 1
        if number == len(parts) - 1:
            _put(tensors, part, {spec.name: spec for spec in outside if not _begins(spec.name)})
    _require_alike(path, tensors)
    used = dict.fromkeys(spec.file for spec in tensors.values())
    by_file = {
        str(one.path.absolute() / file): (one.stamps[file], one.metadata[file])
        for one in opened.values()
        for file in one.files
    }
    return Stacked(
        path,
        tensors,
        {file: by_file[file][1] for file in used},
        {file: by_file[file][0] for file in used},
        companions=str(opened[stack.config].beside.absolute()),
        parts=parts,
        described=opened[stack.config],
    )


def _models(stack: Stack) -> list[str]:
    return [one.model for one in stack.slices]


def _begins(name: str) -> bool:
    return bool(_EMBEDDING.fullmatch(name)) and not _LAST.fullmatch(name)


def _put(tensors: dict[str, TensorSpec], part: Part, named: Mapping[str, TensorSpec]) -> None:
    where = part.checkpoint.path.absolute()
    tensors |= {name: replace(spec, name=name, file=str(where / spec.file)) for name, spec in named.items()}


def _plain(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Raises BadInput for what is no directory of whole tensors."""
    assembled = any(isinstance(spec, Assembled) for spec in checkpoint.tensors.values())
    if checkpoint.hub:
        raise BadInput(
            f"{path}: stacks layers of {checkpoint.hub}, and takes them from directories; download it (`hf download "
            f"{checkpoint.hub.repository} --local-dir DIR`) and name DIR"
        )
    if type(checkpoint) is not Checkpoint or assembled:
        raise BadInput(
            f"{path}: stacks layers of {checkpoint.path}, which is quantised, no whole model, a stack itself, or as a "
            "training leaves it; write it as a plain checkpoint first (alpha=0, dtype=bfloat16)"
        )
    return checkpoint


def _require_alike(path: Path, tensors: Mapping[str, TensorSpec]) -> None:
    """Raises BadInput where the same tensor of two layers has another width: they fit no one model."""
    seen: dict[str, TensorSpec] = {}
    for name, spec in tensors.items():
        if layer_of(name) is not None and spec.file:
            twin = seen.setdefault(with_layer(name, 0), spec)
            if len(twin.shape) == len(spec.shape) == 1 and "norm" in name and twin.shape != spec.shape:
                raise BadInput(
                    f"{path}: tensor {name} ({spec.file}) has shape {list(spec.shape)} where {twin.name} ({twin.file}) "
                    f"has {list(twin.shape)}; layers of models of different widths are no model"
                )


def _counted(checkpoint: Checkpoint) -> tuple[str, str]:
    """Where a configuration counts its layers: its part ("" for the top), and the key. Raises BadInput."""
    count = layer_count(checkpoint.tensors)
    for where in ("", *_PARTS):
        own = checkpoint.config if not where else checkpoint.config.get(where)
        if isinstance(own, Mapping):
            for key in _COUNTS:
                if own.get(key) == count:
                    return where, key
    raise BadInput(
        f"{checkpoint.path / 'config.json'}: counts no {count} layers under {', '.join(_COUNTS)}, so that it cannot "
        "say how many a stack of them has"
    )


def _entries(part: Part, name: str) -> list[Any]:
    where, key = _counted(part.checkpoint)
    own = part.checkpoint.config[where] if where else part.checkpoint.config
    values = own.get(name)
    if not isinstance(values, list) or len(values) != own[key]:
        raise BadInput(f"{part.checkpoint.path / 'config.json'}: has no {name} for each of its layers")
    return values[part.first : part.stop]
