"""Room for the files of an output, so that a full disk is found before there is anything to lose."""

from __future__ import annotations

import ctypes
import errno
import os

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_promised: dict[int, int] = {}  # by file system: bytes that files of this process will fill, and none set aside


class Room:
    """What the files of one output need. A file system that can sets it aside; of another it is promised, and counted
    with all else that this process promised there."""

    def __init__(self) -> None:
        self._own: dict[int, int] = {}  # of what is promised

    def reserve(self, descriptor: int, size: int) -> None:
        """For an open file, which is to have `size` bytes. Raises OSError where there is not as much."""
        if _set_aside(descriptor, size):
            return
        file, has = os.fstat(descriptor), os.fstatvfs(descriptor)
        lacks = max(0, size - file.st_blocks * 512)
        if has.f_blocks and has.f_bavail * has.f_frsize < _promised.get(file.st_dev, 0) + lacks:  # 0: it does not say
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for promised in (_promised, self._own):
            promised[file.st_dev] = promised.get(file.st_dev, 0) + lacks

    def release(self) -> None:
        """The files are whole, or will not be."""
        for device, nbytes in self._own.items():
            _promised[device] -= nbytes
        self._own = {}


def _set_aside(descriptor: int, size: int) -> bool:
    """Whether the file system has set room aside for all of a file. The C library's posix_fallocate would, where it
    cannot, write to each of its blocks instead: 34 million times for 141 GB. Raises OSError where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while libc.fallocate(descriptor, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
