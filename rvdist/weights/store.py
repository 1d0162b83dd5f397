"""Stores v itself: exactly, rounded, as factors of a truncated SVD, or as its largest elements. Where the donors agree,
nothing is stored.

Streams, and holds one tensor whole where it is stored as factors or as its largest elements. The error is measured on
what was written, as whoever applies the vector will read it. Knows donors and files, nothing of targets, Ray or points.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, astuple, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rvdist.core.config import Storage
from rvdist.core.errors import BadInput
from rvdist.core.point import Vector
from rvdist.weights.arithmetic.method import Scratch, torch_threads, working_dtype
from rvdist.weights.checkpoint.difference import BLOCK, is_adapter
from rvdist.weights.checkpoint.digest import checkpoint_digest
from rvdist.weights.checkpoint.directory import Checkpoint, open_checkpoint, reshard, shard_names
from rvdist.weights.checkpoint.header import ITEMSIZE, TensorSpec, build_header
from rvdist.weights.checkpoint.journal import MANIFEST, Manifest
from rvdist.weights.checkpoint.staging import Staging, carry_over, companions, write_index
from rvdist.weights.checkpoint.stored_vector import DESCRIPTION, MARK, VERSIONS, as_vector, part_names
from rvdist.weights.checkpoint.stream import TORCH_DTYPE
from rvdist.weights.operand import Operand, open_operand
from rvdist.weights.packed import bits, has_places, locate, packed_bytes
from rvdist.weights.values import AT_ONCE, Values
from rvdist.weights.writer import Writer

_SMALL_SVD = 1024  # up to this many rows or columns every singular value is computed, beyond it only the largest
_OVERSAMPLED, _POWER_ITERATIONS = 16, 4
_WORTH = 0.9  # of its dense size, at most, is what a tensor is packed to
_LAYOUT = 2  # of the files, for those that an earlier version began
_SAFETENSORS = {torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True)
class _Stored:
    """A tensor of v, its form, and its parts in the files."""

    name: str
    shape: tuple[int, ...]
    form: str
    parts: tuple[TensorSpec, ...]


def save(
    vector: Vector,
    sources: Mapping[str, Checkpoint],
    output: Path,
    storage: Storage,
    *,
    overwrite: bool = False,
    key: bytes = b"",
    digests: Path | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
    say: Callable[[str], None] = print,
) -> None:
    """Writes v to the directory `output`, which appears whole or not at all. `digests` is where the digests of the
    donors are remembered, `key` what seals the journal; `progress` is told how many bytes of v's first donor are done
    since it was last told, `say` what a user should know.

    Raises BadInput where a donor or the output cannot be used, Failed where writing fails; then the same call goes on
    from what is journalled.
    """
    asked = _ask([sources[source] for source in vector.sources()], storage, digests)
    donors = asked.donors
    if not overwrite and _holds(output, asked):
        say(f"{output}: already complete")
        return
    staging = Staging(output, asked.plan, overwrite, key)
    try:
        if staging.restarted:
            say(f"{staging.partial}: was left by a run with other inputs or settings; starting over")
        with ExitStack() as opened, torch_threads(1):
            values = opened.enter_context(closing(Values(dict(zip(("plus", "minus"), donors, strict=False)))))
            differences = _Differences(donors, values)
            files, stored = _layout(asked, storage, _count_values(asked, storage, differences, progress))
            for name, (header, size) in files.items():
                staging.allocate(name, header, size)
            version = VERSIONS[any(tensor.form == "packed" for tensor in stored)]
            description = {"kind": "vector", "version": version, **asked.provenance, "storage": asdict(storage)}
            entries = {s.name: {"form": s.form, "shape": list(s.shape)} for s in stored}
            staging.write_text(DESCRIPTION, json.dumps(description | {"tensors": entries}))
            parts = {part.name: part for tensor in stored for part in tensor.parts}
            write_index(staging, parts, list(files))
            result = opened.enter_context(closing(open_operand(as_vector(open_checkpoint(staging.partial)))))
            writer = opened.enter_context(closing(Writer(staging, list(values.operands.values()))))
            for tensor in stored:
                if not writer.has(tensor.parts):
                    _write(tensor, storage, differences, writer)
                entries[tensor.name] |= _measure(tensor.name, differences, result)
                nbytes = donors[0].tensors[tensor.name].nbytes
                progress(nbytes - nbytes // 2)
            writer.sync()
        for donor in donors:
            donor.require_unchanged()
        if not is_adapter(donors[0]):
            carry_over(donors[0], staging, None)
        measured = _summary(entries)
        description |= {"skipped": asked.skipped, "bytes": sum(size for _, size in files.values()), **measured}
        staging.write_text(DESCRIPTION, _readable(description, entries))
        staging.commit()
        holds = f"exact for {measured['exact_for']}" if measured["exact_for"] else "not exact"
        say(f"{output}: {holds}, relative error {measured['relative_error']:.2g}, {description['bytes']:,} bytes")
    except BadInput:
        staging.abandon()
        raise
    finally:
        staging.release()


def is_complete(
    vector: Vector, sources: Mapping[str, Checkpoint], output: Path, storage: Storage, digests: Path | None = None
) -> bool:
    """Whether `save` has written this vector there before. Writes nothing but `digests`. Raises BadInput for donors of
    which there is nothing to save."""
    return _holds(output, _ask([sources[source] for source in vector.sources()], storage, digests))


def _holds(output: Path, asked: _Asked) -> bool:
    return (output / MANIFEST).exists() and Manifest.read(output).plan in (asked.plan, asked.earlier)


@dataclass(frozen=True)
class _Asked:
    """What is to be stored: the tensors of v, `specs` of the first donor; why the donors' others are `skipped`. `plan`
    names all of it, `earlier` as it was named before tensors were packed."""

    donors: Sequence[Checkpoint]
    specs: Sequence[TensorSpec]
    skipped: dict[str, str]
    provenance: dict[str, Any]
    plan: str
    earlier: str


def _ask(donors: Sequence[Checkpoint], storage: Storage, digests: Path | None) -> _Asked:
    own = donors[0].tensors
    skipped = {
        name: f"is of dtype {spec.dtype}"
        for name, spec in own.items()
        if not all(donor.tensors[name].is_floating_point for donor in donors)
    }
    specs = [spec for name, spec in own.items() if name not in skipped]
    if not specs:
        raise BadInput(f"{donors[0].path}: has no floating-point tensor, so there is no vector to save")
    if not is_adapter(donors[0]):
        companions(donors[0])
    asked = _Asked(donors, specs, skipped, _provenance(donors, digests), "", "")
    files, _ = _layout(asked, storage, {})
    return replace(asked, plan=_digest(donors, storage, files, _LAYOUT), earlier=_digest(donors, storage, files))


def _provenance(donors: Sequence[Checkpoint], digests: Path | None) -> dict[str, Any]:
    """What v is: a published vector names local donors by the last component of their path only."""
    parts = ("plus", "minus") if len(donors) == 2 else ("difference",)
    return {
        "formula": f"v = {' − '.join(parts)}",
        "donors": {
            part: {
                "name": donor.hub.repository if donor.hub else donor.path.absolute().name,
                "revision": donor.hub.commit if donor.hub else None,
                "digest": checkpoint_digest(donor, digests),
            }
            for part, donor in zip(parts, donors, strict=True)
        },
    }


def _stored_dtype(asked: _Asked, storage: Storage, name: str) -> str:
    return storage.dtype or _SAFETENSORS[_work(name, asked.donors)]


def _count_values(
    asked: _Asked, storage: Storage, differences: _Differences, progress: Callable[[int], None]
) -> dict[str, int]:
    """How many elements, as they are stored, are anything but 0, of each tensor that may be packed."""
    counts = {}
    for spec in asked.specs:
        dtype = _stored_dtype(asked, storage, spec.name)
        if _parts(spec, dtype, storage)[0] == "dense":
            stored = (taken.to(TORCH_DTYPE[dtype]) for _, taken in differences(spec.name))
            counts[spec.name] = sum(int(np.count_nonzero(bits(chunk))) for chunk in stored)
        progress(spec.nbytes // 2)
    return counts


def _layout(
    asked: _Asked, storage: Storage, counts: Mapping[str, int]
) -> tuple[dict[str, tuple[bytes, int]], list[_Stored]]:
    """The files, (header, size) by name, sharded as the first donor is unless there is a maximum; and every tensor,
    packed where that is worth it, by `counts` of their values."""
    specs = asked.specs
    metadata = MARK | {key: json.dumps(value, ensure_ascii=False) for key, value in asked.provenance.items()}
    wanted = {
        spec.name: _parts(spec, _stored_dtype(asked, storage, spec.name), storage, counts.get(spec.name))
        for spec in specs
    }

    def nbytes(spec: TensorSpec) -> int:
        return sum(math.prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in wanted[spec.name][1])

    if storage.max_shard_size is None:
        shards = [list(own) for _, own in groupby(specs, lambda spec: spec.file)]
    else:
        shards = reshard(specs, nbytes, storage.max_shard_size)
    files, stored = {}, []
    for name, shard in zip(shard_names(len(shards), "vector"), shards, strict=True):
        header, placed = build_header([part for spec in shard for part in wanted[spec.name][1]], name, metadata)
        files[name] = (header, placed[-1].offset + placed[-1].nbytes)
        by_name = {part.name: part for part in placed}
        for spec in shard:
            form, parts = wanted[spec.name]
            stored.append(_Stored(spec.name, spec.shape, form, tuple(by_name[part] for part, _, _ in parts)))
    return files, stored


def _parts(
    spec: TensorSpec, dtype: str, storage: Storage, count: int | None = None
) -> tuple[str, list[tuple[str, str, tuple[int, ...]]]]:
    """The form of a tensor with so many values (None: unknown), and the name, dtype and shape of each of its parts."""
    if storage.rank is not None and len(spec.shape) == 2 and spec.numel:
        rows, columns = spec.shape
        rank = min(storage.rank, rows, columns)
        left, right = part_names(spec.name, "low_rank")
        dtype = "F32" if dtype == "F64" else dtype
        return "low_rank", [(left, dtype, (rows, rank)), (right, dtype, (rank, columns))]
    if storage.density is not None and spec.numel:
        kept = math.ceil(storage.density * spec.numel)
        indices, values = part_names(spec.name, "sparse")
        return "sparse", [(indices, "I32" if spec.numel < 2**31 else "I64", (kept,)), (values, dtype, (kept,))]
    dense, numel = spec.numel * ITEMSIZE[dtype], spec.numel
    if count is not None and packed_bytes(count, numel, ITEMSIZE[dtype]) < _WORTH * dense:
        starts, where, values = part_names(spec.name, "packed")
        held = ("U16", (count,)) if has_places(count, numel) else ("U8", (-(-numel // 8),))
        return "packed", [(starts, "I64", (-(-numel // BLOCK) + 1,)), (where, *held), (values, dtype, (count,))]
    return "dense", [(spec.name, dtype, spec.shape)]


def _digest(
    donors: Sequence[Checkpoint], storage: Storage, files: Mapping[str, tuple[bytes, int]], *layout: int
) -> str:
    stamps = [[astuple(stamp) for stamp in donor.stamps.values()] for donor in donors]
    headers = [(name, header.hex(), size) for name, (header, size) in files.items()]
    made_of = json.dumps([stamps, astuple(storage), headers, *layout])
    return hashlib.blake2b(made_of.encode(), digest_size=16).hexdigest()


def _work(name: str, donors: Sequence[Checkpoint]) -> torch.dtype:
    """The precision a merge takes the difference in, where neither its target nor its output asks for more."""
    plus, *minus = (TORCH_DTYPE[donor.tensors[name].dtype] for donor in donors)
    return working_dtype((), [(plus, minus[0] if minus else None)])


class _Differences:
    """v by chunks: in the working precision as a merge computes it, or in fp64. Valid until the next chunk."""

    def __init__(self, donors: Sequence[Checkpoint], values: Values) -> None:
        self._donors, self._values, self._scratch = donors, values, Scratch(AT_ONCE)

    def __call__(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, elements in working precision) for each chunk of a tensor."""
        numel, work = self._donors[0].tensors[name].numel, _work(name, self._donors)
        for begin in range(0, numel, AT_ONCE):
            yield begin, self._fill(name, begin, self._scratch(0, min(AT_ONCE, numel - begin), work))

    def wide(self, name: str, begin: int, count: int) -> torch.Tensor:
        """Elements of one chunk in fp64."""
        return self._fill(name, begin, self._scratch(1, count, torch.float64))

    def whole(self, name: str) -> torch.Tensor:
        """All of a tensor in working precision, 1-d."""
        numel = self._donors[0].tensors[name].numel
        return self._fill(name, 0, torch.empty(numel, dtype=_work(name, self._donors)))

    def _fill(self, name: str, begin: int, out: torch.Tensor) -> torch.Tensor:
        plus, *minus = self._values.operands
        return self._values.difference(name, begin, plus, minus[0] if minus else None, out)


def _write(tensor: _Stored, storage: Storage, differences: _Differences, writer: Writer) -> None:
    dtypes = [TORCH_DTYPE[part.dtype] for part in tensor.parts]
    if tensor.form == "dense":
        writer.write(tensor.parts[0], (taken.to(dtypes[0]) for _, taken in differences(tensor.name)))
        return
    if tensor.form == "packed":
        _write_packed(tensor, differences, writer)
        return
    whole = differences.whole(tensor.name)
    writer.require_finite(tensor.name, whole)
    if tensor.form == "low_rank":
        with torch_threads(len(os.sched_getaffinity(0))):
            pieces = factors(whole.view(tensor.shape), tensor.parts[0].shape[1])
    else:
        indices = largest(whole, tensor.parts[0].numel)
        pieces = (indices, whole[indices])
    for part, dtype, piece in zip(tensor.parts, dtypes, pieces, strict=True):
        writer.write(part, iter([piece.to(dtype).reshape(-1)]))


def _write_packed(tensor: _Stored, differences: _Differences, writer: Writer) -> None:
    """The values as they come; then where they are, which is held meanwhile: at most a bit for each element."""
    starts, where, values = tensor.parts
    held: list[torch.Tensor] = []
    counts = [np.zeros(1, np.int64)]

    def chunks() -> Iterator[torch.Tensor]:
        for _, taken in differences(tensor.name):
            stored = taken.to(TORCH_DTYPE[values.dtype])
            writer.require_finite(tensor.name, stored)
            filled, places, own = locate(bits(stored), where.dtype == "U16")
            held.append(torch.from_numpy(places))
            counts.append(own)
            yield stored[torch.from_numpy(filled)]

    writer.write(values, chunks())
    writer.write(where, (places for places in held if len(places)))
    writer.write(starts, iter([torch.from_numpy(np.concatenate(counts).cumsum())]))


def factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left [rows, rank] and right [rank, columns] of the truncated SVD; the singular values are shared between them."""
    if min(matrix.shape) <= max(_SMALL_SVD, rank + _OVERSAMPLED):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, transposed = torch.svd_lowrank(matrix, rank + _OVERSAMPLED, niter=_POWER_ITERATIONS)
            right = transposed.T
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The indices, ascending, of the `count` elements of largest magnitude; of equal ones the first."""
    magnitude = values.abs()
    least = magnitude.kthvalue(values.numel() - count + 1).values
    kept = magnitude > least
    kept[(magnitude == least).nonzero()[: count - int(kept.sum()), 0]] = True
    return kept.nonzero()[:, 0]


def _measure(name: str, differences: _Differences, result: Operand) -> dict[str, Any]:
    """How what was written differs from v: `exact` is against what a merge takes, the rest against v in fp64. `zeros`
    counts v's own, where donors agree."""
    buffer = torch.empty(AT_ONCE * 8, dtype=torch.uint8)
    exact, worst, error, norm, zeros = True, 0.0, 0.0, 0.0, 0
    for begin, taken in differences(name):
        stored = result.read(name, begin, begin + taken.numel(), buffer)
        wide = differences.wide(name, begin, taken.numel())
        exact = exact and torch.equal(stored.double(), taken.double())
        norm += float(wide.square().sum())
        zeros += wide.numel() - int(torch.count_nonzero(wide))
        off = wide.sub_(stored)
        worst = max(worst, float(off.abs().max()))
        error += float(off.square().sum())
    relative = math.sqrt(error / norm) if norm else 0.0
    measured = {"exact": exact, "max_error": worst, "relative_error": relative, "norm": math.sqrt(norm)}
    return measured | {"zeros": zeros}


def _summary(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What was measured of all tensors together, and for what a vector is exact: whatever is wider than 16 bits asks
    for the difference in fp64, and everything else for what a merge takes."""
    worst = max(entry["max_error"] for entry in entries.values())
    error = math.hypot(*(entry["relative_error"] * entry["norm"] for entry in entries.values()))
    norm = math.hypot(*(entry["norm"] for entry in entries.values()))
    exact = all(entry["exact"] for entry in entries.values())
    holds = "every target and output" if worst == 0 else "targets and outputs of 16 bits" if exact else None
    elements = sum(math.prod(entry["shape"]) for entry in entries.values())
    zeros = sum(entry["zeros"] for entry in entries.values()) / elements if elements else 0.0
    relative = error / norm if norm else 0.0
    return {"exact": exact, "exact_for": holds, "max_error": worst, "relative_error": relative, "zeros": zeros}


def _readable(description: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with one line a tensor."""
    lines = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    head = json.dumps(description, indent=2, ensure_ascii=False).removesuffix("\n}")
    return head + ',\n  "tensors": {\n' + ",\n".join(lines) + "\n  }\n}\n"
