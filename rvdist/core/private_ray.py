"""What we take from Ray beyond its public interface, in the process that is connected to it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rvdist.core.private import Library

RAY = Library("ray", "2.60.0")
_SERVICES = ("ray._private.services:resolve_ip_for_localhost", "ray._private.services:node_ip_address_from_perspective")
NEEDED = (
    *_SERVICES,
    "ray._private.worker:_global_node",
    "ray._private.worker:global_worker.connected",
    "ray._private.node:Node.raylet_socket_name",
    "ray._private.node:Node.gcs_address",
)


def require() -> None:
    """Raises Failed where something of this is gone."""
    RAY.require(*NEEDED)


@contextmanager
def loopback_taken_at_its_word() -> Iterator[None]:
    """A patch while Ray starts: it replaces the loopback address it is told by the machine's own, and then listens on
    all addresses."""
    from ray._private import services

    resolve = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = resolve


def own_address() -> str:
    """The address of this machine, which Ray asks in place of a loopback address."""
    return str(RAY.get(_SERVICES[1])())


@dataclass(frozen=True)
class Vital:
    """Without what the connected cluster is lost: processes of this machine, by id and name, and the address of a GCS
    that is not one of them."""

    processes: tuple[tuple[int, str], ...]
    gcs: str | None


def vital() -> Vital | None:
    """None where no cluster is connected. Ray has no public word for these processes. May be called while another
    thread imports Ray: `require` has asked for what it needs."""
    worker: Any = sys.modules.get("ray._private.worker")
    node = getattr(worker, "_global_node", None)
    if not node or not worker.global_worker.connected:
        return None
    own = [
        (started[0].process.pid, name)
        for kind, name in (("gcs_server", "GCS"), ("raylet", "raylet"))
        if (started := node.all_processes.get(kind))
    ]
    if own:
        return Vital(tuple(own), None)
    raylet = _listener(node.raylet_socket_name)
    return Vital(((raylet, "raylet"),) if raylet else (), str(node.gcs_address))


@lru_cache(maxsize=1)
def _listener(path: str) -> int | None:
    """The process that listens at a socket of this machine."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(1.0)
        asking.connect(path)
        return int.from_bytes(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
    return None
