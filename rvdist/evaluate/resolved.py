"""What vLLM chose by itself where the cached answers of some engines were made. It is part of the cache's key, which is
asked before an engine is up: so it is kept beside the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rvdist.core.foreign import parse_json
from rvdist.core.regular import read_regular, write_regular
from rvdist.evaluate.cache import digest_of

_MOST = 4 << 20  # bytes of what is remembered


def name_of(identity: Mapping[str, Any], tensors: str) -> str:
    """That of engines with this `identity` on a model of these `tensors`."""
    return digest_of([identity, tensors])


def recall(cache: Path, engines: str) -> dict[str, str]:
    """What was chosen where engines of this name answered before; nothing where it cannot be read."""
    found = _read(cache).get(engines, {})
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def remember(cache: Path, engines: str, chosen: Mapping[str, str]) -> None:
    """Keeps what was first chosen, in `cache.dir`."""
    known = _read(cache)
    if chosen and engines not in known:
        with suppress(OSError):
            write_regular(_file(cache), json.dumps(known | {engines: dict(chosen)}))


def _read(cache: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = parse_json(read_regular(_file(cache), _MOST))
        return found if isinstance(found, dict) else {}
    return {}


def _file(cache: Path) -> Path:
    return cache / "engines.json"
