"""The accounts of a merge: what it cost, and what of its outputs is durable. Knows nothing of who computes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rvdist.core.errors import BadInput
from rvdist.merge.plan import Output, Plan, Unit, UnitDone
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.journal import Written
from rvdist.weights.checkpoint.staging import DISCARD, Probe, Staging

SYNC_BYTES = 1 << 30  # written by a worker before they are made durable and journalled
SYNC_SECONDS = 30.0  # after which less is, too

Wrote = tuple[Unit, tuple[str, ...]]  # a unit that was written, and the digests of its bytes


@dataclass
class MergeStats:
    """What a merge cost; bytes and CPU seconds over all workers, peak memory of the largest worker, when the first
    unit began (seconds since the epoch) and wall seconds by phase. `nodes`: bytes read and written by each node."""

    bytes_read: int = 0
    bytes_written: int = 0
    peak_anonymous_bytes: int = 0
    cpu_seconds: float = 0.0
    began: float = math.inf
    phases: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)


class Accounts:
    """Of a plan's outputs, which are under construction in these stagings (None where an output is discarded);
    `progress` is told the bytes written since it was last told."""

    def __init__(
        self,
        plan: Plan,
        stagings: Sequence[Sequence[Staging | None]],
        sources: Mapping[str, Checkpoint],
        allow_nonfinite: bool,
        stats: MergeStats,
        progress: Callable[[int], None],
    ) -> None:
        self._stagings, self._sources, self._allow_nonfinite = stagings, sources, allow_nonfinite
        self._stats, self._progress = stats, progress
        self.partial = [
            Output(output.points, tuple(s.partial.absolute() if s else DISCARD for s in staged))
            for output, staged in zip(plan.outputs, stagings, strict=True)
        ]

    @property
    def probes(self) -> list[Probe]:
        """By which a worker sees whether an output is for it what it is here."""
        probes = [staging.probe for staged in self._stagings for staging in staged if staging]
        return [replace(probe, path=probe.path.absolute()) for probe in probes]

    def claims(self, unit: Unit) -> tuple[Written | None, ...]:
        """What the journal of each point of its output says of a unit."""
        key = (unit.file, unit.start, unit.nbytes)
        return tuple(staging.claims.get(key) if staging else None for staging in self._stagings[unit.output])

    def count(self, unit: Unit, done: UnitDone, node: str) -> None:
        """A unit was done, but for its worker's CPU seconds. Raises BadInput for results that are not finite."""
        if any(done.nonfinite) and not self._allow_nonfinite:
            raise BadInput(done.blame)
        stats = self._stats
        stats.bytes_read += done.bytes_read
        stats.bytes_written += done.bytes_written
        stats.peak_anonymous_bytes = max(stats.peak_anonymous_bytes, done.peak_anonymous_bytes)
        stats.began = min(stats.began, done.began)
        stats.nodes[node] = stats.nodes.get(node, 0) + done.bytes_read + done.bytes_written
        self._progress(unit.nbytes * len(done.digests))

    def journal(self, wrote: Iterable[Wrote]) -> None:
        """Each output's journal learns what is durable in it now. Raises BadInput where a source has changed: what was
        written may be of either, and nobody would know it once the first is back; Failed where that cannot be told."""
        for source in self._sources.values():
            source.require_unchanged()
        durable: dict[Staging, list[Written]] = {}
        for unit, digests in wrote:
            for staging, digest in zip(self._stagings[unit.output], digests, strict=True):
                if staging is not None:
                    durable.setdefault(staging, []).append(Written(unit.file, unit.start, unit.nbytes, digest))
        for staging, written in durable.items():
            staging.journal(written)


def is_due(wrote: Iterable[Wrote], since: float) -> bool:
    """Whether what a worker wrote, of all outputs, is to be made durable: it is much, or the last was long ago, at
    `since` on the monotonic clock."""
    nbytes = sum(unit.nbytes * len(digests) for unit, digests in wrote)
    return nbytes > SYNC_BYTES or (nbytes > 0 and time.monotonic() - since > SYNC_SECONDS)


def place_of(source: Checkpoint, file: str) -> str:
    """A file of a source as a message names it."""
    return f"{source.hub}: {file}" if source.hub else str(source.path / file)
