"""Writes long ranges of files past the page cache, in the background.

A page that is written once and not soon read again costs its allocation, a copy and its write-back, and pushes out
a page that someone reads. Direct I/O costs the disk alone, and what it has written needs no sync but the file's
metadata. It moves whole blocks from memory that begins at one; the ends of a range go through the page cache. A file
system that has no direct I/O gets all of it that way.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rvdist.core.regular import Handle

_LIBC = ctypes.CDLL(None)
_SYNC_FILE_RANGE_WRITE = 2

BLOCK = 4096  # bytes: what direct I/O wants offsets, lengths and memory to be multiples of, at most
_BUFFER = 4 << 20  # bytes: long enough that a request's own cost is little
_MEMORY = 128 << 20  # bytes of all buffers of a process, at most


class File:
    """An existing file open for writing, found below `handle` if it is given. Raises OSError, with its name."""

    def __init__(self, path: Path, direct: bool = True, handle: Handle | None = None) -> None:
        self._path = path
        opener = handle.opener if handle else os.open
        with self._name_in_errors():
            self.cached = opener(str(path), os.O_WRONLY)
        self._direct: int | None = None
        self.is_direct = direct
        if direct:
            try:
                self._direct = opener(str(path), os.O_WRONLY | os.O_DIRECT)
            except OSError as error:
                self._no_direct(error)

    def write(self, view: memoryview, offset: int) -> None:
        """Through the page cache."""
        with self._name_in_errors():
            while view:
                count = os.pwrite(self.cached, view, offset)
                view, offset = view[count:], offset + count

    def write_blocks(self, view: memoryview, offset: int) -> None:
        """Past it, if the file system can; all three are multiples of BLOCK."""
        while view and self.is_direct and self._direct is not None:
            try:
                count = os.pwrite(self._direct, view, offset)
            except OSError as error:
                self._no_direct(error)
            else:
                view, offset = view[count:], offset + count
        self.write(view, offset)

    def _no_direct(self, error: OSError) -> None:
        if error.errno != errno.EINVAL:
            with self._name_in_errors():
                raise error
        self.is_direct = False

    @contextmanager
    def _name_in_errors(self) -> Iterator[None]:
        """What goes wrong with an open file does not say with which, and may be told when another is written."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def sync(self) -> None:
        """Makes what was written durable."""
        with self._name_in_errors():
            os.fdatasync(self.cached)

    def close(self) -> None:
        os.close(self.cached)
        if self._direct is not None:
            os.close(self._direct)


class RangeWriter:
    """Writes one range after the other, of any file: `begin`, `write` its bytes in order, `end`; `wait` for all that
    is under way. `sharers` writers share a process's memory. What goes wrong in the background is raised by a later
    call, as OSError."""

    def __init__(self, pool: ThreadPoolExecutor, sharers: int = 1) -> None:
        size = min(_BUFFER, _MEMORY // (2 * sharers)) // BLOCK * BLOCK
        self._pool = pool
        self._buffers = [mmap.mmap(-1, max(BLOCK, size)) for _ in range(2)]
        self._under_way: list[Future[None] | None] = [None, None]
        self._now = 0  # the buffer that is being filled
        self._filled = 0
        self._file: File
        self._start = self._offset = 0  # of the range, and of what comes next

    def begin(self, file: File, offset: int) -> None:
        """What is written next goes to the file from this offset on."""
        self._file, self._start, self._offset, self._filled = file, offset, offset, 0

    def write(self, data: memoryview) -> None:
        """Takes the next bytes, and may write them later."""
        if not self._file.is_direct:
            self._flush()
            self._file.write(data, self._offset)
            self._offset += len(data)
            return
        if head := min(len(data), -self._offset % BLOCK if not self._filled else 0):
            self._file.write(data[:head], self._offset)
            self._offset, data = self._offset + head, data[head:]
        buffer = self._buffers[self._now]
        while data:
            if not self._filled:
                self._finish(self._now)
            count = min(len(data), len(buffer) - self._filled)
            buffer[self._filled : self._filled + count] = data[:count]
            self._filled, self._offset, data = self._filled + count, self._offset + count, data[count:]
            if self._filled == len(buffer):
                self._flush()
                buffer = self._buffers[self._now]

    def end(self) -> None:
        """Hands on all bytes of the range."""
        self._flush()
        if not self._file.is_direct:
            _start_writeback(self._file.cached, self._start, self._offset - self._start)

    def wait(self) -> None:
        """Waits until all that was handed on is written. Raises OSError."""
        for number in range(len(self._buffers)):
            self._finish(number)

    def _flush(self) -> None:
        """Sends the whole blocks of the buffer off, and writes what is left at once."""
        if not self._filled:
            return
        view, offset = memoryview(self._buffers[self._now])[: self._filled], self._offset - self._filled
        whole = self._filled // BLOCK * BLOCK
        self._under_way[self._now] = self._pool.submit(self._file.write_blocks, view[:whole], offset)
        self._file.write(view[whole:], offset + whole)
        self._now, self._filled = (self._now + 1) % len(self._buffers), 0

    def _finish(self, number: int) -> None:
        future, self._under_way[number] = self._under_way[number], None
        if future is not None:
            future.result()


def _start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Asks the kernel to begin writing a range to disk and does not wait: a later fsync then has little left to do.
    Only a hint (Linux's sync_file_range), so a file system that has no such thing is left alone."""
    _LIBC.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)
