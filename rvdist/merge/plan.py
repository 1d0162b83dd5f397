"""The plan of a merge: which files come out, and the units of work they are cut into. Touches no tensor data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.header import ITEMSIZE, TensorSpec, build_header
from rvdist.point import WeightPoint

UNIT_BYTES = 32 << 20


@dataclass(frozen=True)
class Output:
    """Points over one base that are written in one pass, and the directory each is written to."""

    points: tuple[WeightPoint, ...]
    directories: tuple[Path, ...]


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a tensor, and the byte of the output file where they begin."""

    tensor: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time: a contiguous range of one output file of every point of one output."""

    output: int
    file: str
    segments: tuple[Segment, ...]
    nbytes: int

    @property
    def start(self) -> int:
        return self.segments[0].offset


@dataclass(frozen=True)
class UnitDone:
    """What a unit cost; the digest of its bytes and how many results were not finite, one of each a point.
    `began` is in seconds since the epoch, `cpu_seconds` and `peak_anonymous_bytes` are the worker's so far."""

    digests: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    nonfinite: tuple[int, ...]
    peak_anonymous_bytes: int
    cpu_seconds: float
    began: float


@dataclass(frozen=True)
class Layout:
    """The files of one output: name → (header, size), and where every tensor goes."""

    files: dict[str, tuple[bytes, int]]
    tensors: dict[str, TensorSpec]


@dataclass(frozen=True)
class Plan:
    """One layout an output and one digest a point of it; units largest first, so that the last ones are small.
    `dtype` is the safetensors dtype of floating-point outputs, None where the base's own is kept."""

    outputs: tuple[Output, ...]
    dtype: str | None
    layouts: tuple[Layout, ...]
    digests: tuple[tuple[str, ...], ...]
    units: tuple[Unit, ...]
    bytes_read: int
    bytes_written: int


def build_plan(
    outputs: Sequence[Output],
    sources: Mapping[str, Checkpoint],
    dtype: str | None = None,
    max_shard_size: int | None = None,
) -> Plan:
    """`dtype`: the safetensors dtype of floating-point outputs, None to keep the base's; `max_shard_size` in
    bytes, None to keep the base's own sharding."""
    layouts = []
    units: list[Unit] = []
    read = 0
    for number, output in enumerate(outputs):
        base = sources[output.points[0].base]
        layout = _layout(base, dtype, max_shard_size)
        layouts.append(layout)
        units += _units(number, layout)
        read += base.nbytes
        donors = {s for point in output.points for s in point.sources()} - {output.points[0].base}
        for donor in donors:
            read += sum(spec.nbytes for name, spec in sources[donor].tensors.items() if name in base.tensors)
    units.sort(key=lambda unit: -unit.nbytes)
    written = sum(
        size * len(output.points)
        for output, layout in zip(outputs, layouts, strict=True)
        for _, size in layout.files.values()
    )
    digests = tuple(
        tuple(_digest(point, layout, sources) for point in output.points)
        for output, layout in zip(outputs, layouts, strict=True)
    )
    return Plan(tuple(outputs), dtype, tuple(layouts), digests, tuple(units), read, written)


def _digest(point: WeightPoint, layout: Layout, sources: Mapping[str, Checkpoint]) -> str:
    """Names what would be written: the point, its sources by their stamps, the files and how they are cut."""
    stamps = {source: [astuple(stamp) for stamp in sources[source].stamps.values()] for source in point.sources()}
    files = [(name, header.hex(), size) for name, (header, size) in layout.files.items()]
    made_of = json.dumps([point.to_json(), stamps, files, UNIT_BYTES], sort_keys=True)
    return hashlib.blake2b(made_of.encode(), digest_size=16).hexdigest()


def _layout(base: Checkpoint, dtype: str | None, max_shard_size: int | None) -> Layout:
    def stored(spec: TensorSpec) -> str:
        return dtype if dtype and spec.dtype in ("F16", "BF16", "F32", "F64") else spec.dtype

    by_file: dict[str, list[TensorSpec]] = {file: [] for file in base.files}
    for spec in base.tensors.values():
        by_file[spec.file].append(spec)
    if max_shard_size is not None:
        shards = _reshard(list(base.tensors.values()), stored, max_shard_size)
        one = len(shards) == 1
        by_file = {
            "model.safetensors" if one else f"model-{k:05d}-of-{len(shards):05d}.safetensors": shard
            for k, shard in enumerate(shards, 1)
        }
    files = {}
    tensors: dict[str, TensorSpec] = {}
    for file, specs in by_file.items():
        metadata = base.metadata.get(file) or {"format": "pt"}
        header, placed = build_header([(s.name, stored(s), s.shape) for s in specs], file, metadata)
        size = max((spec.offset + spec.nbytes for spec in placed), default=len(header))
        files[file] = (header, size)
        tensors |= {spec.name: spec for spec in placed}
    return Layout(files, tensors)


def _reshard(
    specs: Sequence[TensorSpec], stored: Callable[[TensorSpec], str], max_shard_size: int
) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    room = max_shard_size
    for spec in specs:
        nbytes = spec.numel * ITEMSIZE[stored(spec)]
        if shards[-1] and nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(spec)
        room -= nbytes
    return shards


def _units(output: int, layout: Layout) -> list[Unit]:
    """Cuts every file into ranges of at most UNIT_BYTES, between elements."""
    units = []
    for file in layout.files:
        segments: list[Segment] = []
        nbytes = 0
        for spec in (s for s in layout.tensors.values() if s.file == file):
            itemsize = ITEMSIZE[spec.dtype]
            start = 0
            while start < spec.numel:
                stop = min(spec.numel, start + (UNIT_BYTES - nbytes) // itemsize)
                segments.append(Segment(spec.name, start, stop, spec.offset + start * itemsize))
                nbytes += (stop - start) * itemsize
                start = stop
                if nbytes > UNIT_BYTES - 8:
                    units.append(Unit(output, file, tuple(segments), nbytes))
                    segments, nbytes = [], 0
        if segments:
            units.append(Unit(output, file, tuple(segments), nbytes))
    return units
