"""The worker: streams units from source files through the arithmetic into output files. Wrapped as a Ray actor."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.stream import TORCH_DTYPE, write_exactly
from rvdist.errors import BadInput
from rvdist.merge.plan import Output, Unit
from rvdist.reader import PointReader


@dataclass(frozen=True)
class UnitDone:
    """What a unit cost and how many results were not finite, one count a point."""

    bytes_read: int
    bytes_written: int
    nonfinite: tuple[int, ...]
    peak_anonymous_bytes: int
    cpu_seconds: float


class MergeWorker:
    """Owns the open files of one worker process. Errors of reading and writing come out as BadInput."""

    def __init__(
        self, outputs: Sequence[Output], sources: Mapping[str, Checkpoint], dtype: str | None, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._outputs = outputs
        torch_dtype = TORCH_DTYPE[dtype] if dtype else None
        self._readers = [PointReader(output.points, sources, torch_dtype) for output in outputs]
        self._open: dict[Path, int] = {}
        self._peak = 0

    def run(self, unit: Unit) -> UnitDone:
        """Computes one unit of every point of its output and writes it in place."""
        reader = self._readers[unit.output]
        read, nonfinite = reader.bytes_read, list(reader.nonfinite)
        written = 0
        targets = [self._descriptor(d / unit.file) for d in self._outputs[unit.output].directories]
        for segment in unit.segments:
            for begin, tensors in reader.chunks(segment.tensor, segment.start, segment.stop):
                for target, tensor in zip(targets, tensors, strict=True):
                    offset = segment.offset + (begin - segment.start) * tensor.itemsize
                    try:
                        write_exactly(target, offset, tensor)
                    except OSError as error:
                        raise BadInput(f"{unit.file}: cannot be written ({error.strerror})") from None
                    written += tensor.nbytes
        self._peak = max(self._peak, anonymous_bytes())
        return UnitDone(
            reader.bytes_read - read,
            written,
            tuple(now - before for now, before in zip(reader.nonfinite, nonfinite, strict=True)),
            self._peak,
            sum(os.times()[:2]),
        )

    def sync(self) -> None:
        """Makes everything this worker wrote durable."""
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_WRONLY)
        return self._open[path]


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process: what is not backed by a file."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) << 10  # type: ignore[index]
