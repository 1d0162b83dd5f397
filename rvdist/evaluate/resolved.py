"""What vLLM chose by itself where the cached answers of some engines were made. It is part of the cache's key, which is
asked before an engine is up: so it is kept beside the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rvdist.core.errors import Failed
from rvdist.core.foreign import parse_json
from rvdist.core.regular import read_regular, write_regular
from rvdist.evaluate.cache import digest_of

_MOST = 4 << 20  # bytes of what is remembered


def name_of(identity: Mapping[str, Any], tensors: str) -> str:
    """That of engines with this `identity` on a model of these `tensors`."""
    return digest_of([identity, tensors])


def recall(cache: Path, engines: str) -> dict[str, str]:
    """What was chosen where engines of this name answered before; nothing where it cannot be read."""
    return _read(_file(cache, engines)) or _read(cache / "engines.json", engines)


def remember(cache: Path, engines: str, chosen: Mapping[str, str]) -> None:
    """Keeps what was first chosen, in `cache.dir`; it is durable when this returns. In a file of its own: what another
    command keeps meanwhile is not lost, and one that is written in part is of engines that have no answers yet. Raises
    Failed where it cannot be kept."""
    if not chosen or recall(cache, engines):
        return
    path = _file(cache, engines)
    try:
        write_regular(path, json.dumps(dict(chosen)), durable=True)
    except OSError as error:
        raise Failed(
            f"{path}: cannot be written ({error.strerror}), and without it answers in the sample cache are not found "
            "again; mend that, and the same command goes on, or set cache.dir to another directory or "
            "cache.samples=false"
        ) from None


def _read(path: Path, key: str | None = None) -> dict[str, str]:
    """What a file holds, or has under a key; nothing where it cannot be read."""
    with suppress(OSError, ValueError):
        found = parse_json(read_regular(path, _MOST))
        if isinstance(found, dict) and key is not None:
            found = found.get(key)
        return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
    return {}


def _file(cache: Path, engines: str) -> Path:
    return cache / "engines" / f"{engines}.json"
