"""The safetensors header: read it, check it, write it. No tensor data is touched.

Format: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes, without holes.
Source: the safetensors format specification (github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # the typeshed leaves it out
from pathlib import Path
from typing import Any

from rvdist.checkpoint.regular import open_regular
from rvdist.errors import BadInput

MAX_HEADER_BYTES = 100_000_000  # the specification's own limit; the others are ours
MAX_TENSORS, MAX_RANK, MAX_NAME, MAX_METADATA = 1_000_000, 32, 4096, 100_000  # names in bytes
_MOST = 2**64 - 1
_POINTER = b"version "  # as Git LFS pointers begin; as a length it would be far beyond the limit

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

_SPACES = " \t\n\r"
_S = "[ \\t\\n\\r]*+"
_OPENED, _COMMA = re.compile(rf"\{{{_S}"), re.compile(rf"{_S},{_S}")
_CLOSED, _COLON = re.compile(rf"{_S}\}}"), re.compile(rf"{_S}:{_S}")
_QUOTE, _NULL = re.compile(rf'{_S}"'), re.compile("null")
_NUMBER = re.compile(rf"{_S}(?:0|[1-9][0-9]{{0,19}}){_S}")
_FIELDS = {
    "dtype": re.compile(r'"([A-Z0-9_]{1,32})"'),
    "shape": re.compile(r"\[([0-9, \t\n\r]*+)\]"),
    "data_offsets": re.compile(rf"\[{_S}([0-9]{{1,20}}){_S},{_S}([0-9]{{1,20}}){_S}\]"),
}
_ENTRY = re.compile(
    rf"\{{{_S}" + rf"{_S},{_S}".join(f'"{key}"{_S}:{_S}{value.pattern}' for key, value in _FIELDS.items()) + rf"{_S}\}}"
)


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
        with open(open_regular(path), "rb") as file:
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
        tensors, metadata = _Parser(str(memoryview(prefix)[8:data_start], "utf-8"), file, data_start).parse()
    except ValueError as error:  # UnicodeError is one
        raise BadInput(f"{where}: its safetensors header is damaged ({error}); download or copy it again") from None

    tensors.sort(key=lambda spec: spec.nbytes)
    tensors.sort(key=lambda spec: spec.offset)
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


class _Parser:
    """The header's JSON, read in one pass over its text, without building more than is kept. Raises ValueError."""

    def __init__(self, text: str, file: str, data_start: int) -> None:
        self._text, self._at = text, 1
        self._file, self._data_start = file, data_start
        if not text.startswith("{"):
            raise ValueError("it does not begin with {")

    def parse(self) -> tuple[list[TensorSpec], dict[str, str]]:
        tensors: dict[str, TensorSpec] = {}
        metadata: dict[str, str] | None = None
        for name in self._names():
            if name != "__metadata__":
                if len(tensors) == MAX_TENSORS:
                    raise ValueError(f"it has more than {MAX_TENSORS:,} tensors")
                if len(name) > MAX_NAME or len(name.encode()) > MAX_NAME:  # raises for half a surrogate
                    raise ValueError(f"the name of a tensor, {name[:40]!r}…, has more than {MAX_NAME} bytes")
                if name in tensors:
                    raise ValueError("a name stands twice in it")
                tensors[name] = self._tensor(name)
            elif metadata is not None:
                raise ValueError("a name stands twice in it")
            else:
                metadata = self._metadata()
        if self._text[self._at :].strip(" \t\n\r"):
            raise ValueError("something follows its last brace")
        return list(tensors.values()), metadata or {}

    def _names(self) -> Iterator[str]:
        """The names of an object whose brace is behind us; whoever takes one goes on to behind its value."""
        if self._found(_CLOSED):
            return
        while True:
            name = self._string()
            self._need(_COLON, "a colon")
            yield name
            if self._found(_CLOSED):
                return
            self._need(_COMMA, "a comma")

    def _metadata(self) -> dict[str, str]:
        if self._found(_NULL):  # is none, as the library has it
            return {}
        if not self._found(_OPENED):
            raise ValueError("its metadata is not a map of strings")
        found: dict[str, str] = {}
        for count, key in enumerate(self._names(), 1):
            if count > MAX_METADATA:
                raise ValueError(f"its metadata has more than {MAX_METADATA:,} entries")
            if self._text[self._at : self._at + 1] != '"':
                raise ValueError("its metadata is not a map of strings")
            found[key] = self._string()
            (key + found[key]).encode()  # raises for half a surrogate
            if len(found) != count:
                raise ValueError("a name stands twice in it")
        return found

    def _tensor(self, name: str) -> TensorSpec:
        if match := _ENTRY.match(self._text, self._at):  # as the library writes it
            self._at = match.end()
            dtype, shape, begin, end = match.groups()
        else:
            dtype, shape, begin, end = self._entry(name)
        if dtype not in ITEMSIZE:
            raise ValueError(f"tensor {name} has the unknown dtype {dtype}")
        if shape.count(",") >= MAX_RANK:
            raise ValueError(f"tensor {name} has more than {MAX_RANK} dimensions")
        sizes = tuple(map(_whole, shape.split(","))) if shape.strip(_SPACES) else ()
        nbytes, first, last = ITEMSIZE[dtype], _whole(begin), _whole(end)
        for size in sizes:
            nbytes *= size
            if nbytes > _MOST * ITEMSIZE[dtype]:
                raise ValueError(f"tensor {name} has a shape beyond any file")
        if last - first != nbytes:
            raise ValueError(f"tensor {name} has {last - first} bytes where its shape and dtype need {nbytes}")
        return TensorSpec(name, dtype, sizes, self._file, self._data_start + first)

    def _entry(self, name: str) -> tuple[str, str, str, str]:
        """dtype, shape, first and last offset as they are written, in any order."""
        if not self._found(_OPENED):
            raise ValueError(f"tensor {name} is not a map")
        found: dict[str, Any] = {}
        for key in self._names():
            value = _FIELDS[key].match(self._text, self._at) if key in _FIELDS else None
            if value is None or key in found:
                what = (
                    "a second"
                    if key in found
                    else "a negative or fractional, or else damaged,"
                    if key in _FIELDS
                    else "an unknown"
                )
                raise ValueError(f"tensor {name[:80]} has {what} {key[:80]!r}")
            found[key], self._at = value.groups(), value.end()
        if found.keys() != _FIELDS.keys():
            raise ValueError(f"tensor {name} lacks {min(_FIELDS.keys() - found.keys())}")
        return (*found["dtype"], *found["shape"], *found["data_offsets"])

    def _found(self, pattern: re.Pattern[str]) -> bool:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return match is not None

    def _need(self, pattern: re.Pattern[str], what: str) -> None:
        if not self._found(pattern):
            raise ValueError(f"{what} is missing at character {self._at}")

    def _string(self) -> str:
        if not self._found(_QUOTE):
            raise ValueError(f"a name is missing at character {self._at}")
        string, self._at = scanstring(self._text, self._at)
        return str(string)


def _whole(digits: str) -> int:
    """A number that a file may have of bytes or elements."""
    if not _NUMBER.fullmatch(digits) or (number := int(digits)) > _MOST:
        raise ValueError(f"{digits[:40]!r} is a negative, fractional or impossible shape or offset")
    return number


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
