"""Matrices that wait outside memory while others are worked on.

One that is large waits in a file of the temporary directory that has no name, so that it is gone with the process,
however that ends. It is written and read by plain calls: mapped, its pages would be this process's again. Where
`TMPDIR` is set, no other directory is taken: Python passes over one that is full, missing or read-only without a word.
"""

from __future__ import annotations

import io
import os
import tempfile

import torch

from rvdist.core.errors import Failed

_LARGE = 8 << 20  # bytes of a matrix that are more than memory is spared for
_AT_ONCE = 2  # that wait in a directory for one worker, at most


def directory() -> str:
    """Where matrices wait."""
    return os.path.abspath(os.environ.get("TMPDIR") or "/tmp")


def room(rows: int, columns: int) -> int:
    """Bytes of the directory that matrices of this shape take at most, for each worker."""
    nbytes = 8 * rows * columns
    return _AT_ONCE * nbytes if nbytes > _LARGE else 0


class Aside:
    """A matrix in fp64 of at most so many rows, which are appended, and come back all together. Its methods raise
    Failed where the temporary directory does not take it, or does not give it back."""

    def __init__(self, rows: int, columns: int) -> None:
        self._columns, self._parts = columns, list[tuple[int, int]]()  # of each how many rows, and the sum of its words
        self._directory, self._nbytes = directory(), 8 * rows * columns
        self._file: io.BytesIO | io.FileIO = io.BytesIO()
        if self._nbytes > _LARGE:
            try:
                self._file = tempfile.TemporaryFile(buffering=0, dir=self._directory)  # noqa: SIM115
            except OSError as error:
                raise self._failed(f"takes no file ({error.strerror})") from None

    def append(self, rows: torch.Tensor) -> None:
        """Puts these, (n, columns), below those that are there."""
        rows = rows.contiguous()
        left = _bytes(rows)
        self._file.seek(8 * self.rows * self._columns)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._failed(f"has no room ({error.strerror})") from None
        self._parts.append((len(rows), _sum(rows)))

    def read(self) -> torch.Tensor:
        """All rows, in memory of their own."""
        whole = torch.empty(self.rows, self._columns, dtype=torch.float64)
        left = _bytes(whole)
        self._file.seek(0)
        try:
            while left and (count := self._file.readinto(left)):
                left = left[count:]
        except OSError as error:
            raise self._failed(f"cannot be read ({error.strerror})") from None
        begin = 0
        for count, words in self._parts:
            if left or _sum(whole[begin : begin + count]) != words:
                raise self._failed("gave back other bytes than were written")
            begin += count
        return whole

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(count for count, _ in self._parts)

    def _failed(self, why: str) -> Failed:
        return Failed(
            f"{self._directory}: {why}; up to {_AT_ONCE * self._nbytes / 2**20:,.1f} MiB of matrices are to wait there "
            "for each worker; set TMPDIR to a directory that takes them (for a Ray that is up already, where it is "
            "started), and the same command goes on from what is done"
        )

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _bytes(rows: torch.Tensor) -> memoryview:
    return rows.view(-1).view(torch.uint8).numpy().data


def _sum(rows: torch.Tensor) -> int:
    """Of the words, which finds what a disk has lost."""
    return int(rows.view(torch.int64).sum())
