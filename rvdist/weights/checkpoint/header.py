"""The safetensors header: read it, check it, write it. No tensor data is touched.

Format: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes, without holes.
Source: the safetensors format specification (github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # the typeshed leaves it out
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.core.regular import open_regular

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

_S = r"[ \t\n\r]*+"
_OPENED, _COMMA = re.compile(rf"\{{{_S}"), re.compile(rf"{_S},{_S}")
_CLOSED, _COLON = re.compile(rf"{_S}\}}"), re.compile(rf"{_S}:{_S}")
_QUOTE, _NULL = re.compile(rf'{_S}"'), re.compile("null")
_NUMBER = "(?:0|[1-9][0-9]{0,19})"
_FIELDS = {
    "dtype": r'"([A-Z0-9_]{1,32})"',
    "shape": rf"\[{_S}((?:{_NUMBER}(?:{_S},{_S}{_NUMBER}){{0,{MAX_RANK - 1}}}+)?+){_S}\]",
    "data_offsets": rf"\[{_S}({_NUMBER}){_S},{_S}({_NUMBER}){_S}\]",
}
_FIELD = "|".join(f'"{key}"{_S}:{_S}{value}' for key, value in _FIELDS.items())
_MAP = rf'\{{{_S}(?:(?:{_FIELD}){_S}(?:,{_S}(?=")|(?=\}}))){{3}}\}}'  # in any order
_ENTRY = re.compile(_MAP)
_TENSOR = re.compile(rf'"((?!__metadata__")[^"\\\x00-\x1f]*+)"{_S}:{_S}{_MAP}{_S},{_S}(?=")')  # as most are written
_SHAPE = re.compile(r"\[[0-9, \t\n\r]*+\]")


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
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it has as it is stored."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def is_floating_point(self) -> bool:
        """Whether arithmetic applies to it."""
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
        """The stamp of a file, or of a descriptor. Raises OSError."""
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
    if error.errno == errno.EFBIG:
        return BadInput(f"{path}: cannot be read ({error.strerror}); download or copy it again")
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
        rows, sizes, metadata = _Parser(str(memoryview(prefix)[8:data_start], "utf-8"), file, data_start).parse()
    except ValueError as error:  # UnicodeError is one
        raise BadInput(f"{where}: its safetensors header is damaged ({error}); download or copy it again") from None

    order = sorted(range(len(rows)), key=sizes.__getitem__)
    order.sort(key=lambda k: rows[k][4])
    end = data_start
    for k in order:
        name, _, _, _, offset = rows[k]
        if offset != end:
            what = "overlaps the tensor before it" if offset < end else "leaves a hole before it"
            raise BadInput(f"{where}: tensor {name} {what}; the file is damaged, download or copy it again")
        end += sizes[k]
    if end != size:
        what = "truncated" if end > size else "followed by unknown bytes"
        raise BadInput(f"{where}: {what} (its header promises {end} bytes, it has {size}); download or copy it again")
    return [TensorSpec(*rows[k]) for k in order], metadata


_Row = tuple[str, str, tuple[int, ...], str, int]  # what a TensorSpec is made of; dear, so not before all is well


class _Parser:
    """The header's JSON, read in one pass over its text, without building more than is kept. Raises ValueError."""

    def __init__(self, text: str, file: str, data_start: int) -> None:
        self._text, self._at = text, 1
        self._file, self._data_start = file, data_start
        self._names: set[str] = set()
        self._rows: list[_Row] = []
        self._sizes: list[int] = []
        if not text.startswith("{"):
            raise ValueError("it does not begin with {")
        if text.count("{") > MAX_TENSORS + 1 + ('"__metadata__"' in text):
            raise ValueError(f"it has more than {MAX_TENSORS:,} tensors")

    def parse(self) -> tuple[list[_Row], list[int], dict[str, str]]:
        """The tensors as they are listed, the bytes of each, and the metadata."""
        metadata: dict[str, str] | None = None
        for name in self._keys():
            if name != "__metadata__":
                self._entry(name)
            elif metadata is not None:
                raise ValueError("a name stands twice in it")
            else:
                metadata = self._metadata()
        if self._text[self._at :].strip(" \t\n\r"):
            raise ValueError("something follows its last brace")
        return self._rows, self._sizes, metadata or {}

    def _keys(self, plain: bool = True) -> Iterator[str]:
        """The keys of an object whose brace is behind us; whoever takes one goes on to behind its value."""
        if self._match(_CLOSED):
            return
        while True:
            key = self._string()
            self._need(_COLON, "a colon")
            yield key
            if self._match(_CLOSED):
                return
            self._need(_COMMA, "a comma")
            while plain and (match := _TENSOR.match(self._text, self._at)):
                self._add(*match.groups())
                self._at = match.end()

    def _metadata(self) -> dict[str, str]:
        if self._match(_NULL):  # is none, as the library has it
            return {}
        if not self._match(_OPENED):
            raise ValueError("its metadata is not a map of strings")
        metadata: dict[str, str] = {}
        for count, key in enumerate(self._keys(plain=False), 1):
            if count > MAX_METADATA:
                raise ValueError(f"its metadata has more than {MAX_METADATA:,} entries")
            if self._text[self._at : self._at + 1] != '"':
                raise ValueError("its metadata is not a map of strings")
            metadata[key] = self._string()
            (key + metadata[key]).encode()  # half a surrogate raises
            if len(metadata) != count:
                raise ValueError("a name stands twice in it")
        return metadata

    def _entry(self, name: str) -> None:
        match = _ENTRY.match(self._text, self._at)
        if not match:
            raise ValueError(self._fault(name))
        self._add(name, *match.groups())
        self._at = match.end()

    def _add(self, name: str, dtype: str | None, shape: str | None, begin: str | None, end: str | None) -> None:
        """Takes a tensor as it is written from where we are."""
        if dtype is None or shape is None or begin is None or end is None:
            raise ValueError(self._fault(name))
        if (itemsize := ITEMSIZE.get(dtype)) is None:
            raise ValueError(f"tensor {name[:80]} has the unknown dtype {dtype}")
        if len(name) > MAX_NAME or (not name.isascii() and len(name.encode()) > MAX_NAME):  # half a surrogate raises
            raise ValueError(f"the name of a tensor, {name[:40]!r}…, has more than {MAX_NAME} bytes")
        if name in self._names:
            raise ValueError("a name stands twice in it")
        self._names.add(name)
        sizes = tuple(map(int, shape.split(","))) if shape else ()
        nbytes, first, last = itemsize, int(begin), int(end)
        for size in sizes:
            nbytes *= size
            if size > _MOST or nbytes > _MOST * itemsize:
                raise ValueError(f"tensor {name[:80]} has a shape beyond any file")
        if last - first != nbytes:
            raise ValueError(f"tensor {name[:80]} has {last - first} bytes where its shape and dtype need {nbytes}")
        self._rows.append((name, dtype, sizes, self._file, self._data_start + first))
        self._sizes.append(nbytes)

    def _fault(self, name: str) -> str:
        """What is wrong with the entry of tensor `name` that stands here. Raises ValueError where it is no JSON."""
        name = name[:80]
        if not self._match(_OPENED):
            return f"tensor {name} is not a map"
        names: set[str] = set()
        for key in self._keys(plain=False):
            if key not in _FIELDS or key in names:
                return f"tensor {name} has {'a second' if key in names else 'an unknown'} {key[:80]!r}"
            match = re.compile(_FIELDS[key]).match(self._text, self._at)
            if not match:
                written = _SHAPE.match(self._text, self._at) if key == "shape" else None
                if written and written.group().count(",") >= MAX_RANK:
                    return f"tensor {name} has more than {MAX_RANK} dimensions"
                return f"tensor {name} has a negative or fractional, or else damaged, {key!r}"
            self._at = match.end()
            names.add(key)
        if lacking := _FIELDS.keys() - names:
            return f"tensor {name} lacks {min(lacking)}"
        return f"tensor {name} writes its keys with escapes"

    def _match(self, pattern: re.Pattern[str]) -> bool:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return match is not None

    def _need(self, pattern: re.Pattern[str], what: str) -> None:
        if not self._match(pattern):
            raise ValueError(f"{what} is missing at character {self._at}")

    def _string(self) -> str:
        if not self._match(_QUOTE):
            raise ValueError(f"a name is missing at character {self._at}")
        string, self._at = scanstring(self._text, self._at)
        return str(string)


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
