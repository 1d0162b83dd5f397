"""Where a checkpoint comes from: a directory, or a Hub repository at a revision (`org/name@revision`); and whether it
is one as it stands, or a difference, or stored in fp8. A head that is the embedding is no tensor of any."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint import adapter, fp8, stored_vector
from rvdist.weights.checkpoint.difference import Difference
from rvdist.weights.checkpoint.directory import Checkpoint, open_checkpoint
from rvdist.weights.checkpoint.tied import without_tied_head

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\w[\w.-]*(/\w[\w.-]*)*)?")


def open_source(source: str, rename: Sequence[tuple[str, str]] = ()) -> Checkpoint:
    """The checkpoint a user named, by its headers. Of a Hub repository (when there is no such path) only small files
    and headers are fetched, or with HF_HUB_OFFLINE=1 found in the cache. A `Difference` where it is an adapter or a
    stored vector, `Scaled` where it is stored in fp8. `rename` gives its tensors other names: (regular expression,
    replacement) pairs, in order. Raises BadInput, Failed."""
    found = _open(source)
    if found.files == [adapter.WEIGHTS]:
        found = adapter.as_adapter(found)
    else:
        found = stored_vector.as_vector(found) if stored_vector.is_marked(found) else fp8.as_scaled(found)
    found = without_tied_head(found)
    return _rename(found, rename) if rename else found


def _rename(found: Checkpoint, rename: Sequence[tuple[str, str]]) -> Checkpoint:
    names: dict[str, str] = {}  # the new one: the old one
    for old in found.tensors:
        new = old
        for pattern, replacement in rename:
            new = re.sub(pattern, replacement, new)
        if names.setdefault(new, old) != old:
            raise BadInput(f"{found.path}: vector.rename gives the name {new} to both {names[new]} and {old}")
    tensors = {new: replace(found.tensors[old], name=new) for new, old in names.items()}
    if isinstance(found, Difference):
        return replace(found, tensors=tensors, forms={new: found.forms[old] for new, old in names.items()})
    if isinstance(found, fp8.Scaled):
        scales = {new: found.scales[old] for new, old in names.items() if old in found.scales}
        return replace(found, tensors=tensors, scales=scales)
    return replace(found, tensors=tensors)


def _open(source: str) -> Checkpoint:
    path = Path(source).expanduser()
    if path.exists() or not _REPOSITORY.fullmatch(source):
        return open_checkpoint(path)
    from rvdist.weights.checkpoint.hub import open_repository  # the Hub's client takes a while to import

    repository, _, revision = source.partition("@")
    return open_repository(repository, revision or None)
