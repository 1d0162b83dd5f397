"""The worker: streams units from source files through the arithmetic into output files. Knows nothing of Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from rvdist.core.errors import Failed
from rvdist.core.regular import Handle, allow_many_files
from rvdist.core.timing import anonymous_bytes
from rvdist.merge.plan import Output, Unit, UnitDone
from rvdist.weights.arithmetic.method import warm_up
from rvdist.weights.arithmetic.registry import build
from rvdist.weights.checkpoint.direct import File, RangeWriter
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.journal import Written
from rvdist.weights.checkpoint.staging import DISCARD, Probe, discards
from rvdist.weights.checkpoint.stream import TORCH_DTYPE
from rvdist.weights.lanes import open_lanes
from rvdist.weights.reader import PointReader, buffers_of
from rvdist.weights.requantize import reader_of

_WRITES = 2  # under way at a time, besides the computing
_MUCH = 4 << 30  # bytes of operands from which the compiled loops save more time than they take to load


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
        direct_io: bool = True,
    ) -> None:
        allow_many_files()
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        points = [point for output in outputs for point in output.points]
        summed = [point for point in points if build(point.method).elementwise_sum]  # no other method has such loops
        if sum(sources[source].nbytes for point in summed for source in point.sources()) >= _MUCH:
            warm_up()
        self._outputs, self._sources = outputs, sources
        torch_dtype = TORCH_DTYPE[dtype] if dtype else None
        lanes = open_lanes(device, max(buffers_of(output.points) for output in outputs))
        self._readers = [
            reader_of(sources[output.points[0].base], torch_dtype)(output.points, sources, torch_dtype, lanes=lanes)
            for output in outputs
        ]
        self._direct_io = direct_io
        self._open: dict[Path, File] = {}
        self._handles: dict[Path, Handle] = {}
        self._pool = pool = ThreadPoolExecutor(_WRITES)
        most = max(len(output.points) for output in outputs)
        self._writers = [RangeWriter(pool, most) for _ in range(most)]
        self._peak = 0

    def sees(self, probe: Probe) -> bool:
        """Whether an output that is under construction is here what it is for the driver; then it is held open."""
        handle = probe.open()
        if handle:
            self._handles[probe.path.parent] = handle
        return handle is not None

    def can_read(self, source: str, file: str) -> bool:
        """Whether this node has a weight file of a source, of the size it had when it was indexed,
        or can get it from the Hub."""
        checkpoint = self._sources[source]
        if checkpoint.hub:
            from rvdist.weights.checkpoint.hub import obtainable

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
        read, nonfinite, written, blame = reader.bytes_read, list(reader.nonfinite), 0, ""
        digests = [claim.digest for claim in claims if claim]
        try:
            if not all(claim and self._holds(claim, path) for claim, path in zip(claims, directories, strict=True)):
                digests, blame = self._compute(unit, reader, [self._file(path / unit.file) for path in directories])
                written = unit.nbytes * len(directories)
        except OSError as error:
            raise Failed(
                f"{error.filename or unit.file}: cannot be written ({error.strerror}); what is done is kept, and the "
                "same command goes on from there"
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
            blame,
        )

    def _compute(self, unit: Unit, reader: PointReader, files: Sequence[File]) -> tuple[list[str], str]:
        """The digests of what is written, and where the first results come from that are not finite, if there are."""
        blame = ""
        digests = [xxhash.xxh3_128() for _ in files]
        writers = self._writers[: len(files)]
        for writer, file in zip(writers, files, strict=True):
            writer.begin(file, unit.start)
        for segment in unit.segments:
            before = sum(reader.nonfinite)
            for _, tensors in reader.chunks(segment.tensor, segment.start, segment.stop):
                for writer, digest, tensor in zip(writers, digests, tensors, strict=True):
                    data = tensor.view(torch.uint8).numpy().data
                    digest.update(data)
                    writer.write(data)
            if not blame and sum(reader.nonfinite) > before:
                blame = reader.blame(segment.tensor)
        reader.forget()
        for writer in writers:
            writer.end()
        return [digest.hexdigest() for digest in digests], blame

    def sync(self) -> None:
        """Makes everything this worker wrote durable. Raises Failed."""
        try:
            for writer in self._writers:
                writer.wait()
            for path, file in self._open.items():
                if path != DISCARD:
                    file.sync()
        except OSError as error:
            raise Failed(
                f"{error.filename}: what was written cannot be made durable ({error.strerror}); what was before is "
                "kept, and the same command goes on from there"
            ) from None

    def close(self) -> None:
        """Ends what writes in the background, closes all files, and leaves torch as it was."""
        self._pool.shutdown()
        closing: list[PointReader | File | Handle] = [*self._readers, *self._open.values(), *self._handles.values()]
        for one in closing:
            one.close()
        torch.set_num_threads(self._threads_before)

    def _file(self, path: Path) -> File:
        path = DISCARD if discards(path) else path
        if path not in self._open:
            self._open[path] = File(path, self._direct_io and path != DISCARD, self._handles.get(path.parent))
        return self._open[path]

    def _holds(self, claim: Written, directory: Path) -> bool:
        handle = self._handles.get(directory)
        return claim.holds(directory, handle.opener if handle else None)
