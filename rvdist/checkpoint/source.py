"""Where a checkpoint comes from: a directory, or a Hub repository at a revision (`org/name@revision`)."""

from __future__ import annotations

import re
from pathlib import Path

from rvdist.checkpoint.directory import Checkpoint, open_checkpoint
from rvdist.errors import BadInput

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


def open_source(source: str) -> Checkpoint:
    """The checkpoint a user named. A Hub repository is downloaded, or found in the local cache when
    HF_HUB_OFFLINE=1; pickles and code are never fetched. Raises BadInput."""
    path = Path(source).expanduser()
    if not path.exists() and _REPOSITORY.fullmatch(source):
        path = _fetch(source)
    return open_checkpoint(path)


def _fetch(source: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_WANTED))
    except Exception as error:  # the Hub client's errors share no base class with those of its transport
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"{source}: no such directory, and not to be had from the Hub either ({reason})") from None
