"""Opens what strangers made: regular files alone, never a device, a pipe, or what a link leads out to.

Nothing is looked at by name and opened later: what was opened is asked what it is and where it lies.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


class LeadsOut(OSError):
    """A link out of where a file may lie; `strerror` says where to."""


def open_regular(path: Path, within: Sequence[Path] | None = None) -> int:
    """A descriptor to read a regular file by. `within`: the directories (without links in their own paths) in which it
    must lie, once links are followed. Raises OSError, `LeadsOut` where it lies elsewhere."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)  # touches nothing: not even a device is opened
    try:
        mode = os.fstat(descriptor).st_mode
        if within is not None:
            lies = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if not any(lies.is_relative_to(directory) for directory in within):
                raise LeadsOut(errno.ELOOP, f"is a link to {lies}", str(path))
        if not stat.S_ISREG(mode):
            kind = next((kind for test, kind in _KINDS if test(mode)), "no regular file")
            raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(descriptor)


def read_regular(path: Path, most: int) -> bytes:
    """All of a regular file of at most `most` bytes. Raises OSError."""
    with open(open_regular(path), "rb") as file:
        content = file.read(most + 1) if (size := os.fstat(file.fileno()).st_size) <= most else None
    if content is None or len(content) > most:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most:,} are read", str(path))
    return content


def write_regular(path: Path, text: str, durable: bool = False) -> None:
    """Writes a small file and the directories that it needs, never through a link. Not at once: whoever reads it must
    tell a part of it from the whole, and nothing else is left where this ends in the middle. `durable`: it is on disk
    when this returns, and so are its directory and that one's name. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = Handle(path.parent.resolve())
    try:
        with open(handle.open(path.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable:
            above = Handle(handle.path.parent)
            for directory in (handle, above):
                with suppress(OSError):  # not every file system can
                    os.fsync(directory.descriptor)
            above.close()
    finally:
        handle.close()


def read_lines(path: Path, most: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a regular file with their numbers, each of at most `most` bytes. Raises OSError."""
    with open(open_regular(path), "rb") as file:
        number = 0
        while line := file.readline(most + 1):
            number += 1
            if len(line) > most:
                raise OSError(errno.EFBIG, f"its line {number} has more than {most:,} bytes", str(path))
            yield number, line


def allow_many_files() -> None:
    """Lets this process open as many files as the system allows it at all: every shard of every source and output is
    held open, and many systems begin with 1,024."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def own_places(directory: Path) -> list[Path]:
    """Where the files of a checkpoint may lie: its own directory; and where that is a snapshot in a Hub cache, its
    repository's blobs."""
    real = directory.resolve()
    repository = real.parent.parent
    if real.parent.name == "snapshots" and "--" in repository.name:
        return [real, repository / "blobs"]
    return [real]


class Handle:
    """A directory that is held open: what is opened through it lies in it, whatever becomes of its name, and is never a
    link. Raises OSError where `path` is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, _DIRECTORY)

    def open(self, name: str | Path, flags: int) -> int:
        """A descriptor of a regular file below it; new ones get the mode that the umask leaves. Raises OSError."""
        *above, last = Path(name).parts
        if os.path.isabs(name) or ".." in (*above, last):
            raise OSError(errno.EINVAL, "it is not below the directory", str(name))
        directory = self.descriptor
        try:
            for part in above:
                before, directory = directory, os.open(part, _DIRECTORY, dir_fd=directory)
                if before != self.descriptor:
                    os.close(before)
            flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(last, flags, 0o666, dir_fd=directory)
        finally:
            if directory != self.descriptor:
                os.close(directory)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file", str(self.path / name))
        return descriptor

    def opener(self, path: str, flags: int) -> int:
        """For `open` of what has this directory's path: the file is found in it whatever has that path now."""
        return self.open(Path(path).relative_to(self.path), flags)

    def is_at(self, path: Path) -> bool:
        """Whether `path` still names this directory."""
        try:
            return os.path.samestat(os.lstat(path), os.fstat(self.descriptor))
        except OSError:
            return False

    def close(self) -> None:
        os.close(self.descriptor)
