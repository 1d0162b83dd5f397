"""The zip archives that torch.save writes: where their members lie. Nothing is unpacked; bytes are read by ranges.

Every member of one is stored as it is, so that a tensor is a range of the file. Anything that a zip may be besides is
refused: compressed or encrypted members, overlapping ones, names that lead elsewhere, comments, several disks. An
archive may be a slice of a file, as in a distributed checkpoint. Raises ValueError.
Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from struct import unpack_from

_MOST_DIRECTORY, _MOST_MEMBERS = 64 << 20, 300_000  # bytes; members
_END, _END64, _LOCATOR = 22, 56, 20  # bytes of the records at the end
_ENTRY, _LOCAL = 46, 30  # of a member's in the directory, and before its data, but for names
_FULL = 0xFFFFFFFF
_DAMAGED = "it is no whole archive of torch.save"


@dataclass(frozen=True, slots=True)
class Member:
    """A member: where its header begins, where whatever follows it begins, and how many bytes it has."""

    header: int
    limit: int
    size: int


class Archive:
    """The archive in bytes [begin, end) of an open file: members by name."""

    def __init__(self, descriptor: int, begin: int, end: int) -> None:
        self._descriptor, self._begin, self._end = descriptor, begin, end
        self.members = self._index()

    def bytes_of(self, name: str, most: int) -> bytes:
        """All of a small member."""
        member = self.members[name]
        if member.size > most:
            raise ValueError(f"its {name[-40:]} has {member.size:,} bytes, and at most {most:,} are read")
        return self._read(self.place(name), member.size)

    def place(self, name: str) -> int:
        """Where the bytes of a member begin in the file."""
        member = self.members[name]
        local = self._read(member.header, _LOCAL)
        signature, flags, method = unpack_from("<4s2xHH", local)
        name_size, extra_size = unpack_from("<HH", local, 26)
        data = member.header + _LOCAL + int(name_size) + int(extra_size)
        own = self._read(member.header + _LOCAL, name_size) if name_size < 4096 else b""
        if signature != b"PK\3\4" or flags & 1 or method or own != name.encode():
            raise ValueError(f"its member {name[:80]} is not what the archive's directory says")
        if data + member.size > member.limit:
            raise ValueError(f"its member {name[:80]} overlaps the next")
        return data

    def _read(self, at: int, size: int) -> bytes:
        if at < self._begin or at + size > self._end or len(raw := os.pread(self._descriptor, size, at)) < size:
            raise ValueError(_DAMAGED)
        return raw

    def _index(self) -> dict[str, Member]:
        size, place, count, before = self._directory()
        raw = self._read(place, size)
        found: list[tuple[int, int, str, int]] = []  # where it begins, where it ends at least, its name, its bytes
        at = 0
        for _ in range(count):
            if raw[at : at + 4] != b"PK\1\2" or at + _ENTRY > size:
                raise ValueError(_DAMAGED)
            flags, method = unpack_from("<HH", raw, at + 8)
            packed, plain, name_size, extra_size, comment = unpack_from("<IIHHH", raw, at + 20)
            (header,) = unpack_from("<I", raw, at + 42)
            name = str(raw[at + _ENTRY : at + _ENTRY + name_size], "utf-8")
            extra = raw[at + _ENTRY + name_size : at + _ENTRY + name_size + extra_size]
            packed, plain, header = _widen(extra, plain, packed, header)
            if flags & 1 or method or packed != plain:
                raise ValueError(f"its member {name[:80]} is compressed or encrypted, as torch.save writes none")
            if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
                raise ValueError(f"its member {name[:80]!r} has a name that leads elsewhere")
            start = self._begin + header
            found.append((start, start + _LOCAL + name_size + plain, name, plain))
            at += _ENTRY + name_size + extra_size + comment
        if at != size:
            raise ValueError(_DAMAGED)
        found.sort()
        starts = [start for start, *_ in found[1:]] + [before]
        members = {}
        for (start, least, name, plain), limit in zip(found, starts, strict=True):
            if least > limit:
                raise ValueError(f"its member {name[:80]} overlaps the next, or ends behind the archive")
            members[name] = Member(start, limit, plain)
        if len(members) < count:
            raise ValueError("a name stands twice in it")
        return members

    def _directory(self) -> tuple[int, int, int, int]:
        """The directory's bytes, its place, its count of members, and where the members end."""
        last = self._end - _END
        record = self._read(last, _END)
        signature, disk, first, here, count, size, offset, comment = unpack_from("<4s4H2IH", record)
        if signature != b"PK\5\6" or disk or first or here != count or comment:
            raise ValueError(_DAMAGED)
        stop = last
        if (here == 0xFFFF or _FULL in (size, offset)) and last - self._begin >= _LOCATOR + _END64:
            locator, disk, far, disks = unpack_from("<4sIQI", self._read(last - _LOCATOR, _LOCATOR))
            stop = self._begin + far
            if locator != b"PK\6\7" or disk or disks > 1 or stop + _END64 != last - _LOCATOR:
                raise ValueError(_DAMAGED)
            signature, here, count, size, offset = unpack_from("<4s20xQQQQ", self._read(stop, _END64))
            if signature != b"PK\6\6" or here != count:
                raise ValueError(_DAMAGED)
        elif last - self._begin >= _LOCATOR + _END64 and self._read(last - _LOCATOR, 4) == b"PK\6\7":
            stop = last - _LOCATOR - _END64
        if count > _MOST_MEMBERS or size > _MOST_DIRECTORY or count * _ENTRY > size:
            raise ValueError(f"it has {count:,} members in {size:,} bytes of directory, which is no archive of torch's")
        place = self._begin + offset
        if place + size != stop:
            raise ValueError(_DAMAGED)
        return size, place, count, place


def _widen(extra: bytes, plain: int, packed: int, header: int) -> tuple[int, int, int]:
    """Sizes and place of a member: (packed, plain, header), the large ones from its extra field."""
    values = [plain, packed, header]
    at = 0
    while at + 4 <= len(extra):
        kind, size = unpack_from("<HH", extra, at)
        if kind == 1:
            wide = [int.from_bytes(extra[at + 4 + k : at + 12 + k], "little") for k in range(0, size, 8)]
            for k, value in enumerate(values):
                if value == _FULL:
                    if not wide:
                        raise ValueError(_DAMAGED)
                    values[k] = wide.pop(0)
            break
        at += 4 + size
    return values[1], values[0], values[2]
