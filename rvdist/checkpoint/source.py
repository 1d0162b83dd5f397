"""Where a checkpoint comes from: a directory, or a Hub repository at a revision (`org/name@revision`); and whether it
is one as it stands, or a difference, or stored in fp8."""

from __future__ import annotations

import re
from pathlib import Path

from rvdist.checkpoint import adapter, artifact, scaled
from rvdist.checkpoint.directory import Checkpoint, open_checkpoint

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\w[\w.-]*(/\w[\w.-]*)*)?")


def open_source(source: str) -> Checkpoint:
    """The checkpoint a user named, by its headers. Of a Hub repository (when there is no such path) only small files
    and headers are fetched, or with HF_HUB_OFFLINE=1 found in the cache. A `Difference` where it is an adapter or a
    stored vector, `Scaled` where it is stored in fp8. Raises BadInput, Failed."""
    found = _open(source)
    if found.files == [adapter.WEIGHTS]:
        return adapter.as_adapter(found)
    return artifact.as_vector(found) if artifact.is_marked(found) else scaled.as_scaled(found)


def _open(source: str) -> Checkpoint:
    path = Path(source).expanduser()
    if path.exists() or not _REPOSITORY.fullmatch(source):
        return open_checkpoint(path)
    from rvdist.checkpoint.hub import open_repository  # the Hub's client takes a while to import

    repository, _, revision = source.partition("@")
    return open_repository(repository, revision or None)
