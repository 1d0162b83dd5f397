"""An output directory that appears whole or not at all.

Everything is written under `OUTPUT.partial`, journalled, made durable, and renamed once. A lock on a file in it
keeps a second writer out and is released by the kernel when its owner dies; what the dead one finished is kept.

Others may write to the directory that an output is made in. So `OUTPUT.partial` is closed to them until it is whole, is
held open, and everything in it is opened through that handle; one that is not ours is refused, and what it claims
counts only where this user's key has sealed it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rvdist.core.errors import BadInput, Failed
from rvdist.core.regular import Handle
from rvdist.weights.checkpoint.journal import (
    JOURNAL,
    MANIFEST,
    Journal,
    Manifest,
    Written,
    is_journal_of,
    read_journal,
)
from rvdist.weights.checkpoint.room import Room

DISCARD = Path("/dev/null")
_LOCK = "lock"
_AWAY = "remove it, or choose another output"
_IN_THE_WAY = "is in the way and not ours to clear; move it or choose another output"
_REPLACED = "replaced"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Busy(BadInput):
    """Another process is writing the output."""


def is_being_written(output: Path) -> bool:
    """Whether a process holds the lock of this output under construction."""
    try:
        place = output.with_name(f"{output.name}.partial") / _LOCK
        lock = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def discards(output: Path) -> bool:
    """Whether an output is /dev/null or stands under it: everything is computed and digested, nothing is kept."""
    return DISCARD in (output, *output.parents)


@dataclass(frozen=True)
class Probe:
    """A file, and what this run wrote there: another machine's own directory of the same name holds something else, and
    so does one that another user has put there."""

    path: Path
    content: str

    def open(self) -> Handle | None:
        """The directory it is in, if it is that of this run."""
        try:
            handle = Handle(self.path.parent)
        except OSError:
            return None
        with suppress(OSError, ValueError), open(handle.open(self.path.name, os.O_RDONLY), encoding="ascii") as file:
            if file.read(len(self.content) + 1) == self.content:
                return handle
        handle.close()
        return None


class Staging:
    """One output under construction, of the plan with digest `plan`.

    `claims` is what an interrupted run of the same plan has journalled with the same `key`; what any other run left
    behind is cleared, and `restarted` says so. Whoever writes into it must see `probe`.
    Raises BadInput when the output exists (unless `overwrite`) or others can write it, Busy when another process does.
    This and every method raises Failed where nothing can be written.
    """

    def __init__(self, output: Path, plan: str, overwrite: bool = False, key: bytes = b"") -> None:
        self.output = output
        self.plan = plan
        self.partial = output.with_name(output.name + ".partial")
        self._overwrite = overwrite
        self._key = key
        self._room = Room()
        require_free(output, overwrite)
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.partial.mkdir(0o700)
            self.handle = Handle(self.partial)
        except OSError as error:
            if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
                raise BadInput(f"{self.partial}: {_IN_THE_WAY}") from None
            raise BadInput(f"{self.partial}: cannot be created ({error.strerror}); choose another output") from None
        try:
            with explain_errors(self.partial):
                self._require_ours()
                self._lock: int | None = self._take_lock()
        except (BadInput, Failed):
            self.handle.close()
            raise
        try:
            with explain_errors(self.partial):
                self._restore()
                self.claims = {(w.file, w.start, w.nbytes): w for w in read_journal(self.partial, plan, key)}
                self.restarted = False
                if not self.claims:
                    self.restarted = (self.partial / JOURNAL).exists() and not is_journal_of(self.partial, plan, key)
                    self._clear()
                self.probe = Probe(self.partial / _LOCK, uuid.uuid4().hex)
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, self.probe.content.encode(), 0)
                self._journal = Journal(self.handle, plan, self.claims.values(), key)
        except (BadInput, Failed):
            os.close(self._lock)
            self.handle.close()
            raise
        self._written = dict(self.claims)

    def keep(self, ranges: Container[tuple[str, int, int]]) -> None:
        """Forgets the claims of other ranges, (file, start, nbytes): of a version that cut files otherwise."""
        self.claims = {key: written for key, written in self.claims.items() if key in ranges}
        self._written = dict(self.claims)

    def _require_ours(self) -> None:
        """Raises BadInput where this user did not make the directory, or others can write in it."""
        status = os.fstat(self.handle.descriptor)
        if (
            status.st_uid != os.geteuid() or status.st_mode & 0o022
        ):  # unless this file system shows all of ours like that
            new = tempfile.mkdtemp(dir=self.partial.parent, prefix=".rvdist-")
            made = os.lstat(new)
            os.rmdir(new)
            if status.st_uid != made.st_uid:
                raise BadInput(f"{self.partial}: belongs to another user (uid {status.st_uid}); {_AWAY}")
            if status.st_mode & ~made.st_mode & 0o022:
                raise BadInput(f"{self.partial}: others can write in it, so nothing there can be relied upon; {_AWAY}")
        names = os.listdir(self.handle.descriptor)
        if names and not {_LOCK, MANIFEST} & {*names} and not self._has_replaced():  # a commit removes the lock last
            raise BadInput(f"{self.partial}: {_IN_THE_WAY}")
        with suppress(OSError):
            os.fchmod(self.handle.descriptor, 0o700)

    def _has_replaced(self) -> bool:
        """Whether what stands there is what a commit of ours has replaced and was killed before it had removed it."""
        with suppress(BadInput):
            return (self.output / _LOCK).exists() and Manifest.read(self.output).is_sealed(self._key)
        return False

    def _restore(self) -> None:
        """Gives back its name to what a commit was about to replace when it was killed."""
        with suppress(FileNotFoundError):
            if not self.output.exists():
                os.rename(_REPLACED, self.output, src_dir_fd=self.handle.descriptor)
                require_free(self.output, self._overwrite)

    def _clear(self) -> None:
        with os.scandir(self.handle.descriptor) as entries:
            for entry in [entry for entry in entries if entry.name != _LOCK]:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.name, dir_fd=self.handle.descriptor)
                else:
                    os.unlink(entry.name, dir_fd=self.handle.descriptor)

    def _take_lock(self) -> int:
        try:
            descriptor = self.handle.open(_LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL):
                raise BadInput(f"{self.partial / _LOCK}: is no file of ours; {_AWAY}") from None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(_LOCK, dir_fd=self.handle.descriptor).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        raise Busy(f"{self.output}: is being written by another run; wait for it or choose another output")

    def allocate(self, name: str, header: bytes, size: int) -> None:
        """Makes a weight file of its final size with its header in place, so that a full disk is found first.
        Raises Failed where there is no room."""
        try:
            with open(self.handle.open(name, os.O_RDWR | os.O_CREAT), "r+b") as file:
                self._room.reserve(file.fileno(), size)
                file.truncate(size)
                file.write(header)
        except OSError as error:
            raise Failed(
                f"{self.partial / name}: no {size} bytes can be had there ({error.strerror}); make room, and run the "
                "same command again"
            ) from None

    def journal(self, written: Iterable[Written]) -> None:
        """Records ranges of weight files that are durable."""
        with explain_errors(self.partial):
            self._journal.add(written)
        self._written |= {(w.file, w.start, w.nbytes): w for w in written}

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file of the output. Raises Failed."""
        with (
            explain_errors(self.partial / name),
            open(self.handle.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w", encoding="utf-8") as file,
        ):
            file.write(text)

    def copy(self, source: int, name: str) -> None:
        """Copies what the descriptor `source` reads, and closes it."""
        with explain_errors(self.partial / name), open(source, "rb") as read:
            target = self.handle.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with open(target, "wb") as file:
                shutil.copyfileobj(read, file, 1 << 20)

    def commit(self) -> None:
        """Makes everything durable and gives it its name in one rename. The digests stay, for `verify`."""
        manifest = Manifest(self.plan, tuple(self._written[key] for key in sorted(self._written)))
        self.write_text(MANIFEST, (manifest.seal_with(self._key) if self._key else manifest).to_json())
        with explain_errors(self.partial):
            self._require_in_place(self.partial)
            for above, _, files, directory in os.fwalk(dir_fd=self.handle.descriptor):
                for name in files:
                    _sync(name, directory)
                if above != ".":
                    os.fsync(directory)
            self._require_free()
            os.unlink(JOURNAL, dir_fd=self.handle.descriptor)
            if replaces := self.output.exists():  # the lock goes last, so that it is known what was replaced
                self._permit(0o755)
                self._replace()
            else:
                os.unlink(_LOCK, dir_fd=self.handle.descriptor)
                self._permit(0o755)
                self.partial.rename(self.output)
            self._require_in_place(self.output)
            if replaces:
                os.unlink(_LOCK, dir_fd=self.handle.descriptor)
            self._permit(0o777)  # others may write in it only now that it is no partial directory any more
            _sync(self.output.parent)
        self.release()

    def _require_free(self) -> None:
        """Raises Failed where the name is taken now, which was free when this began."""
        try:
            require_free(self.output, self._overwrite)
        except BadInput as error:
            raise Failed(f"{error}; it came while this run wrote the same, of which what is done is kept") from None

    def _permit(self, most: int) -> None:
        """Gives it the mode that it would have been made with by the umask, as far as `most` goes."""
        with suppress(OSError):
            mode = os.fstat(self.handle.descriptor).st_mode & stat.S_ISGID
            os.fchmod(self.handle.descriptor, mode | most & ~_umask())
        os.fsync(self.handle.descriptor)

    def _replace(self) -> None:
        """Gives it the output's name and removes what had it: in one step where the file system can, else there is a
        moment without an output, and the other is in the new one until it is removed."""
        libc = ctypes.CDLL(None, use_errno=True)
        paths = os.fsencode(self.partial), os.fsencode(self.output)
        if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            shutil.rmtree(self.partial)
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), f"{self.output}: could not be replaced")
        os.rename(self.output, _REPLACED, dst_dir_fd=self.handle.descriptor)
        self.partial.rename(self.output)
        shutil.rmtree(_REPLACED, dir_fd=self.handle.descriptor)

    def _require_in_place(self, path: Path) -> None:
        if not self.handle.is_at(path):
            raise Failed(f"{path}: was replaced by someone else; choose an output where others cannot write")

    def abandon(self) -> None:
        """Removes what was staged, if it was not committed; but not what an earlier run had journalled."""
        if self._lock is not None:
            if not self.claims and self.handle.is_at(self.partial):
                with suppress(OSError):
                    self._clear()
                    os.unlink(_LOCK, dir_fd=self.handle.descriptor)
                    self.partial.rmdir()
            self.release()

    def release(self) -> None:
        """Lets another run have the output; what is staged stays for it to go on from."""
        if self._lock is not None:
            self._room.release()
            with suppress(OSError):  # everything is synced that must be
                self._journal.close()
            with suppress(OSError):
                os.close(self._lock)
            self._lock = None
            with suppress(OSError):
                self.handle.close()


def require_free(output: Path, overwrite: bool) -> None:
    """Raises BadInput where `output` exists and must not be replaced, or is no directory of a checkpoint."""
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise BadInput(f"{output}: already exists; choose another output or set overwrite=true")
    if output.is_symlink() or not output.is_dir():
        raise BadInput(f"{output}: is not a directory, and overwrite=true only replaces directories")
    if any(output.iterdir()) and not any(output.glob("*.safetensors")):
        raise BadInput(f"{output}: is not a checkpoint, and overwrite=true only replaces checkpoints")


@contextmanager
def explain_errors(path: Path) -> Iterator[None]:
    """Turns what goes wrong in writing to `path` into a sentence."""
    try:
        yield
    except OSError as error:
        raise Failed(
            f"{path}: cannot be written ({error.strerror or error}); what is done is kept, and the same command goes "
            "on from there"
        ) from None


def _umask() -> int:
    """The kernel tells it without changing it for a moment, which other threads would see."""
    with open("/proc/self/status") as status:
        return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), 0o022)


def _sync(path: Path | str, directory: int | None = None) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
