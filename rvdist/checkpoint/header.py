"""The safetensors header: read it, check it, write it. No tensor data is touched.

Format: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes, without holes.
Source: the safetensors format specification (github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvdist.errors import BadInput

MAX_HEADER_BYTES = 100_000_000  # the specification's own limit
_POINTER = b"version "  # as Git LFS pointers begin; as a length it would be far beyond the limit

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its safetensors dtype, its shape, its file, and where its bytes begin in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def is_floating_point(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class Stamp:
    """What the file system says of a file; a file whose stamp is unchanged is taken to be unchanged."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: str | Path | int) -> Stamp:
        stat = os.stat(file)
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@dataclass(frozen=True)
class HubStamp:
    """What the Hub says of a file at a commit: the hash of its contents, and its size."""

    etag: str
    size: int


Header = tuple[list[TensorSpec], dict[str, str], Stamp | HubStamp]


def read_header(path: Path) -> tuple[list[TensorSpec], dict[str, str], Stamp]:
    """The tensors of one file in the order of their bytes, the file's metadata, and its stamp.

    Raises BadInput, naming the file, for anything the specification forbids.
    """
    try:
        with open(path, "rb") as file:
            stamp = Stamp.of(file.fileno())
            prefix = file.read(8)
            prefix += file.read(header_end(str(path), prefix, stamp.size) - 8)
    except OSError as error:
        raise unreadable(path, error) from None
    return *parse_header(str(path), path.name, prefix, stamp.size), stamp


def unreadable(path: Path, error: OSError) -> BadInput:
    """Why a file of a checkpoint cannot be opened."""
    if path.is_symlink() and not path.exists():
        return BadInput(f"{path}: is a broken link to {os.readlink(path)}; download or copy what it leads to again")
    return BadInput(f"{path}: cannot be read ({error.strerror}); check the path and its permissions")


def require_no_pointer(where: str | Path, content: bytes) -> None:
    """Raises BadInput where Git has left a pointer in place of the file `where`."""
    if content.startswith(_POINTER):
        raise BadInput(f"{where}: is a Git LFS pointer, not the file it stands for; run git lfs pull in its repository")


def header_end(where: str, prefix: bytes, size: int) -> int:
    """Where the data begin, from the first 8 bytes of a file of `size` bytes. Raises BadInput, naming `where`."""
    require_no_pointer(where, prefix)
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise BadInput(f"{where}: not a whole safetensors file ({size} bytes); download or copy it again")
    return 8 + length


def parse_header(where: str, file: str, prefix: bytes, size: int) -> tuple[list[TensorSpec], dict[str, str]]:
    """The tensors and the metadata of a file of `size` bytes, from its bytes up to the data at least; `where` is what
    errors call it. Raises BadInput."""
    data_start = header_end(where, prefix, size)
    try:
        header = json.loads(prefix[8:data_start], object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata  # null is none, as the library has it
        tensors = [_spec(name, entry, file, data_start) for name, entry in header.items()]
        if not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata is not a map of strings")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{where}: its safetensors header is damaged ({error}); download or copy it again") from None

    tensors.sort(key=lambda spec: (spec.offset, spec.nbytes))
    end = data_start
    for spec in tensors:
        if spec.offset != end:
            what = "overlaps the tensor before it" if spec.offset < end else "leaves a hole before it"
            raise BadInput(f"{where}: tensor {spec.name} {what}; the file is damaged, download or copy it again")
        end += spec.nbytes
    if end != size:
        what = "truncated" if end > size else "followed by unknown bytes"
        raise BadInput(f"{where}: {what} (its header promises {end} bytes, it has {size}); download or copy it again")
    return tensors, metadata


def _spec(name: str, entry: Mapping[str, Any], file: str, data_start: int) -> TensorSpec:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEMSIZE:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a negative or fractional shape or offset")
    spec = TensorSpec(name, dtype, tuple(shape), file, data_start + begin)
    if end - begin != spec.nbytes:
        raise ValueError(f"tensor {name} has {end - begin} bytes where its shape and dtype need {spec.nbytes}")
    return spec


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], file: str, metadata: Mapping[str, str], align: int = 8
) -> tuple[bytes, list[TensorSpec]]:
    """The bytes before the data of a file holding (name, dtype, shape) in this order, and where each tensor goes.
    Padded with spaces, as the specification allows, so that the data begins at a multiple of `align` bytes, itself
    one of the 8 that it asks for."""
    begin = 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    relative = []
    for name, dtype, shape in tensors:
        spec = TensorSpec(name, dtype, shape, file, begin)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + spec.nbytes]}
        begin += spec.nbytes
        relative.append(spec)
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % align)
    start = 8 + len(raw)
    placed = [TensorSpec(s.name, s.dtype, s.shape, s.file, s.offset + start) for s in relative]
    return len(raw).to_bytes(8, "little") + raw, placed
