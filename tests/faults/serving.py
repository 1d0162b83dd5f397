"""Processes that fork others which meet faults (tests/faults/shim.py)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import forked
from shim import build

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str]]


def serving(place: Path, *modules: str) -> tuple[socket.socket, dict[str, str]]:
    """A process that forks others which meet faults."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(build(place)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    return forked.serve(modules, environment), environment
