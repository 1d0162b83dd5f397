"""An engine as a Ray actor: a slice in, its answers out, and how far it is meanwhile. Imports no Ray itself.

What it fails of it says with the end of its log, which nobody sees otherwise.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput, Failed
from rvdist.core.text import reason
from rvdist.evaluate.fleet.arguments import EngineSettings, environment
from rvdist.evaluate.fleet.engine import Engine
from rvdist.evaluate.fleet.schedule import Slice
from rvdist.evaluate.request import Answered, Progress, Refused, Request, Unscorable, Unusable

_LINES, _BYTES = 4, 2000  # of a log that are shown


class EngineActor:
    """An engine as a Ray actor answers a whole slice in one call. Any class of these methods can be in its place;
    one that does not tell how far it is returns what this one yields last; one that `reads_ahead` takes what may
    come after, too. It is made at once and started by the first `info`, so that one that waits for room on the
    cluster is told from one that starts."""

    reads_ahead = True

    def __init__(self, base: str, settings: EngineSettings) -> None:
        # Ray sets it to num_cpus. A runtime environment would too, but takes a process and two seconds more
        os.environ["OMP_NUM_THREADS"] = str(settings.cpu_threads)
        self._made_of, self._told = (base, settings), environment()
        self._engine: Engine | None = None

    def info(self) -> dict[str, Any]:
        """What the engine says of itself. Raises BadInput and Unusable where it cannot start, Failed with the end of
        the log where it did not."""
        with _with_log():
            if self._engine is None:
                self._engine = Engine(*self._made_of)
            return self._engine.info() | {"log": _log(), "host": platform.node(), "environment": self._told}

    def answer(
        self, piece: Slice, requests: Sequence[Request], after: Sequence[Request] = ()
    ) -> Iterator[Progress | tuple[Answered | Refused, float]]:
        """How far it is, now and then; meanwhile the prompts of what may come `after` are made ready. Last the
        answers, or why there are none at this point, and the seconds that the swap took (0: none was needed). Raises
        BadInput for a prompt that does not fit, Unusable and Failed as `info` does."""
        engine = self._engine
        assert engine is not None
        begin, truncated, moved = time.perf_counter(), engine.truncated, not engine.is_at(piece.point)
        swapped = begin
        with _with_log():
            try:
                engine.swap(piece.point)
                swapped = time.perf_counter()
                engine.prepare(after)
                answers = yield from engine.answer_all(requests)
            except Unscorable as error:
                yield Refused(str(error)), (swapped - begin) * moved
                return
            except ValueError as error:
                raise BadInput(str(error)) from None
        cut, seconds = engine.truncated - truncated, time.perf_counter() - swapped
        yield Answered(tuple(answers), cut, seconds, tuple(engine.spoiled)), (swapped - begin) * moved


@contextlib.contextmanager
def _with_log() -> Iterator[None]:
    """What is raised within is ours, or Failed with the end of this process's log."""
    try:
        yield
    except (BadInput, Unusable, Failed):
        raise
    except Exception as error:
        end = log_end(_log())
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        raise Failed(f"{type(error).__name__}: {reason(error, 500)}{end}") from None


def _log() -> str:
    """The file that Ray has this process write to, if it is one."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/fd/2")
    return ""


def log_end(log: str) -> str:
    """The last lines of a log as a part of a sentence, and where all of it is."""
    with contextlib.suppress(OSError):
        path = Path(log)
        if path.is_file():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _BYTES))
                text = file.read(_BYTES).decode(errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()][-_LINES:]
            return (f"; its log ends: {' | '.join(lines)}" if lines else "") + f" ({log} on {platform.node()})"
    return f"; its log is {log}" if log else ""
