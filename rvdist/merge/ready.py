"""Merge workers that begin at once: processes forked from one that `rvdist up` keeps, which has their imports done.

Whoever connects to its socket gets a process with one worker, which ends with the connection. Both ends are the same
user's, and what they say to each other is pickled. Knows nothing of Ray.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from rvdist.core.errors import BadInput, Failed
from rvdist.merge.plan import Unit, UnitDone
from rvdist.weights.checkpoint.journal import Written
from rvdist.weights.checkpoint.staging import Probe

_PR_SET_PDEATHSIG = 1
_PATIENCE = 30.0  # seconds for a worker to begin: its process may be stopped


class ReadyWorker:
    """A `MergeWorker` in such a process, behind the socket at `path`. Raises OSError where there is none, Failed where
    it ends before its time or does not answer for `silence` seconds, which ends it, and what it raises itself."""

    def __init__(self, path: str, *made_of: Any, silence: float = 900.0) -> None:
        self._silence = silence
        with socket.socket(socket.AF_UNIX) as made:
            made.settimeout(_PATIENCE)  # where too many wait already, too
            made.connect(path)
            made.settimeout(None)
            if not _is_own(made):
                raise PermissionError(1, "another user's", path)
            self._connection = Connection(made.detach())
        self.cpu_seconds = 0.0
        try:
            if not self._connection.poll(_PATIENCE):
                raise TimeoutError(errno.ETIMEDOUT, "does not answer", path)
            self._pid = self._connection.recv()  # EOFError where it has ended
            self._ask("__init__", *made_of)
        except EOFError:
            self.close()
            raise ConnectionResetError(errno.ECONNRESET, "has ended", path) from None
        except BaseException:
            self.close()
            raise

    def sees(self, probe: Probe) -> bool:
        return bool(self._ask("sees", probe))

    def can_read(self, source: str, file: str) -> bool:
        return bool(self._ask("can_read", source, file))

    def run(self, unit: Unit, claims: tuple[Written | None, ...]) -> UnitDone:
        done: UnitDone = self._ask("run", unit, claims)
        self.cpu_seconds = done.cpu_seconds
        return done

    def sync(self) -> None:
        self._ask("sync")

    def close(self) -> None:
        self._connection.close()

    def _ask(self, what: str, *given: Any) -> Any:
        try:
            self._connection.send((what, given))
            if not self._connection.poll(self._silence):
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)  # it must not write when it goes on
                raise Failed(
                    f"a merge worker's process did not answer for {self._silence:g} s (merge.timeout) and was ended; "
                    "what is done is kept, and the same command goes on from there"
                )
            answer, error = self._connection.recv()
        except (EOFError, OSError):
            raise Failed(
                "a merge worker's process ended before its time (killed?); what is done is kept, and the same command "
                "goes on from there"
            ) from None
        if error is not None:
            raise error
        return answer


def main() -> NoReturn:
    """Of the process that is kept: it is given the number of a listening socket, and ends with its standard input."""
    listening = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those below
    from rvdist.merge.worker import MergeWorker
    from rvdist.weights.arithmetic.method import warm_up

    warm_up()
    gc.freeze()
    kept = os.getpid()
    while True:
        able, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in able:
            os._exit(0)
        with suppress(OSError), listening.accept()[0] as asked:
            if _is_own(asked) and os.fork() == 0:
                listening.close()
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == kept:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _serve(Connection(asked.detach()), MergeWorker)
                os._exit(0)


def _serve(connection: Connection, kind: type[Any]) -> None:
    """Has one of this kind do what it is asked, until nobody asks."""
    worker: Any = None
    with suppress(EOFError, OSError):
        connection.send(os.getpid())
        while True:
            what, given = connection.recv()
            answer: Any = None
            error: Exception | None = None
            try:
                if what == "__init__":
                    worker = kind(*given)
                else:
                    answer = getattr(worker, what)(*given)
            except (BadInput, Failed) as raised:
                error = raised
            except Exception as raised:
                error = RuntimeError(f"{type(raised).__name__}: {raised}")
            connection.send((answer, error))


def _is_own(connected: socket.socket) -> bool:
    """Whether this user's process is at the other end."""
    _, user, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return bool(user == os.geteuid())


def cpu_seconds(workers: Sequence[object]) -> float:
    """Of those among them that have processes of their own."""
    return sum(worker.cpu_seconds for worker in workers if isinstance(worker, ReadyWorker))


if __name__ == "__main__":
    main()
