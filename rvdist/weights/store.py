"""Stores v itself: exactly, rounded, as factors of a truncated SVD, or as its largest elements; or as a LoRA adapter.
Where the donors agree, nothing is stored.

Streams, and holds one matrix whole where it is stored as factors. The error is measured on
what was written, as whoever applies the vector will read it. Knows donors and files, nothing of targets, Ray or points.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rvdist.core.config import Storage
from rvdist.core.errors import BadInput
from rvdist.core.point import Vector
from rvdist.weights import peft
from rvdist.weights.arithmetic.method import torch_threads
from rvdist.weights.arithmetic.ties import kth_and_rank, magnitudes
from rvdist.weights.checkpoint.adapter import CONFIG, WEIGHTS, as_adapter
from rvdist.weights.checkpoint.beside import carry_over, companions, write_index
from rvdist.weights.checkpoint.bound import bind
from rvdist.weights.checkpoint.difference import BLOCK, is_adapter, needs_base
from rvdist.weights.checkpoint.digest import checkpoint_digest, digest_beside, require_same, stamps_of
from rvdist.weights.checkpoint.directory import Checkpoint, open_checkpoint, reshard, shard_names
from rvdist.weights.checkpoint.header import ITEMSIZE, Stamp, TensorSpec, build_header
from rvdist.weights.checkpoint.journal import is_complete
from rvdist.weights.checkpoint.staging import Staging
from rvdist.weights.checkpoint.stored_vector import DESCRIPTION, MARK, VERSIONS, as_vector, part_names
from rvdist.weights.checkpoint.stream import TORCH_DTYPE
from rvdist.weights.measured import Differences, as_lines, measure, summarise, work_of
from rvdist.weights.operand import open_operand
from rvdist.weights.packed import bits, has_places, locate, packed_bytes
from rvdist.weights.reduce import factors, rank_within
from rvdist.weights.values import Values
from rvdist.weights.writer import Writer

_WORTH = 0.9  # of its dense size, at most, is what a tensor is packed to
_LAYOUT = 3  # of the files and of what names them, for those that an earlier version began
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
    if not overwrite and is_complete(output, asked.plan):
        say(f"{output}: already complete")
        return
    staging = Staging(output, asked.plan, overwrite, key)
    try:
        if staging.restarted:
            say(f"{staging.partial}: was left by a run with other inputs or settings; starting over")
        with ExitStack() as opened, torch_threads(1):
            values = opened.enter_context(closing(Values(dict(zip(("plus", "minus"), donors, strict=False)))))
            differences = Differences(donors, values)
            files, stored = _layout(asked, storage, _survey(asked, storage, differences, progress))
            for name, (header, size) in files.items():
                staging.allocate(name, header, size)
            version = VERSIONS[any(tensor.form == "packed" for tensor in stored)]
            kind = "adapter" if storage.format else "vector"
            description = {"kind": kind, "version": version, **asked.provenance, "storage": storage.to_json()}
            entries: dict[str, dict[str, Any]] = {s.name: {"form": s.form, "shape": list(s.shape)} for s in stored}
            rank = _describe(staging, asked, storage, stored, files, description | {"tensors": entries})
            written = (as_adapter if storage.format else as_vector)(open_checkpoint(staging.partial))
            result = opened.enter_context(closing(open_operand(written)))
            writer = opened.enter_context(closing(Writer(staging, list(values.operands.values()))))
            try:
                for tensor in stored:
                    if not writer.has(tensor.parts):
                        _write(tensor, storage, differences, writer)
                    entries[tensor.name] |= measure(tensor.name, differences, result)
                    nbytes = donors[0].tensors[tensor.name].nbytes
                    progress(nbytes - nbytes // 2)
            except KeyboardInterrupt:
                writer.sync()
                raise
            writer.sync()
        for donor in donors:
            donor.require_unchanged()
        if not is_adapter(donors[0]) and not storage.format:
            carry_over(donors[0], staging, None)
            require_same(asked.beside, companions(donors[0]).values())
        measured = summarise(entries, bool(storage.format))
        description |= {"skipped": asked.skipped, "bytes": sum(size for _, size in files.values()), **measured}
        staging.write_text(DESCRIPTION, as_lines(description, entries))
        staging.commit()
        holds = f"exact for {measured['exact_for']}" if measured["exact_for"] else "not exact"
        told = peft.tell(measured, rank) if rank else f"{holds}, relative error {measured['relative_error']:.2g}"
        say(f"{output}: {told}, {description['bytes']:,} bytes")
    except BadInput:
        staging.abandon()
        raise
    finally:
        staging.release()


def _describe(
    staging: Staging,
    asked: _Asked,
    storage: Storage,
    stored: Sequence[_Stored],
    files: Mapping[str, tuple[bytes, int]],
    description: Mapping[str, Any],
) -> int:
    """Writes what says how to read the weight files: of an adapter peft's config. Its rank; 0 of a vector of ours."""
    if storage.format:
        own = asked.provenance["donors"]
        config = peft.config_of(
            {tensor.name: tensor.parts[0].shape[1] for tensor in stored if tensor.parts},
            own["minus"]["name"] if "minus" in own else getattr(asked.donors[0], "trained_on", None),
            any("ForCausalLM" in str(name) for name in asked.donors[0].config.get("architectures") or ()),
        )
        staging.write_text(CONFIG, json.dumps(config, indent=2) + "\n")
        return int(config["r"])
    staging.write_text(DESCRIPTION, json.dumps(description))
    write_index(staging, {part.name: part for tensor in stored for part in tensor.parts}, list(files))
    return 0


def is_saved(
    vector: Vector, sources: Mapping[str, Checkpoint], output: Path, storage: Storage, digests: Path | None = None
) -> bool:
    """Whether `save` has written this vector there before. Writes nothing but `digests`. Raises BadInput for donors of
    which there is nothing to save."""
    return is_complete(output, _ask([sources[source] for source in vector.sources()], storage, digests).plan)


@dataclass(frozen=True)
class _Asked:
    """What is to be stored: the tensors of v, `specs` of the first donor; why the donors' others are `skipped`; what
    the file system said of what stands `beside` it and goes along. `plan` names all of it."""

    donors: Sequence[Checkpoint]
    specs: Sequence[TensorSpec]
    skipped: dict[str, str]
    provenance: dict[str, Any]
    beside: Mapping[Path, Stamp]
    plan: str


def _ask(donors: Sequence[Checkpoint], storage: Storage, digests: Path | None) -> _Asked:
    named = donors
    if needs_base(donors[0]):
        donors = [bind(*donors)]
    own = donors[0].tensors
    skipped = {
        name: f"is of dtype {spec.dtype}"
        for name, spec in own.items()
        if not all(donor.tensors[name].is_floating_point for donor in donors)
    }
    specs = [spec for name, spec in own.items() if name not in skipped]
    if not specs:
        raise BadInput(f"{donors[0].path}: has no floating-point tensor, so there is no vector to save")
    if storage.format:
        peft.require_linear(donors[0])
    carries = not (storage.format or is_adapter(donors[0]))
    stamps = stamps_of(companions(donors[0]).values()) if carries else {}
    beside = digest_beside(donors[0], digests) if carries else ""
    asked = _Asked(donors, specs, skipped, _provenance(named, digests), stamps, "")
    files, _ = _layout(asked, storage, {})
    return replace(asked, plan=_digest(named, storage, files, beside))


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
    return storage.dtype or _SAFETENSORS[work_of(name, asked.donors)]


def _survey(
    asked: _Asked, storage: Storage, differences: Differences, progress: Callable[[int], None]
) -> dict[str, int]:
    """What must be known of tensors before their parts are: of each that may be packed how many elements, as they are
    stored, are anything but 0; of each that becomes factors their rank, where that depends on its values."""
    found = {}
    for spec in asked.specs:
        dtype = _stored_dtype(asked, storage, spec.name)
        form, _ = _parts(spec, dtype, storage)
        if form == "dense":
            stored = (taken.to(TORCH_DTYPE[dtype]) for _, taken in differences(spec.name))
            found[spec.name] = sum(int(np.count_nonzero(bits(chunk))) for chunk in stored)
        elif form == "low_rank" and storage.error is not None:
            whole = differences.whole(spec.name)  # what is not finite is told where it is written
            found[spec.name] = rank_within(whole.view(spec.shape), storage.error) if whole.isfinite().all() else 1
        elif form == "low_rank" and storage.format and not any(taken.any() for _, taken in differences(spec.name)):
            found[spec.name] = 0
        progress(spec.nbytes // 2)
    return found


def _layout(
    asked: _Asked, storage: Storage, found: Mapping[str, int]
) -> tuple[dict[str, tuple[bytes, int]], list[_Stored]]:
    """The files, (header, size) by name, sharded as the first donor is unless there is a maximum; and every tensor,
    packed where that is worth it, by what was `found`; an adapter is one file, as peft reads it."""
    specs = asked.specs
    metadata = ({"format": "pt"} if storage.format else MARK) | {
        key: json.dumps(value, ensure_ascii=False) for key, value in asked.provenance.items()
    }
    wanted = {
        spec.name: _parts(spec, _stored_dtype(asked, storage, spec.name), storage, found.get(spec.name))
        for spec in specs
    }

    def nbytes(spec: TensorSpec) -> int:
        return sum(math.prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in wanted[spec.name][1])

    if storage.format:
        if not any(parts for _, parts in wanted.values()):
            raise BadInput("vector.format=peft: the vector is 0 in every matrix that LoRA holds; store it without that")
        shards, names = [list(specs)], [WEIGHTS]
    elif storage.max_shard_size is None:
        shards = [list(own) for _, own in groupby(specs, lambda spec: spec.file)]
    else:
        shards = reshard(specs, nbytes, storage.max_shard_size)
    if not storage.format:
        names = shard_names(len(shards), "vector")
    files, stored = {}, []
    for name, shard in zip(names, shards, strict=True):
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
    """The form of a tensor, and the name, dtype and shape of each of its parts. `count`: of its values, or the rank of
    its factors; None: unknown."""
    if storage.format and (count == 0 or not peft.is_held(spec.name, spec.shape)):
        return peft.LEFT_OUT, []
    if (storage.rank, storage.error) != (None, None) and len(spec.shape) == 2 and spec.numel:
        rows, columns = spec.shape
        rank = min(storage.rank or max(1, count or rows), rows, columns)
        left, right = peft.factor_names(spec.name) if storage.format else part_names(spec.name, "low_rank")
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


def _digest(donors: Sequence[Checkpoint], storage: Storage, files: Mapping[str, tuple[bytes, int]], beside: str) -> str:
    stamps = [[astuple(stamp) for stamp in donor.stamps.values()] for donor in donors]
    headers = [(name, header.hex(), size) for name, (header, size) in files.items()]
    made_of = json.dumps([stamps, storage.to_json(), headers, beside, _LAYOUT])
    return hashlib.blake2b(made_of.encode(), digest_size=16).hexdigest()


def _write(tensor: _Stored, storage: Storage, differences: Differences, writer: Writer) -> None:
    dtypes = [TORCH_DTYPE[part.dtype] for part in tensor.parts]
    if tensor.form == "dense":
        writer.write(tensor.parts, ([taken.to(dtypes[0])] for _, taken in differences(tensor.name)))
    elif tensor.form == "packed":
        _write_packed(tensor, differences, writer)
    elif tensor.form == "sparse":
        _write_sparse(tensor, differences, writer)
    elif tensor.form == "low_rank":
        whole = differences.whole(tensor.name)
        writer.require_finite(tensor.name, whole)
        sides = factors(whole.view(tensor.shape), tensor.parts[0].shape[1])
        writer.write(tensor.parts, iter([[side.to(dtypes[0]).reshape(-1) for side in sides]]))


def _write_packed(tensor: _Stored, differences: Differences, writer: Writer) -> None:
    """The values and where they are as they come; how many there are in each block is held meanwhile."""
    starts, where, values = tensor.parts
    counts = np.zeros(starts.numel, np.int64)

    def chunks() -> Iterator[Sequence[torch.Tensor]]:
        for begin, taken in differences(tensor.name):
            stored = taken.to(TORCH_DTYPE[values.dtype])
            writer.require_finite(tensor.name, stored)
            filled, places, own = locate(bits(stored), where.dtype == "U16")
            counts[1 + begin // BLOCK :][: len(own)] = own
            yield torch.from_numpy(places), stored[torch.from_numpy(filled)]

    writer.write((where, values), chunks())
    writer.write((starts,), iter([[torch.from_numpy(counts.cumsum())]]))


def _write_sparse(tensor: _Stored, differences: Differences, writer: Writer) -> None:
    """The elements of largest magnitude, and their indices; of equal ones the first. By passes over the tensor."""
    indices, values = (TORCH_DTYPE[part.dtype] for part in tensor.parts)

    def finite() -> Iterator[list[torch.Tensor]]:
        for _, taken in differences(tensor.name):
            writer.require_finite(tensor.name, taken)
            yield [taken]

    ((least, same),) = kth_and_rank(finite, tensor.parts[0].numel)

    def chunks() -> Iterator[Sequence[torch.Tensor]]:
        left = same
        for begin, taken in differences(tensor.name):
            found = magnitudes(taken)
            kept = found > least
            equal = (found == least).nonzero()[:left, 0]
            kept[equal], left = True, left - len(equal)
            at = kept.nonzero()[:, 0]
            yield (at + begin).to(indices), taken[at].to(values)

    writer.write(tensor.parts, chunks())
