"""Where a checkpoint comes from: a directory, or a Hub repository at a revision (`org/name@revision`); and whether it
is one as it stands, as a training leaves it, or a difference, or stored in fp8. A head that is the embedding is no
tensor of any."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rvdist.core.errors import BadInput
from rvdist.core.text import is_repository, is_url
from rvdist.weights.checkpoint import adapter, compressed, fp8, mxfp4, stored_vector
from rvdist.weights.checkpoint.difference import Difference
from rvdist.weights.checkpoint.directory import Checkpoint, open_checkpoint
from rvdist.weights.checkpoint.stacked import is_stack, open_stack
from rvdist.weights.checkpoint.tied import without_tied_head
from rvdist.weights.checkpoint.trained import ADAPTER, open_trained


def open_source(source: str, rename: Sequence[tuple[str, str]] = ()) -> Checkpoint:
    """The checkpoint a user named, by its headers. Of a Hub repository (when there is no such path) only small files
    and headers are fetched, or with HF_HUB_OFFLINE=1 found in the cache. A `Difference` where it is an adapter or a
    stored vector, `Scaled` where it is quantised, `Stacked` where it is a mergekit recipe of passthrough. `rename`
    gives its tensors other names: (regular expression, replacement) pairs, in order. Raises BadInput, Failed."""
    path = Path(source).expanduser()
    if is_stack(path):
        checkpoint: Checkpoint = open_stack(path, open_source)
    elif (checkpoint := _open(source)).files in ([adapter.WEIGHTS], [ADAPTER]):
        checkpoint = adapter.as_adapter(checkpoint)
    else:
        checkpoint = (
            stored_vector.as_vector(checkpoint) if stored_vector.is_marked(checkpoint) else _as_numbers(checkpoint)
        )
    checkpoint = without_tied_head(checkpoint)
    return _rename(checkpoint, rename) if rename else checkpoint


def _rename(checkpoint: Checkpoint, rename: Sequence[tuple[str, str]]) -> Checkpoint:
    names: dict[str, str] = {}  # the new one: the old one
    for old in checkpoint.tensors:
        new = old
        for pattern, replacement in rename:
            new = re.sub(pattern, replacement, new)
        if names.setdefault(new, old) != old:
            raise BadInput(f"{checkpoint.path}: vector.rename gives the name {new} to both {names[new]} and {old}")
    tensors = {new: replace(checkpoint.tensors[old], name=new) for new, old in names.items()}
    if isinstance(checkpoint, Difference):
        return replace(checkpoint, tensors=tensors, forms={new: checkpoint.forms[old] for new, old in names.items()})
    if isinstance(checkpoint, fp8.Scaled):
        scales, stored = (
            {new: of[old] for new, old in names.items() if old in of} for of in (checkpoint.scales, checkpoint.stored)
        )
        return replace(checkpoint, tensors=tensors, scales=scales, stored=stored)
    return replace(checkpoint, tensors=tensors)


def _as_numbers(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with what is quantised as numbers, of which there must be some."""
    readers = {compressed.METHOD: compressed.as_compressed, mxfp4.METHOD: mxfp4.as_mxfp4}
    method = str(fp8.quantization_of(checkpoint.config).get("quant_method"))
    read = readers.get(method, fp8.as_scaled)(checkpoint)
    for name in read.scales if isinstance(read, fp8.Scaled) else ():
        if not read.tensors[name].numel:
            raise BadInput(f"{read.path}: tensor {name} is quantised and has no elements; leave it out")
    return read


def _open(source: str) -> Checkpoint:
    if is_url(str(source)):
        raise BadInput(
            f"{source}: is a URL, and a checkpoint is a directory or a Hub repository, ORG/NAME[@REVISION]; copy it to "
            "a directory, or mount it"
        )
    path = Path(source).expanduser()
    if path.exists() or not is_repository(source):
        return open_trained(path) or open_checkpoint(path)
    from rvdist.weights.checkpoint.hub import open_repository  # the Hub's client takes a while to import

    repository, _, revision = source.partition("@")
    return open_repository(repository, revision or None)
