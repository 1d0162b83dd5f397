"""Tied embeddings: where a configuration makes the head the embedding, a stored head is no tensor of its own.

transformers and vLLM do not agree which of the two counts, and arithmetic on both would make two different tensors. So
a head equal to the embedding is left out of what a checkpoint consists of, and one that differs is refused. Reads two
tensors, and only where there is such a head.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.difference import Dense, Difference, Whole, stored_parts
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.elements import equal_bytes
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.private_transformers import configuration_classes

KEY = "tie_word_embeddings"
_HEAD = re.compile(r"(?:.+\.)?(?:lm_head|embed_out)\.weight")
_EMBEDDING = re.compile(r"(?:.+\.)?(?:embed_tokens|wte|embed_in|word_embeddings|shared)\.weight")
_REMEMBERED = 256  # comparisons


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the model of this configuration has one matrix as embedding and head; None where its parts disagree. What
    the configuration leaves out is as transformers has it for its kind of model; of a kind that it does not know, no.
    """
    said = set(dict(_said(config)).values())
    if said:
        return said.pop() if len(said) == 1 else None
    return _default(str(config.get("model_type")))


def contradiction(config: Mapping[str, Any]) -> str | None:
    """How the parts of a configuration disagree about tying; None where they do not."""
    said = dict(_said(config))
    if len(set(said.values())) < 2:
        return None
    spelled = " and ".join(f"{str(value).lower()} in {place}" for place, value in said.items())
    return f"its config.json has {KEY} {spelled}"


def _said(config: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """What the top and the language model's own part say, where they say it."""
    for place, part in {"the top level": config, "text_config": config.get("text_config")}.items():
        if isinstance(part, Mapping) and isinstance(part.get(KEY), bool):
            yield place, part[KEY]


@lru_cache
def _default(model_type: str) -> bool:
    classes = configuration_classes()
    with contextlib.suppress(Exception):  # whatever transformers raises for what it does not know
        return bool(getattr(classes[model_type](), KEY, False))
    return False


def is_embedding(name: str) -> bool:
    """Whether this is what embeddings are called."""
    return _EMBEDDING.fullmatch(name) is not None


def is_head(name: str) -> bool:
    """Whether this is what heads are called."""
    return _HEAD.fullmatch(name) is not None


def heads_of(embedding: str) -> list[str]:
    """What the head that is this embedding may be called where it is stored, the likeliest first."""
    parts = embedding.split(".")[:-2]
    names = ("embed_out", "lm_head") if "embed_in" in embedding else ("lm_head", "embed_out")
    return [".".join([*parts[:k], name, "weight"]) for name in names for k in range(len(parts) + 1)]


def without_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without a head that is its embedding. Raises BadInput for a head that should be and is not, and
    where the configuration contradicts itself about it."""
    if not checkpoint.config or (isinstance(checkpoint, Difference) and checkpoint.kind != "vector"):
        return checkpoint
    pairs = list(_pairs(checkpoint))
    if not pairs:
        return checkpoint
    tied = is_tied(checkpoint.config)
    if tied is None:
        raise BadInput(
            f"{checkpoint.path}: {contradiction(checkpoint.config)}, and {pairs[0][0].name} is stored beside "
            f"{pairs[0][1][0].name}; make them agree, so that it is known whether the head is the embedding"
        )
    if not tied:
        return checkpoint
    for head, embeddings in pairs:
        if not any(_equal(checkpoint, head, embedding) for embedding in embeddings):
            raise BadInput(
                f"{checkpoint.path}: its config.json has {KEY}=true, and {head.name} differs from {embeddings[0].name}"
                f"; set {KEY} to false there if the model has a head of its own, or store it without {head.name}"
            )
    heads = {head.name for head, _ in pairs}
    tensors = {name: spec for name, spec in checkpoint.tensors.items() if name not in heads}
    if isinstance(checkpoint, Difference):
        return replace(checkpoint, tensors=tensors, forms={name: checkpoint.forms[name] for name in tensors})
    return replace(checkpoint, tensors=tensors)


def without_copied_head(adapter: Difference, base: Checkpoint) -> Difference:
    """An adapter that was trained as both the embedding and the head, which it stores twice, for a base that ties them:
    without the head (peft's ensure_weight_tying)."""
    trained = {name: form for name, form in adapter.forms.items() if isinstance(form, Whole)}
    copies = [form for name, form in trained.items() if is_embedding(name)]
    heads = [name for name in trained if is_head(name) and name in adapter.tensors and name not in base.tensors]
    if len(copies) != 1 or len(heads) != 1 or not is_tied(base.config):
        return adapter
    if not _are_copies(adapter, copies[0], trained[heads[0]]):
        return adapter
    return replace(adapter, tensors={name: spec for name, spec in adapter.tensors.items() if name != heads[0]})


def _are_copies(adapter: Difference, one: Whole, other: Whole) -> bool:
    """Whether two matrices of an adapter are the same, the rows that were trained alone included."""
    if (one.rows and (one.rows.rows, one.rows.places)) != (other.rows and (other.rows.rows, other.rows.places)):
        return False
    return all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and equal_bytes(adapter, a, adapter, b)
        for a, b in zip(stored_parts(one), stored_parts(other), strict=True)
    )


def _pairs(checkpoint: Checkpoint) -> Iterator[tuple[TensorSpec, list[TensorSpec]]]:
    """Every head and the embeddings that it may be, the likeliest first: of its shape, and with a name like its own."""
    embeddings = [spec for name, spec in checkpoint.tensors.items() if _EMBEDDING.fullmatch(name)]
    for name, head in checkpoint.tensors.items():
        if _HEAD.fullmatch(name) and embeddings:
            likeness = [(spec.shape == head.shape, _common(name, spec.name)) for spec in embeddings]
            order = sorted(range(len(embeddings)), key=likeness.__getitem__, reverse=True)
            yield head, [embeddings[k] for k in order]


def _common(one: str, other: str) -> int:
    """How many parts of two names are equal from the left."""
    parts = list(zip(one.split("."), other.split("."), strict=False))
    return next((k for k, (a, b) in enumerate(parts) if a != b), len(parts))


def _equal(checkpoint: Checkpoint, head: TensorSpec, embedding: TensorSpec) -> bool:
    if isinstance(checkpoint, Difference):
        forms = [checkpoint.forms[spec.name] for spec in (head, embedding)]
        stored = [form.values for form in forms if isinstance(form, Dense)]
        if len(stored) < 2:  # nobody stores such a head of a tied model in another form
            return False
        head, embedding = stored
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    key = (str(checkpoint.path), tuple(checkpoint.stamps.items()), head, embedding)
    if key not in _compared:
        if len(_compared) >= _REMEMBERED:
            _compared.clear()
        _compared[key] = equal_bytes(checkpoint, head, checkpoint, embedding)
    return _compared[key]


_compared: dict[tuple[Any, ...], bool] = {}  # an engine opens its sources again at every swap
