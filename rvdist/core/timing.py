"""Where the seconds go: named phases of a run, for timing.json."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

_ADDING = threading.Lock()  # threads that score share one Timing


@dataclass
class Timing:
    """Of the command with the id `run`: wall seconds by phase; phases may overlap. Bytes and CPU seconds of workers, of
    engines and of an analysis, peak memory by who used it, what the fleet did."""

    phases: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    cpu_seconds: float = 0.0
    peak_anonymous_bytes: dict[str, int] = field(default_factory=dict)
    fleet: dict[str, float] = field(default_factory=dict)
    run: str = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the wall seconds that pass within to the phase `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    @contextmanager
    def count_cpu(self) -> Iterator[None]:
        """Counts this process's CPU seconds."""
        started = time.process_time()
        try:
            yield
        finally:
            self.cpu_seconds += time.process_time() - started

    def add(self, name: str, seconds: float) -> None:
        """Adds wall seconds to the phase `name`."""
        with _ADDING:
            self.phases[name] = self.phases.get(name, 0.0) + seconds

    def count(self, name: str, amount: float) -> None:
        """Adds to what the fleet did."""
        with _ADDING:
            self.fleet[name] = self.fleet.get(name, 0) + amount

    def write(self, path: Path) -> None:
        """Writes timing.json."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def seconds_since_process_start() -> float:
    """Wall seconds since the kernel started this process (Linux)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process: what is not backed by a file (Linux)."""
    match = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) << 10
