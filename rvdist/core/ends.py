"""Ends that are not ours: a signal, or a cluster that is lost, ends the command with our sentence and a status.

Ray's core would replace the handler of SIGTERM, and when the GCS or the raylet dies it ends the process from inside,
after up to a minute, with its own text. So a thread looks: it tells at once, and where the rest has not come to an end
by then, ends the process. What processes of ours leave behind when they die is given to us, and ends with us: an engine
may be too busy with its start to see that its raylet is gone. Only the command has this; whoever uses rvdist from
Python keeps their own signals and children.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rvdist.core import cluster
from rvdist.core.early import SAID
from rvdist.core.private_ray import Vital

KEPT = "what is done is kept, and the same command goes on from there"
_TICK = 0.1  # seconds between looks
_GRACE = 7.0  # seconds that a signal leaves for stopping what runs
_ENDING = 2.0  # seconds for what is killed to be gone
_SUBREAPER = 36  # of prctl: orphans below us become our children
_STOPPED = 10.0  # seconds for which a process of Ray's may stand still, stopped, before it counts as lost
_SILENCE = 6.0  # seconds for which the GCS of a cluster that is not ours may refuse before it counts as lost


class Ended(KeyboardInterrupt):
    """A signal that ends the command: everything that gives way to an interrupt gives way to it."""


class Watch:
    """Once begun, in the main thread, it lasts as long as the process. `tell` is given the sentence and the status, at
    most once, from another thread. `status`: that of the signal that came, None while there is none."""

    def __init__(self, tell: Callable[[str, int], None]) -> None:
        self.status: int | None = None
        self._tell, self._deadline = tell, 0.0
        self._vital: dict[int, tuple[int, str]] = {}  # a pidfd of each process that must live: its id, what it is
        self._stopped: dict[int, float] = {}  # seconds for which it has been found stopped, by id
        self._looked = time.monotonic()  # when that was
        self._hearing, self._over = threading.Lock(), False
        self._cluster: Vital | None = None
        self._asked = self._answered = 0.0  # when the GCS was

    def begin(self) -> None:
        """Takes over the signals and starts to look."""
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        atexit.register(end_descendants)
        self._woken, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SAID:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self._raise)
        api = ctypes.pythonapi
        api.PyOS_getsig.restype = api.PyOS_setsig.restype = ctypes.c_void_p
        api.PyOS_setsig.argtypes = (ctypes.c_int, ctypes.c_void_p)
        self._handler = api.PyOS_getsig(signal.SIGTERM)
        threading.Thread(target=self._look, name="rvdist-ends", daemon=True).start()

    def end(self) -> None:
        """What was to be done is done, or was ended: no signal ends it any more. Ends the process where one has come.
        Raises Ended where one comes at its beginning; then it is called again."""
        _let_pass()
        self._hear(last=True)
        if self.status is not None:
            leave(self.status)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        _let_pass()  # a second one must not end what the first lets stop
        raise Ended

    def _look(self) -> None:
        while True:
            ready, _, _ = select.select([self._woken, *self._vital], [], [], _TICK)
            self._hear()
            dead = [f"{name} (process {pid}) ended" for fd, (pid, name) in self._vital.items() if fd in ready]
            if dead and self._is_ours_to_miss():
                self._lose(dead[0])
            self._look_for_stopped()
            if self.status is not None and time.monotonic() > self._deadline:
                leave(self.status)
            if self.status is None:
                ctypes.pythonapi.PyOS_setsig(signal.SIGTERM, self._handler)  # Ray's core puts its own there
                self._know()
                self._ask()

    def _hear(self, last: bool = False) -> None:
        """Tells of the first signal, if it comes before the `last` call."""
        with self._hearing:
            with suppress(BlockingIOError):
                for number in os.read(self._woken, 64):
                    if self.status is None and not self._over and number in SAID:
                        self.status, self._deadline = 128 + number, time.monotonic() + _GRACE
                        cluster.said()
                        self._tell(f"{SAID[signal.Signals(number)]}; {KEPT}", self.status)
            self._over |= last

    def _is_ours_to_miss(self) -> bool:
        """Whether a process of Ray's did not end because we let it, or of the signal that we got, too."""
        time.sleep(_TICK)
        self._hear()
        return self.status is None and cluster.vital() is not None

    def _know(self) -> None:
        """Opens what must live of the cluster that is connected now."""
        now = cluster.vital()
        if now == self._cluster:
            return
        for descriptor in self._vital:
            os.close(descriptor)
        self._vital, self._cluster, self._answered = {}, now, time.monotonic()
        for pid, name in now.processes if now else ():
            with suppress(OSError):
                self._vital[os.pidfd_open(pid)] = pid, name

    def _look_for_stopped(self) -> None:
        """One that was stopped answers nobody, and Ray waits for it. A terminal may stop and continue all of us: of the
        time since the last look a second counts."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 1.0), now
        for pid, name in self._vital.values():
            self._stopped[pid] = self._stopped.get(pid, 0.0) + passed if _is_stopped(pid) else 0.0
            if self._stopped[pid] > _STOPPED and self._is_ours_to_miss():
                self._lose(f"{name} (process {pid}) has been stopped for {_STOPPED:.0f} s")

    def _ask(self) -> None:
        """Looks whether the GCS of a cluster that is not ours answers."""
        now = time.monotonic()
        if self._cluster is None or not self._cluster.gcs or now - self._asked < 1.0:
            return
        if cluster.answers(self._cluster.gcs):
            self._answered = time.monotonic()
        elif time.monotonic() - self._answered > _SILENCE and self._is_ours_to_miss():
            self._lose(f"GCS at {self._cluster.gcs} does not answer")
        self._asked = time.monotonic()

    def _lose(self, what: str) -> NoReturn:
        cluster.said()
        self._tell(f"the Ray cluster is lost: its {what}; {KEPT}", 1)
        leave(1)


def _let_pass() -> None:
    for number in SAID:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)  # what is started from here on would inherit SIG_IGN


def leave(status: int) -> NoReturn:
    """Ends the process, and what it has started."""
    end_descendants()
    cluster.clean()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_descendants() -> None:
    """Kills every process below this one."""
    deadline = time.monotonic() + _ENDING
    while (found := _descendants()) and time.monotonic() < deadline:
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] == b"T"
    return False


def _descendants() -> list[int]:
    found, new = [], [os.getpid()]
    while new:
        found += (new := [child for pid in new for child in _children(pid)])
    return found


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [
            int(child)
            for thread in Path(f"/proc/{pid}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    return []
