"""The worker: streams units from source files through the arithmetic into output files. Knows nothing of Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash

from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.journal import Written
from rvdist.checkpoint.staging import DISCARD, discards
from rvdist.checkpoint.stream import TORCH_DTYPE, start_writeback, write_exactly
from rvdist.errors import Failed
from rvdist.merge.plan import Output, Unit, UnitDone
from rvdist.pipeline import open_lanes
from rvdist.reader import PointReader, buffers_of
from rvdist.timing import anonymous_bytes


class MergeWorker:
    """Owns the open files of one worker process. A source that changed is BadInput; one that cannot be read
    and an output that cannot be written are Failed."""

    def __init__(
        self,
        outputs: Sequence[Output],
        sources: Mapping[str, Checkpoint],
        dtype: str | None,
        threads: int = 1,
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(threads)
        self._outputs, self._sources = outputs, sources
        torch_dtype = TORCH_DTYPE[dtype] if dtype else None
        lanes = open_lanes(device, max(buffers_of(output.points) for output in outputs))
        self._readers = [PointReader(output.points, sources, torch_dtype, lanes=lanes) for output in outputs]
        self._open: dict[Path, int] = {}
        self._peak = 0

    def can_read(self, source: str, file: str) -> bool:
        """Whether this node has a weight file of a source, of the size it had when it was indexed,
        or can get it from the Hub."""
        checkpoint = self._sources[source]
        if checkpoint.hub:
            from rvdist.checkpoint.hub import obtainable

            return obtainable(checkpoint.hub, file)
        try:
            return os.stat(checkpoint.path / file).st_size == checkpoint.stamps[file].size
        except OSError:
            return False

    def run(self, unit: Unit, claims: tuple[Written | None, ...]) -> UnitDone:
        """Computes one unit of every point of its output and writes it in place; does nothing where all of it is
        there already, as `claims` (one a point) says."""
        reader = self._readers[unit.output]
        directories = self._outputs[unit.output].directories
        began = time.time()
        read, nonfinite, written = reader.bytes_read, list(reader.nonfinite), 0
        digests = [claim.digest for claim in claims if claim]
        try:
            if not all(claim and claim.holds(path) for claim, path in zip(claims, directories, strict=True)):
                digests = self._compute(unit, reader, [self._descriptor(path / unit.file) for path in directories])
                written = unit.nbytes * len(directories)
        except OSError as error:
            raise Failed(
                f"{unit.file}: cannot be written ({error.strerror}); what is done is kept, and the same command goes "
                "on from there"
            ) from None
        self._peak = max(self._peak, anonymous_bytes())
        return UnitDone(
            tuple(digests),
            reader.bytes_read - read,
            written,
            tuple(now - before for now, before in zip(reader.nonfinite, nonfinite, strict=True)),
            self._peak,
            sum(os.times()[:2]),
            began,
        )

    def _compute(self, unit: Unit, reader: PointReader, targets: Sequence[int]) -> list[str]:
        digests = [xxhash.xxh3_128() for _ in targets]
        for segment in unit.segments:
            for begin, tensors in reader.chunks(segment.tensor, segment.start, segment.stop):
                for target, digest, tensor in zip(targets, digests, tensors, strict=True):
                    offset = segment.offset + (begin - segment.start) * tensor.itemsize
                    digest.update(write_exactly(target, offset, tensor))
        for target in targets:
            start_writeback(target, unit.start, unit.nbytes)
        return [digest.hexdigest() for digest in digests]

    def sync(self) -> None:
        """Makes everything this worker wrote durable. Raises Failed."""
        try:
            for path, descriptor in self._open.items():
                if path != DISCARD:
                    os.fdatasync(descriptor)
        except OSError as error:
            raise Failed(
                f"{path}: what was written cannot be made durable ({error.strerror}); what was before is kept, and the "
                "same command goes on from there"
            ) from None

    def _descriptor(self, path: Path) -> int:
        path = DISCARD if discards(path) else path
        if path not in self._open:
            self._open[path] = os.open(path, os.O_WRONLY)
        return self._open[path]
