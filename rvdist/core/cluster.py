"""Connects to Ray or starts it, and says what resources there are. Knows nothing of what runs on it."""

from __future__ import annotations

import atexit
import os
import re
import secrets
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvdist.core import private_ray, standing
from rvdist.core.errors import BadInput, Failed
from rvdist.core.private_ray import Vital
from rvdist.core.session import SessionDirectory
from rvdist.core.text import reason

_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # in the environment of what `ray job submit` runs
_TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file that has the cluster's"
_PATIENCE = 60.0  # seconds for a node to say what it sees
_STARTS = 2  # of a Ray of our own, which times out where much else runs
_LOOPBACK = "127.0.0.1"
_LOST = {
    "GPU": "see what nvidia-smi shows in a step of it (srun nvidia-smi -L), and unset CUDA_VISIBLE_DEVICES",
    "CPU": "let its steps have all of its cores (srun nproc says how many they have)",
}
_leaving = False
_starting: frozenset[int] | None = None  # while a Ray of our own starts: the GCSs that there were
_settled = False  # whether it was we who chose the mode below
_MODE = "RAY_AUTH_MODE"
_session: SessionDirectory | None = None


@dataclass(frozen=True)
class Node:
    """CPU cores and GPUs of one machine of the cluster."""

    name: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Resources:
    """What the cluster has, node by node."""

    nodes: tuple[Node, ...]

    @property
    def counts(self) -> list[tuple[int, int]]:
        """(cores, GPUs) of each node."""
        return [(node.cpus, node.gpus) for node in self.nodes]

    @property
    def cpus(self) -> int:
        """Cores of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)


def connect(
    address: str = "local",
    nodes: int = 1,
    timeout: float = 0.0,
    namespace: str | None = None,
    over: threading.Event | None = None,
    say: Callable[[str], None] = lambda sentence: None,
    fresh: bool = False,
) -> Resources:
    """Joins the cluster at `address` ("auto" for the one this machine belongs to), or with "local" the one that
    `rvdist up` began, unless it is to be `fresh`, or else starts one that ends with this process and listens on
    loopback alone; a job that was submitted to a cluster joins that one. `say` is told why what is up is not joined.
    Ray keeps what we start there in `namespace`. Raises BadInput where it cannot be reached, where others can read its
    token, or where it has fewer than `nodes` nodes after `timeout` seconds; waits for them no longer when it is
    `over`."""
    import ray

    if address == "local" and _IN_A_JOB in os.environ:
        address = "auto"
    if not ray.is_initialized():
        _guard_token(address)
        named = "cluster.address"
        if address == "local" and not fresh:
            address = _find_standing(say)
        if address == "auto" and (given := os.environ.get("RAY_ADDRESS")):
            address, named = given, "RAY_ADDRESS"
        elif address == "auto" and _IN_A_JOB not in os.environ:
            address = _find_cluster()
        _require_listener(address, named)
        if _MODE not in os.environ and re.fullmatch(r"[^/]+:\d+", address) and private_ray.takes_token(address):
            raise BadInput(f"{named}={address}: the cluster takes a token; {_TOKEN}")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "90")  # Ray's own choice, 30, is little on one
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own choice, 15, starves them on a shared machine
        try:
            _init(address, namespace)
        except ray.exceptions.AuthenticationError:
            raise BadInput(f"{named}={address}: there is no token for it; {_TOKEN}") from None
        except (ConnectionError, ValueError) as error:
            hint = "" if address == "auto" else f"; if it wants a token, {_TOKEN}"
            raise BadInput(f"{named}={address}: no Ray cluster can be reached there ({error}){hint}") from None
    over = over or threading.Event()
    deadline = time.monotonic() + timeout
    while len(alive := _nodes()) < nodes and not over.is_set():
        if time.monotonic() > deadline:
            raise BadInput(
                f"cluster.nodes={nodes}: only {len(alive)} joined the cluster in {timeout:g} s; start more, or lower it"
            )
        over.wait(0.5)
    _require_given(live_nodes())
    return Resources(alive)


def _require_given(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raises BadInput for a node on which Ray sees less than its labels say that it has: what `launch/slurm.sh` was
    given there does not reach Ray. Of cores, half may be other threads of the same."""
    for node in nodes:
        for label, kind, least in (("rvdist-gpus", "GPU", 1.0), ("rvdist-cores", "CPU", 0.5)):
            given = float(node.get("Labels", {}).get(label) or 0)
            if (sees := node["Resources"].get(kind, 0.0)) < given * least:
                what = {"GPU": "GPUs", "CPU": "cores"}[kind]
                raise BadInput(
                    f"{node['NodeManagerHostname']}: the job was given {given:g} {what} there and Ray sees {sees:g}; "
                    f"{_LOST[kind]}"
                )


def _init(address: str, namespace: str | None) -> None:
    """Raises Failed where a Ray of our own does not start."""
    import ray

    global _leaving, _session, _starting
    private_ray.require()
    private_ray.take_its_words()
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        private_ray.leave_signals()
    more: dict[str, Any] = {}
    for start in range(1, _STARTS + 1):
        _leaving, _starting = False, private_ray.gcs_servers() if address == "local" else None
        if address == "local":
            _session = SessionDirectory()
            more = {"include_dashboard": False, "_node_ip_address": _LOOPBACK, "_temp_dir": _session.path}
        try:
            here = address == "local" or _is_on_loopback_alone(address)
            kept = _session.kept() if address == "local" and _session else nullcontext()
            awaited = private_ray.start_awaited() if address == "local" else nullcontext()
            with private_ray.loopback_taken_at_its_word() if here else nullcontext(), kept, awaited:
                ray.init(address=address, namespace=namespace, logging_level="ERROR", log_to_driver=False, **more)
            return
        except Exception as error:
            if address != "local":
                raise
            disconnect()
            if start == _STARTS:
                raise Failed(
                    f"Ray could not be started on this machine, though it was tried {_STARTS} times "
                    f"({reason(error, 300)}); run the same command again when less else runs here"
                ) from None
        finally:
            _starting = None


def _is_on_loopback_alone(address: str) -> bool:
    """Whether what answers at a loopback address does not at this machine's own, which Ray would ask instead."""
    host, _, port = address.rpartition(":")
    return host in (_LOOPBACK, "localhost") and not answers(f"{private_ray.own_address()}:{port}")


def _find_standing(say: Callable[[str], None]) -> str:
    """The address of the Ray that `rvdist up` began, or "local"."""
    global _settled
    found, why = standing.find()
    if found is None or not answers(found.address):
        if why or found:
            say(
                why
                or f"the Ray that `rvdist up` began does not answer at {found.address if found else ''}; one is started"
            )
        return "local"
    if _MODE not in os.environ:
        _settled = True
        private_ray.send_token()
    return found.address


def _find_cluster() -> str:
    """The address of the cluster that this machine belongs to. Ray would take one that another command has for itself,
    too, and would use a token wherever there is a file with one: whether it does is settled here. Raises BadInput where
    there is no cluster, or there are several."""
    global _settled
    addresses = private_ray.clusters_here()
    if not addresses:
        raise BadInput(
            "cluster.address=auto: no Ray cluster can be reached from this machine; start one with `ray start --head`, "
            "or name its address"
        )
    if len(addresses) > 1:
        raise BadInput(
            f"cluster.address=auto: this machine belongs to several Ray clusters ({', '.join(addresses)}); name one"
        )
    _require_listener(addresses[0], "cluster.address")  # asking for a token takes 40 s where nobody answers
    if _MODE not in os.environ:
        _settled = True
        if private_ray.takes_token(addresses[0]):
            private_ray.send_token()
        else:
            os.environ[_MODE] = "disabled"
    return addresses[0]


def _guard_token(address: str) -> None:
    """Lets nobody else read the token: Ray makes its file as the umask has it. Raises BadInput where others can read
    that of a cluster which is not ours alone: then they have it."""
    mode, variable = os.environ.get(_MODE), os.environ.get("RAY_AUTH_TOKEN_PATH")
    sends = mode.lower() == "token" if mode is not None else address in ("local", "auto")
    if not sends or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(variable) if variable else Path.home() / ".ray" / "auth_token"
    try:
        if address == "local" and not variable and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_token(path)
        status = path.stat()
        if not stat.S_IMODE(status.st_mode) & 0o077:
            return
        if address == "local":
            path.chmod(0o600)
            status = path.stat()
    except OSError:
        return  # none that Ray could read either
    if (others := stat.S_IMODE(status.st_mode)) & 0o077:
        raise BadInput(
            f"{path}: others can read the token in it (mode {others:04o}), and whoever has it can run programs on the "
            "cluster as you; start the cluster with a new one in a file of mode 0600"
        )


def _write_token(path: Path) -> None:
    """Whole or not at all; what another process has made meanwhile stays."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def vital() -> Vital | None:
    """None where no cluster is connected, or we are about to leave it."""
    if _leaving:
        return None
    return private_ray.vital() or (None if _starting is None else private_ray.starting(_starting))


def answers(address: str) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
        return True
    except (OSError, ValueError):
        return False


def own_cores() -> Resources:
    """What this process may use of this machine without Ray: no GPUs."""
    return Resources((Node("this machine", len(os.sched_getaffinity(0)), 0),))


def own_gpus() -> int:
    """How many GPUs a Ray that is started on this machine would find, without starting one."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def live_nodes() -> list[dict[str, Any]]:
    """What Ray says of every node of the connected cluster that lives."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def blind_nodes(file: Path) -> list[str]:
    """The nodes of the connected cluster on which `file` is not what it is here, or that do not say so in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_holds)
    content = file.read_bytes()
    asked = {}
    for node in live_nodes():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answer = look.options(scheduling_strategy=there).remote(file, content)
        asked[answer] = f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"
    ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE)
    return [name for answer, name in asked.items() if not _said_yes(answer)]


def _holds(file: Path, content: bytes) -> bool:
    try:
        return file.read_bytes() == content
    except OSError:
        return False


def _said_yes(answer: Any) -> bool:
    import ray

    try:
        return bool(ray.get(answer, timeout=0))
    except ray.exceptions.RayError:
        return False


def is_temporary(path: Path) -> bool:
    """Whether `path` lies in a working directory that Ray unpacked for a job and deletes after it."""
    return "working_dir_files" in path.absolute().parts


def _nodes() -> tuple[Node, ...]:
    alive = [(node["NodeID"], node["Resources"]) for node in live_nodes()]
    return tuple(Node(name, int(has.get("CPU", 0)), int(has.get("GPU", 0))) for name, has in alive)


def _require_listener(address: str, named: str) -> None:
    """Ray waits for minutes where nobody answers: ask first."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise BadInput(f"{named}={address}: no Ray cluster can be reached there ({error})") from None


def own_files() -> str:
    """The directory of a Ray that this process started, closed to others, which goes with it; empty without one."""
    return _session.own if _session else ""


def is_connected() -> bool:
    """Whether this process is connected to a cluster."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def is_given() -> bool:
    """Whether there is a cluster that this process is part of, whatever it asks for: it is connected to one, or a job
    that was submitted to one."""
    return _IN_A_JOB in os.environ or is_connected()


def disconnect() -> None:
    """Leaves the cluster, and ends it where `connect` started it."""
    global _leaving, _settled
    _leaving = True
    private_ray.shut_down()
    if _settled:
        os.environ.pop(_MODE, None)
        _settled = False
    clean()


def said() -> None:
    """It is said why this process ends."""
    if _session is not None:
        _session.said()


def clean() -> None:
    """Removes what a Ray of our own, which has ended or is about to, kept in files."""
    global _session
    if _session is not None:
        _session.remove()
        _session = None


@atexit.register
def _end() -> None:
    """Of who connects and does not disconnect."""
    if _session is not None:
        disconnect()
