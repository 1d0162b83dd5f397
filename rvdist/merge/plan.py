"""The plan of a merge: which files come out, and the units of work they are cut into. Touches no tensor data."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from rvdist.core.config import OutputFormat
from rvdist.core.point import WeightPoint, layer_count
from rvdist.weights.checkpoint.beside import companions
from rvdist.weights.checkpoint.difference import Difference, Dora
from rvdist.weights.checkpoint.digest import digest_beside, stamps_of
from rvdist.weights.checkpoint.direct import BLOCK
from rvdist.weights.checkpoint.directory import Checkpoint, reshard, shard_names
from rvdist.weights.checkpoint.fp8 import MXFP4, Scaled
from rvdist.weights.checkpoint.header import ITEMSIZE, Stamp, TensorSpec, build_header
from rvdist.weights.checkpoint.layouts import Relaid, form_of
from rvdist.weights.checkpoint.pieces import spread_over_files
from rvdist.weights.checkpoint.remapped import Remapped
from rvdist.weights.checkpoint.stacked import Stacked
from rvdist.weights.checkpoint.staging import discards

AS_THE_BASE = OutputFormat()
UNIT_BYTES = 32 << 20
_ARITHMETIC = 3  # raise it with any change to the bytes that sources come to: nobody goes on with what was begun before
_MOST_UNITS = 4096


@dataclass(frozen=True)
class Output:
    """Points whose files are laid out alike and are written in one pass, and the directory each is written to."""

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
        """Its first byte in the file."""
        return self.segments[0].offset


@dataclass(frozen=True)
class UnitDone:
    """What a unit cost; the digest of its bytes and how many results were not finite, one of each a point.
    `began` is in seconds since the epoch, `cpu_seconds` and `peak_anonymous_bytes` are the worker's so far; `blame`
    says of the first tensor with such results where they come from."""

    digests: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    nonfinite: tuple[int, ...]
    peak_anonymous_bytes: int
    cpu_seconds: float
    began: float
    blame: str = ""


@dataclass(frozen=True)
class Layout:
    """The files of one output: name → (header, size), and where every tensor goes."""

    files: dict[str, tuple[bytes, int]]
    tensors: dict[str, TensorSpec]


@dataclass(frozen=True)
class OutputFile:
    """One file of every point of one output: what a node owns, since a file is never split between nodes.
    `needs` is what its units read: (source, source file) → bytes; `bytes_written` counts every point."""

    units: tuple[Unit, ...]
    needs: dict[tuple[str, str], int]
    bytes_written: int

    @property
    def bytes_read(self) -> int:
        """Of all sources."""
        return sum(self.needs.values())


@dataclass(frozen=True)
class Plan:
    """One layout an output and one digest a point of it; files largest first, so that the last ones are small.
    `dtype` is the safetensors dtype of floating-point outputs, None where the base's own is kept; `beside` what the
    file system said of what goes along with each base's weights."""

    outputs: tuple[Output, ...]
    dtype: str | None
    layouts: tuple[Layout, ...]
    digests: tuple[tuple[str, ...], ...]
    files: tuple[OutputFile, ...]
    beside: Mapping[str, Mapping[Path, Stamp]]

    @property
    def units(self) -> list[Unit]:
        """Of all files, in order."""
        return [unit for file in self.files for unit in file.units]

    @property
    def bytes_read(self) -> int:
        """Of all files."""
        return sum(file.bytes_read for file in self.files)

    @property
    def bytes_written(self) -> int:
        """Of all files."""
        return sum(file.bytes_written for file in self.files)

    @property
    def nbytes(self) -> int:
        """What units write at every point: all but headers."""
        return sum(unit.nbytes * len(self.outputs[unit.output].points) for unit in self.units)

    def needed(self, source: str) -> dict[str, int]:
        """How many bytes of each file of a source are read."""
        by_file: dict[str, int] = {}
        for file in self.files:
            for (name, part), nbytes in file.needs.items():
                if name == source:
                    by_file[part] = by_file.get(part, 0) + nbytes
        return by_file


def build_plan(
    written: Mapping[Path, WeightPoint], sources: Mapping[str, Checkpoint], form: OutputFormat = AS_THE_BASE
) -> Plan:
    """Plans one pass that writes each point to its directory, all stored in one `form`. Points whose files are laid
    out alike, whatever their bases, make one output and share every byte they read."""
    laid_out: dict[str, Layout] = {}
    groups: dict[tuple[object, ...], dict[Path, WeightPoint]] = {}
    for directory, point in written.items():
        if point.base not in laid_out:
            laid_out[point.base] = _layout(sources[point.base], form)
        base = sources[point.base]
        blocks = (base.block, base.power_of_two, base.kind.name) if _keeps_scales(base, laid_out[point.base]) else None
        own = directory if point.method.facts.whole_matrices else None  # so that a worker holds one matrix at a time
        alike = (point.method.facts.whole_tensors, own, blocks, *laid_out[point.base].files.items())
        groups.setdefault(alike, {})[directory] = point
    outputs = [Output(tuple(group.values()), tuple(group)) for group in groups.values()]
    layouts = [laid_out[output.points[0].base] for output in outputs]
    files: list[OutputFile] = []
    for number, (output, layout) in enumerate(zip(outputs, layouts, strict=True)):
        by_matrix = _matrices(output.points, sources, layout)
        whole = not by_matrix and any(point.method.facts.whole_tensors for point in output.points)
        reads = _reads(output.points, layout, sources)
        by_file: dict[str, list[TensorSpec]] = {file: [] for file in layout.files}
        for spec in layout.tensors.values():
            by_file[spec.file].append(spec)
        for file, specs in by_file.items():
            needs: Counter[tuple[str, str]] = Counter()
            for spec in specs:
                needs.update(reads[spec.name])
            grains = _whole_experts(output.points, sources) | _grains(sources[output.points[0].base], layout)
            grains |= by_matrix | _by_columns(output.points, sources)
            units = _units(number, file, specs, unit_bytes(layout), whole, grains)
            files.append(OutputFile(tuple(units), dict(needs), layout.files[file][1] * len(output.points)))
    files.sort(key=lambda file: -(file.bytes_read + file.bytes_written))
    kept = {point.base: sources[point.base] for directory, point in written.items() if not discards(directory)}
    stamps = {base: stamps_of(companions(source).values()) for base, source in kept.items()}
    beside = {base: digest_beside(source) for base, source in kept.items()}
    stored = [form.dtype, *["allow_nonfinite"] * form.allow_nonfinite]  # so that nobody takes it for a finite one
    digests = tuple(
        tuple(_digest(point, layout, sources, [*stored, beside.get(point.base)]) for point in output.points)
        for output, layout in zip(outputs, layouts, strict=True)
    )
    return Plan(tuple(outputs), form.dtype, tuple(layouts), digests, tuple(files), stamps)


def unit_bytes(layout: Layout) -> int:
    """How large a unit is: UNIT_BYTES, and more where there would be more units than a driver hands out in time."""
    return max(UNIT_BYTES, sum(size for _, size in layout.files.values()) // _MOST_UNITS)


def _reads(
    points: Sequence[WeightPoint], layout: Layout, sources: Mapping[str, Checkpoint]
) -> dict[str, dict[tuple[str, str], int]]:
    """What each tensor of an output reads: (source, source file) → bytes."""
    layers = layer_count(layout.tensors)
    by_tensor = {}
    base = sources[points[0].base]
    as_stored = _keeps_scales(base, layout)
    for name, target in base.tensors.items():
        elements = {point.base: target.numel for point in points}
        for point in points:
            if sources[point.base].tensors[name].is_floating_point:
                changing = point.recipe(name, layers, lambda source, name=name: name in sources[source].tensors)  # type: ignore[misc]
                for _, vector in changing:
                    shared = min(sources[source].tensors[name].numel for source in vector.sources())
                    for source in vector.sources():
                        elements[source] = max(elements.get(source, 0), min(shared, target.numel))
        reads: Counter[tuple[str, str]] = Counter()
        for source in sorted(elements):
            own, spec = sources[source], sources[source].tensors[name]
            if isinstance(own, Remapped) and name not in own.rows:
                own = own.inner
            if isinstance(own, Scaled) and (scale := own.scales.get(name)):
                reads[source, own.codes(name).file] += elements[source] * own.kind.bits // 8
                reads[source, scale.file] += scale.nbytes
                continue
            if isinstance(own, Relaid):
                for stored, nbytes in own.reads(name):
                    for file, part in spread_over_files(stored, nbytes).items():
                        reads[source, file] += part
                continue
            for file, nbytes in spread_over_files(spec, elements[source] * ITEMSIZE[spec.dtype]).items():
                reads[source, file] += nbytes
        by_tensor[name] = dict(reads)
    if as_stored and isinstance(base, Scaled):  # scales come with what they scale, mostly: see _units
        by_tensor |= {codes: by_tensor[owner] for codes, owner in base.coded.items()}
        by_tensor |= {scale: dict.fromkeys(by_tensor[owner], 0) for scale, owner in base.owners.items()}
        for spec in base.companions_of_codes.values():
            by_tensor[spec.name] = {(point.base, spec.file): spec.nbytes for point in points}
    return by_tensor


def _digest(point: WeightPoint, layout: Layout, sources: Mapping[str, Checkpoint], beside: list[str | None]) -> str:
    """Names what would be written: the point, its sources by their stamps and by their configurations, which say how
    tensors lie; the files and how they are cut; how they are stored and what is written `beside` them."""
    configs = {source: sources[source].config for source in point.sources()}
    stamps = {source: [astuple(stamp) for stamp in sources[source].stamps.values()] for source in point.sources()}
    files = [(name, header.hex(), size) for name, (header, size) in layout.files.items()]
    told = {name: sources[name] for name in point.sources()}
    remapped = {name: source for name, source in told.items() if isinstance(source, Remapped)}
    told |= {name: source.inner for name, source in remapped.items()}
    own = {name: source.inner if isinstance(source, Relaid) else source for name, source in told.items()}
    scaled = {name: source for name, source in own.items() if isinstance(source, Scaled)}
    blocks: dict[str, Any] = {name: source.block for name, source in scaled.items()}
    blocks |= {f"{name} codes": source.kind.name for name, source in scaled.items() if source.stored}
    blocks |= {f"{n} stacks": s.mapping for n in point.sources() if isinstance(s := sources[n], Stacked)}
    blocks |= {f"{name} vocabulary": source.made_of for name, source in remapped.items()}
    if _keeps_scales(base := sources[point.base], layout) and base.power_of_two:
        blocks["scales"] = "powers of two"
    how = [files, unit_bytes(layout), blocks, _ARITHMETIC]
    made_of = json.dumps([point.to_json(), stamps, configs, *how, *beside], sort_keys=True)
    return hashlib.blake2b(made_of.encode(), digest_size=16).hexdigest()


def _layout(base: Checkpoint, form: OutputFormat) -> Layout:
    def stored(spec: TensorSpec) -> str:
        return form.dtype if form.dtype and spec.is_floating_point else spec.dtype

    written = _written(base, form)
    by_file: dict[str, list[TensorSpec]] = {file: [] for file in base.files}
    for spec in written:
        by_file[spec.file].append(spec)
    by_file = {file: specs for file, specs in by_file.items() if specs}  # one may hold nothing but a tied head
    if form.max_shard_size is not None:
        shards = reshard(written, lambda spec: spec.numel * ITEMSIZE[stored(spec)], form.max_shard_size)
        by_file = dict(zip(shard_names(len(shards)), shards, strict=True))
    elif isinstance(base, Stacked) or not all(
        file.endswith(".safetensors") for file in by_file
    ):  # as trainings leave it
        by_file = dict(zip(shard_names(len(by_file)), by_file.values(), strict=True))
    files = {}
    tensors: dict[str, TensorSpec] = {}
    for file, specs in by_file.items():
        metadata = base.metadata.get(file) or {"format": "pt"}
        header, placed = build_header([(s.name, stored(s), s.shape) for s in specs], file, metadata, BLOCK)
        size = max((spec.offset + spec.nbytes for spec in placed), default=len(header))
        files[file] = (header, size)
        tensors |= {spec.name: spec for spec in placed}
    return Layout(files, tensors)


def _written(base: Checkpoint, form: OutputFormat) -> list[TensorSpec]:
    """The tensors of an output, in order: the base's; scales, too, where it is written as it is stored."""
    specs = list(base.tensors.values())
    if not isinstance(base, Scaled) or form.dtype is not None:
        return specs
    specs = [base.codes(spec.name) if spec.name in base.scales else spec for spec in specs]
    place = {file: k for k, file in enumerate(base.files)}
    beside = [*base.scales.values(), *base.companions_of_codes.values()]
    return sorted([*specs, *beside], key=lambda spec: (place[spec.file], spec.offset))


@dataclass(frozen=True)
class _Grain:
    """How a tensor is cut: between runs of `size` elements. Each element stands for `weight` bytes of work, unless the
    unit has all of the tensor `owner`, with which it comes."""

    size: int = 1
    weight: int = 0
    owner: str = ""


def _keeps_scales(base: Checkpoint, layout: Layout) -> TypeGuard[Scaled]:
    """Whether a layout holds a base's fp8 as it is stored."""
    return isinstance(base, Scaled) and all(scale.name in layout.tensors for scale in base.scales.values())


def _grains(base: Checkpoint, layout: Layout) -> dict[str, _Grain]:
    """fp8 is computed by rows of blocks; scales are what is found on the way, or else cost as much again."""
    if not _keeps_scales(base, layout):
        return {}
    found = {}
    for name, scale in base.scales.items():
        if base.kind is MXFP4:  # by whole experts
            experts, codes = scale.shape[0], base.codes(name)
            found[codes.name] = _Grain(codes.numel // experts)
            found[scale.name] = _Grain(scale.numel // experts, codes.numel // scale.numel, codes.name)
            continue
        (height, width), (rows, columns) = base.tensors[name].shape[-2:], base.block_of(name)
        codes, matrices = base.codes(name), base.tensors[name].numel // (height * width)
        size = (rows if matrices == 1 or height % rows == 0 else height) * width // base.kind.codes_in(codes)
        found[codes.name] = _Grain(max(1, size))
        found[scale.name] = _Grain(-(-width // columns), rows * columns * base.kind.bits // 8, codes.name)
    return found


def _whole_experts(points: Sequence[WeightPoint], sources: Mapping[str, Checkpoint]) -> dict[str, _Grain]:
    """Tensors of which a source is transposed, by the experts that are put together whole: part of one reads all."""
    relaid = [one for point in points for name in point.sources() if isinstance(one := sources[name], Relaid)]
    views = [(one, name, view) for one in relaid for name, view in one.views.items() if not view.joined]
    return {name: _Grain(one.tensors[name].numel // view.count) for one, name, view in views}


def _matrices(points: Sequence[WeightPoint], sources: Mapping[str, Checkpoint], layout: Layout) -> dict[str, _Grain]:
    """The tensors of points whose method sees matrices, by these: what is added to one is computed whole. None where
    scales come with their tensors."""
    base = sources[points[0].base]
    if not all(point.method.facts.whole_matrices for point in points) or _keeps_scales(base, layout):
        return {}
    specs = [spec for spec in base.tensors.values() if spec.numel and spec.is_floating_point and len(spec.shape) > 1]
    return {spec.name: _Grain(spec.shape[-2] * spec.shape[-1]) for spec in specs}


def _by_columns(points: Sequence[WeightPoint], sources: Mapping[str, Checkpoint]) -> dict[str, _Grain]:
    """Tensors of which a source is DoRA's by columns, whole: whoever reads a part of one finds the lengths of all."""
    told = [one for point in points for name in point.sources() if isinstance(one := sources[name], Difference)]
    found = [(one, name, form_of(one, name)) for one in told for name in one.tensors]
    by_columns = [(one, name) for one, name, form in found if isinstance(form, Dora) and form.transposed]
    return {name: _Grain(one.tensors[name].numel) for one, name in by_columns}


def _units(
    output: int, file: str, specs: Sequence[TensorSpec], limit: int, whole: bool, grains: Mapping[str, _Grain]
) -> list[Unit]:
    """Cuts a file into ranges of at most `limit` bytes, between elements; between tensors where they must stay
    `whole`, so that only a single tensor may be larger."""
    units = []
    segments: list[Segment] = []
    nbytes = spent = 0
    for spec in specs:
        itemsize, grain = ITEMSIZE[spec.dtype], grains.get(spec.name, _Grain())
        cost = max(itemsize, grain.weight)
        if grain.owner and any(s.tensor == grain.owner and s.start == 0 for s in segments):
            cost = itemsize
        if whole and segments and spent + spec.numel * cost > limit:
            units.append(Unit(output, file, tuple(segments), nbytes))
            segments, nbytes, spent = [], 0, 0
        start = 0
        while start < spec.numel:
            count = max(0, limit - spent) // cost // grain.size * grain.size
            if count == 0 and segments:
                units.append(Unit(output, file, tuple(segments), nbytes))
                segments, nbytes, spent = [], 0, 0
                continue
            stop = spec.numel if whole else min(spec.numel, start + max(count, grain.size))
            segments.append(Segment(spec.name, start, stop, spec.offset + start * itemsize))
            nbytes += (stop - start) * itemsize
            spent += (stop - start) * cost
            start = stop
            if spent > limit - 8:
                units.append(Unit(output, file, tuple(segments), nbytes))
                segments, nbytes, spent = [], 0, 0
    if segments:
        units.append(Unit(output, file, tuple(segments), nbytes))
    return units
