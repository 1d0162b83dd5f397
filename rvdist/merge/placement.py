"""What each node and worker of a merge would read and write, foreseen without running it.

Files go to nodes by longest processing time first, which is what the crew does as nodes come free; within a node
its workers share the units of every file it has taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rvdist.core.foreign import parse_json
from rvdist.core.regular import read_regular, write_regular
from rvdist.merge.plan import Plan

_WORTH_REMEMBERING = 256 << 20  # bytes moved by a merge whose rate says something


@dataclass
class NodeShare:
    """A node, how many workers it has, and what falls to it."""

    name: str
    workers: int
    files: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


def place(plan: Plan, nodes: Sequence[tuple[str, int]]) -> list[NodeShare]:
    """Each file of `plan` on one of `nodes` (name, workers), the largest first, to the one that would be done first."""
    shares = [NodeShare(name, workers) for name, workers in nodes if workers]
    for file in plan.files:
        nbytes = file.bytes_read + file.bytes_written
        share = min(shares, key=lambda s: (s.bytes_moved + nbytes) / s.workers)
        share.files += 1
        share.bytes_read += file.bytes_read
        share.bytes_written += file.bytes_written
    return shares


@dataclass(frozen=True)
class Rate:
    """What one worker did in the last merge of some size: bytes read and written a second, and its peak memory."""

    bytes_per_second: float
    anonymous_bytes: int


def rates(cache: Path) -> Path:
    """Where in `cache.dir` rates are kept."""
    return cache / "rates.json"


def remember_rate(path: Path, device: str, bytes_moved: int, worker_seconds: float, anonymous_bytes: int) -> None:
    """Keeps the rate of a merge on `device` in a JSON file, if that can be written, and what is there of others."""
    if bytes_moved < _WORTH_REMEMBERING or worker_seconds <= 0:
        return
    rates = {d: asdict(rate) for d in ("cpu", "cuda") if (rate := remembered_rate(path, d))}
    rates[device] = asdict(Rate(bytes_moved / worker_seconds, anonymous_bytes))
    with suppress(OSError):  # it is no part of the merge, which is done; what is written in part says nothing
        write_regular(path, json.dumps(rates))


def remembered_rate(path: Path, device: str) -> Rate | None:
    """The last rate on `device`, None where none was remembered."""
    try:
        rate = Rate(**parse_json(read_regular(path, 1 << 16))[device])
        known = all(type(value) in (int, float) and 0 <= value < math.inf for value in vars(rate).values())
        return rate if known and rate.bytes_per_second else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
