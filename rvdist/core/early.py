"""A signal that comes while a command loads its modules: ends it without a traceback.

Imports nothing that takes time. `rvdist.core.ends` has the signals from when there is something to keep.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

SAID = {  # of each signal that ends a command
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated (SIGTERM)",
    signal.SIGHUP: "ended with its terminal (SIGHUP)",
}


def end_quietly() -> None:
    """From now on a signal ends the process in one sentence and by its status, but one that is ignored, as under
    nohup. For commands alone: whoever imports rvdist keeps their handlers."""
    for number in SAID:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def as_usual() -> None:
    """Gives back what Python does at a signal of itself."""
    for number in SAID:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):  # nobody may read it any more
        os.write(2, f"rvdist: {SAID[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)
