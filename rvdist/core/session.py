"""The directory in which a Ray of our own keeps its sockets and logs: closed to others, and gone when it ends.

Ray lets everybody write in the directory that it is given (mode 0777), so that stands in one of mode 0700. A process of
ours that is killed, or ended from inside Ray, ends nothing: a keeper, which is a process of its own, then does, and has
the last word.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rvdist.core.errors import BadInput

_PREFIX, _INNER, _LOCK = "ray", "r", "lock"
_NAME = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")
_SOCKET = len(f"/{_PREFIX}12345678/{_INNER}/session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_LONGEST = 107 - _SOCKET  # bytes of the directory under which Ray can have its sockets
_ROOM = 16 << 20  # bytes: with less, Ray may end while it starts, and does not say of what
_NEW = 60.0  # seconds for which one without a holder may be about to get one
_PATIENCE = 1.0  # seconds in which what still writes in it ends
MARK = "RVDIST_RAY"  # in the environment of all that Ray starts: the directory

last_word = ""  # of who is killed while it has one, on standard error

# Given the directory and the last word; reads a dot from who has ended its Ray itself, another byte from who has said
# why it ends, and nothing once that is killed.
_KEEPER = f"""
import os, shutil, signal, sys, time
path, word = sys.argv[1:]
while byte := sys.stdin.buffer.read(1):
    if byte == b".":
        sys.exit()
    word = ""
if word:
    print(word, file=sys.stderr, flush=True)
mark, until = b"{MARK}=" + os.fsencode(path) + b"\\0", time.monotonic() + 60
killed = time.monotonic()
while time.monotonic() < min(until, killed + 2):  # one that is about to begin shows no mark yet
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark in open("/proc/" + pid + "/environ", "rb").read():
                os.kill(int(pid), signal.SIGKILL)
                killed = time.monotonic()
        except OSError:
            pass
    time.sleep(0.1)
shutil.rmtree(path, ignore_errors=True)
"""


def is_ours(session: str) -> bool:
    """Whether a Ray that keeps its files there was started by a command of ours, for itself."""
    return any(_NAME.fullmatch(part) for part in Path(session).parts[:-1])


class SessionDirectory:
    """Made for one start of Ray; removed by `remove`, or, where its process was killed, by a later one's. Raises
    BadInput where none can be made."""

    def __init__(self) -> None:
        above = _above()
        _sweep(above)
        try:
            above.mkdir(parents=True, exist_ok=True)
            _require_room(above)
            self._path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=above))
            self._lock = open(self._path / _LOCK, "wb")  # noqa: SIM115  # held as long as it is ours
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise BadInput(
                f"{above}: cannot hold Ray's files ({error.strerror}); set RAY_TMPDIR to a directory that can"
            ) from None
        self._owner = os.getpid()
        self._keeper: subprocess.Popen[bytes] | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is started within ends with this process, even if it is killed."""
        command = [sys.executable, "-I", "-S", "-c", _KEEPER, str(self._path), last_word]
        with suppress(OSError):  # where no process can be started, nothing needs one to end it
            self._keeper = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/"
            )
        os.environ[MARK] = str(self._path)
        try:
            yield
        finally:
            del os.environ[MARK]

    @property
    def own(self) -> str:
        """Where what is ours stands beside what Ray has."""
        return str(self._path)

    @property
    def path(self) -> str:
        """What Ray is given."""
        return str(self._path / _INNER)

    def said(self) -> None:
        """This process has said why it ends: nobody else need."""
        if self._keeper and self._keeper.stdin:
            with suppress(OSError, ValueError):
                self._keeper.stdin.write(b"s")
                self._keeper.stdin.flush()

    def remove(self) -> None:
        """Deletes it, where this process made it; waits up to a second for what Ray still writes."""
        if self._owner != os.getpid():
            return  # a fork's
        until = time.monotonic() + _PATIENCE
        while self._path.exists():  # Ray's last processes may still write in it
            shutil.rmtree(self._path, ignore_errors=True)
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        self._lock.close()
        if self._keeper:
            with suppress(OSError, subprocess.TimeoutExpired):
                self._keeper.communicate(b".", timeout=_PATIENCE)
            self._keeper = None


def _above() -> Path:
    """Where Ray's own choice would be, if that is not too long for the names of its sockets. Raises BadInput where the
    user chose it."""
    variable = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    chosen = os.path.abspath(os.environ.get(variable) or "/tmp")
    if len(os.fsencode(chosen)) <= _LONGEST:
        return Path(chosen)
    if variable == "RAY_TMPDIR" or not os.access("/tmp", os.W_OK | os.X_OK):
        raise BadInput(
            f"{variable}={chosen}: is too long for the names of Ray's sockets, which leave room for {_LONGEST} bytes; "
            "set RAY_TMPDIR to a shorter directory, such as /tmp"
        )
    return Path("/tmp")


def _require_room(above: Path) -> None:
    """Raises BadInput where a file system is as good as full."""
    said = os.statvfs(above)
    left = said.f_bavail * said.f_frsize
    if said.f_blocks and left < _ROOM:
        raise BadInput(
            f"{above}: has {left / 2**20:.1f} MiB left, and Ray's files are to have {_ROOM / 2**20:.0f} MiB; make room "
            "there, or set RAY_TMPDIR to a directory that has some"
        )


def _sweep(above: Path) -> None:
    """Removes those of this user's whose processes were killed."""
    with suppress(OSError), os.scandir(above) as entries:
        for entry in entries:
            with suppress(OSError):
                if _NAME.fullmatch(entry.name) and _is_left(entry):
                    shutil.rmtree(entry.path, ignore_errors=True)


def _is_left(entry: os.DirEntry[str]) -> bool:
    status = entry.stat(follow_symlinks=False)
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700
    if not ours or time.time() - status.st_mtime < _NEW:
        return False
    with open(os.open(Path(entry.path) / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is held
    return True
