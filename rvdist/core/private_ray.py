"""What we take from Ray beyond its public interface, in the process that is connected to it."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from rvdist.core.private import Library
from rvdist.core.session import is_ours

RAY = Library("ray", "2.60.0")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SERVICES = ("ray._private.services:resolve_ip_for_localhost", "ray._private.services:node_ip_address_from_perspective")
_NOTED, _CLIENT = "ray._private.utils:read_ray_address", "ray._raylet:GcsClient"
_PRINT, _LISTEN = "ray._private.worker:print_to_stdstream", "ray._private.worker:listen_error_messages"
_NODE = "ray._private.services:get_node"
_TERMINATED = "ray._private.utils:set_sigterm_handler"
_HANDLES = "_ZN3ray6RayLog36is_failure_signal_handler_installed_E"  # of Ray's core: whether it has taken the signals
_ENABLE = "ray._private.authentication.authentication_token_setup:maybe_enable_token_auth_if_token_available"
NEEDED = (
    *_SERVICES,
    _NOTED,
    _CLIENT,
    _ENABLE,
    _PRINT,
    _LISTEN,
    _NODE,
    _TERMINATED,
    "ray._private.worker:_global_node",
    "ray._private.node:Node.raylet_socket_name",
    "ray._private.node:Node.gcs_address",
)
_PATIENCE = 90.0  # seconds for a raylet of our own to register
_FAREWELL = 10.0, 30.0  # seconds for Ray to end by itself, and after that
_WORD = 0.02  # seconds in which it says that we leave
hear: Callable[[str], None] | None = None  # is told what Ray says of workers that died


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


@contextmanager
def start_awaited() -> Iterator[None]:
    """A patch while a Ray of our own starts: it gives its raylet half a minute to register, which is little where much
    else runs, and waits as long for one that has died."""
    from ray._private import services

    ask = services.get_node

    def ask_on(*given: Any) -> Any:
        until = time.monotonic() + _PATIENCE
        while True:
            answer: Future[Any] = Future()
            threading.Thread(target=_settle, args=(answer, ask, given), daemon=True).start()
            while not answer.done():
                if not _children("raylet", alive=True):
                    raise ChildProcessError("its raylet ended while it started")
                time.sleep(0.02)
            if not isinstance(answer.exception(), RuntimeError) or time.monotonic() > until:
                return answer.result()
            time.sleep(0.1)

    services.get_node = ask_on
    try:
        yield
    finally:
        services.get_node = ask


def _settle(answer: Future[Any], ask: Callable[..., Any], given: tuple[Any, ...]) -> None:
    try:
        answer.set_result(ask(*given))
    except Exception as error:
        answer.set_exception(error)


@cache
def take_its_words() -> None:
    """A patch, for good: what Ray says of the cluster's workers, which it prints on standard output whatever
    `log_to_driver` is, between lines of ours, is heard instead. Its thread ends without a traceback where the GCS does
    as the thread begins."""
    from ray._private import worker
    from ray.exceptions import RpcError

    listen = worker.listen_error_messages

    def heard(said: dict[str, Any], ignore_prefix: bool) -> None:
        for line in said["lines"]:
            if hear is not None:
                hear(_COLOUR.sub("", str(line)))

    def listen_quietly(*given: Any) -> None:
        with suppress(RpcError):
            listen(*given)

    worker.print_to_stdstream, worker.listen_error_messages = heard, listen_quietly


@cache
def leave_signals() -> None:
    """A patch, for good: who handles SIGTERM goes on to. Ray would put a handler of its own in its place, and its core
    another, which writes a stack trace and ends the process. That one believes here to be in place already; with it go
    the traces of crashes, of which Python's own remain."""
    from ray import _raylet
    from ray._private import utils

    utils.set_sigterm_handler = lambda handler: None
    with suppress(OSError, ValueError):  # where it has another name, `rvdist.core.ends` takes the signal back
        ctypes.c_bool.in_dll(ctypes.CDLL(_raylet.__file__), _HANDLES).value = True


def own_address() -> str:
    """The address of this machine, which Ray asks in place of a loopback address."""
    return str(RAY.get(_SERVICES[1])())


def clusters_here() -> list[str]:
    """The addresses of the clusters that this machine belongs to: that of the last `ray start`, as it has noted it; or
    else those of its raylets, but for what commands of ours started for themselves alone."""
    if noted := RAY.get(_NOTED)(None):
        return [str(noted)]
    addresses = set()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = command.read_text(errors="replace").split("\0")
            flags = dict(word.partition("=")[::2] for word in words)
            address = flags.get("--gcs-address")
            if address and Path(words[0]).name == "raylet" and not is_ours(flags.get("--session_dir", "")):
                addresses.add(address)
    return sorted(addresses)


def takes_token(address: str) -> bool | None:
    """Whether the GCS there answers only whoever has its token; None where none answers in time."""
    import ray

    try:
        with _unheard():
            RAY.get(_CLIENT)(address=address).internal_kv_get(b"rvdist", b"rvdist", timeout=10)
        return False
    except ray.exceptions.AuthenticationError:
        return True
    except Exception:  # Ray says what it is, when it connects
        return None


@contextmanager
def _unheard() -> Iterator[None]:
    """What is written on standard error meanwhile is not seen: Ray's own code warns there of what is only asked."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def send_token() -> None:
    """Ray sends the user's token from here on, where there is one, and does not warn that it does."""
    logging.getLogger(_ENABLE.partition(":")[0]).setLevel(logging.ERROR)
    RAY.get(_ENABLE)(warn_if_disabled=False)


@dataclass(frozen=True)
class Vital:
    """Without what the connected cluster is lost: processes of this machine, by id and name, and the address of a GCS
    that is not one of them."""

    processes: tuple[tuple[int, str], ...]
    gcs: str | None


def vital() -> Vital | None:
    """None where no cluster is connected or about to be. Ray has no public word for these processes. May be called
    while another thread imports Ray: `require` has asked for what it needs."""
    node = getattr(sys.modules.get("ray._private.worker"), "_global_node", None)
    if not node:
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


def starting(since: frozenset[int]) -> Vital | None:
    """The same while `ray.init` makes a cluster of our own: its GCS, without which it waits for a minute and then ends
    the process; a raylet that ends is made up for by another start. `since`: `gcs_servers` before."""
    return Vital(tuple((pid, "GCS") for pid in sorted(gcs_servers() - since)), None)


def gcs_servers() -> frozenset[int]:
    """Those that are children of this process, dead ones too: one may die before anybody has seen it."""
    return _children("gcs_server")


def _children(name: str, alive: bool = False) -> frozenset[int]:
    found = set()
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            for pid in children.read_text().split():
                status = _status(pid)
                if f"({name}) " in status and not (alive and f"({name}) Z" in status):
                    found.add(int(pid))
    return frozenset(found)


def _status(pid: str) -> str:
    """Of a process; empty where it has ended, which says nothing of those beside it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text()
    return ""


def shut_down() -> None:
    """Leaves the cluster, and ends it where this process started it. A process of Ray's that stands still answers
    nobody, and Ray waits for it without end: one of our own is killed then, and another's is left to itself."""
    import ray

    connected, over = vital(), Future[None]()
    threading.Thread(target=_settle, args=(over, ray.shutdown, ()), daemon=True).start()
    if wait([over], _FAREWELL[0]).not_done and connected is not None and connected.gcs is None:
        for pid, _ in connected.processes:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    wait([over], _FAREWELL[1])
    if over.done():
        over.result()
    else:
        atexit.unregister(ray.shutdown)  # it would wait as well


def is_guest() -> bool:
    """Whether we are connected to a cluster that this process did not start."""
    known = vital()
    return known is not None and known.gcs is not None


def leave_last() -> None:
    """What is done at the exit is left to `say_farewell`: Ray would sleep for half a second."""
    import ray

    atexit.unregister(ray.shutdown)


def say_farewell() -> None:
    """Leaves the cluster of others, if there is one, as the last that a process does before `os._exit`. Once Ray's core
    has said it, it waits a quarter of a second for threads of its own; whoever lets go of an actor then is ended by
    it."""
    if is_guest():
        over = Future[None]()
        threading.Thread(target=_settle, args=(over, sys.modules["ray"].shutdown, ()), daemon=True).start()
        wait([over], _WORD)


@lru_cache(maxsize=1)
def _listener(path: str) -> int | None:
    """The process that listens at a socket of this machine."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(1.0)
        asking.connect(path)
        return int.from_bytes(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
    return None
