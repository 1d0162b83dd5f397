"""A secret of this user's, by which a later run tells its own records from another's."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from rvdist.core.regular import Handle

_BYTES = 32


def owner_key(directory: Path) -> bytes:
    """The key in `directory`, made there if there is none that this user alone can read. One of the process where none
    can be kept: then no other run knows it again."""
    name = f"key-{os.geteuid()}"
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        handle = Handle(directory.resolve())
        try:
            return _read(handle, name) or _make(handle, name)
        finally:
            handle.close()
    return _OF_THIS_PROCESS


def _read(handle: Handle, name: str) -> bytes:
    with suppress(FileNotFoundError), open(handle.open(name, os.O_RDONLY), "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077:
            return key if len(key := file.read(_BYTES + 1)) == _BYTES else b""
    return b""


def _make(handle: Handle, name: str) -> bytes:
    temporary, key = f".{name}-{secrets.token_hex(8)}", secrets.token_bytes(_BYTES)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=handle.descriptor)
    try:
        with open(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(descriptor)
        with suppress(FileNotFoundError):  # another process was faster
            os.rename(temporary, name, src_dir_fd=handle.descriptor, dst_dir_fd=handle.descriptor)
        with suppress(OSError):  # not every file system can; what it seals is durable, and nothing without it
            os.fsync(handle.descriptor)
    finally:
        for other in os.listdir(handle.descriptor):  # of processes that were killed, or come too late
            if other.startswith(f".{name}-"):
                with suppress(FileNotFoundError):
                    os.unlink(other, dir_fd=handle.descriptor)
    return _read(handle, name) or _OF_THIS_PROCESS  # a file system may know no modes; another process may be later


_OF_THIS_PROCESS = secrets.token_bytes(_BYTES)
