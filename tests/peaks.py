"""The memory that something takes, sampled while it runs: for bounds from above."""

from __future__ import annotations

import threading
from collections.abc import Callable

from rvdist.core.timing import anonymous_bytes


def peak_while(work: Callable[[], object]) -> int:
    """Anonymous bytes at most while `work` runs, beside what was there before."""
    before, over = anonymous_bytes(), threading.Event()
    seen = [before]

    def watch() -> None:
        while not over.wait(0.005):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
        seen.append(anonymous_bytes())
    finally:
        over.set()
        watcher.join()
    return max(seen) - before
