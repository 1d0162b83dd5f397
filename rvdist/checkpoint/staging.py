"""An output directory that appears whole or not at all.

Everything is written under `OUTPUT.partial`, journalled, made durable, and renamed once. A lock on a file in it
keeps a second writer out and is released by the kernel when its owner dies; what the dead one finished is kept.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rvdist.checkpoint.directory import COMPANIONS, INDEX, Checkpoint
from rvdist.checkpoint.header import TensorSpec
from rvdist.checkpoint.journal import JOURNAL, MANIFEST, Journal, Manifest, Written, read_journal
from rvdist.checkpoint.scaled import unquantized
from rvdist.errors import BadInput, Failed

DISCARD = Path("/dev/null")
_LOCK = "lock"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def discards(output: Path) -> bool:
    """Whether an output is /dev/null or stands under it: everything is computed and digested, nothing is kept."""
    return DISCARD in (output, *output.parents)


@dataclass(frozen=True)
class Probe:
    """A file, and what this run wrote there: another machine's own directory of the same name holds something else."""

    path: Path
    content: str

    def is_seen(self) -> bool:
        try:
            return self.path.read_text() == self.content
        except (OSError, ValueError):
            return False


class Staging:
    """One output under construction, of the plan with digest `plan`.

    `claims` is what an interrupted run of the same plan has journalled; what any other run left behind is cleared,
    and `restarted` says so. Whoever writes into it must see `probe`.
    Raises BadInput when the output exists (unless `overwrite`) or another process is writing it. This and every
    method raises Failed where nothing can be written.
    """

    def __init__(self, output: Path, plan: str, overwrite: bool = False) -> None:
        self.output = output
        self.plan = plan
        self.partial = output.with_name(output.name + ".partial")
        self._overwrite = overwrite
        require_free(output, overwrite)
        ours = any((self.partial / name).exists() for name in (_LOCK, MANIFEST))  # a commit removes the lock last
        if self.partial.is_dir() and any(self.partial.iterdir()) and not ours:
            raise BadInput(f"{self.partial}: is in the way and not ours to clear; move it or choose another output")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{self.partial}: cannot be created ({error.strerror}); choose another output") from None
        with _writing(self.partial):
            self._lock: int | None = self._take_lock()
        try:
            with _writing(self.partial):
                self.claims = {(w.file, w.start, w.nbytes): w for w in read_journal(self.partial, plan)}
                self.restarted = not self.claims and (self.partial / JOURNAL).exists()
                if not self.claims:
                    for entry in self.partial.iterdir():
                        if entry.name != _LOCK:
                            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
                self.probe = Probe(self.partial / _LOCK, uuid.uuid4().hex)
                self.probe.path.write_text(self.probe.content)
                self._journal = Journal(self.partial, plan, self.claims.values())
        except Failed:
            os.close(self._lock)
            raise
        self._written = dict(self.claims)

    def _take_lock(self) -> int:
        path = self.partial / _LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        raise BadInput(f"{self.output}: is being written by another run; wait for it or choose another output")

    def allocate(self, name: str, header: bytes, size: int) -> None:
        """Makes a weight file of its final size with its header in place, so that a full disk is found first.
        Raises Failed where there is no room."""
        try:
            with open(self.partial / name, "r+b" if (self.partial / name).exists() else "w+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
                file.write(header)
        except OSError as error:
            raise Failed(f"{self.partial / name}: no {size} bytes can be had there ({error.strerror})") from None

    def journal(self, written: Iterable[Written]) -> None:
        """Records ranges of weight files that are durable."""
        with _writing(self.partial):
            self._journal.add(written)
        self._written |= {(w.file, w.start, w.nbytes): w for w in written}

    def write_text(self, name: str, text: str) -> None:
        with _writing(self.partial / name):
            (self.partial / name).write_text(text, encoding="utf-8")

    def commit(self) -> None:
        """Makes everything durable and gives it its name in one rename. The digests stay, for `verify`."""
        manifest = Manifest(self.plan, tuple(self._written[key] for key in sorted(self._written)))
        self.write_text(MANIFEST, manifest.to_json())
        with _writing(self.partial):
            for entry in self.partial.rglob("*"):
                _sync(entry)
            (self.partial / JOURNAL).unlink()
            (self.partial / _LOCK).unlink()
            _sync(self.partial)
            require_free(self.output, self._overwrite)
            if self.output.exists():
                _exchange(self.partial, self.output)
                shutil.rmtree(self.partial)
            else:
                self.partial.rename(self.output)
            _sync(self.output.parent)
        self.release()

    def abandon(self) -> None:
        """Removes what was staged, if it was not committed; but not what an earlier run had journalled."""
        if self._lock is not None:
            if not self.claims:
                shutil.rmtree(self.partial, ignore_errors=True)
            self.release()

    def release(self) -> None:
        """Lets another run have the output; what is staged stays for it to go on from."""
        if self._lock is not None:
            self._journal.close()
            os.close(self._lock)
            self._lock = None


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


def carry_over(base: Checkpoint, staging: Staging, dtype: str | None) -> None:
    """Copies what stands beside the base's weights (config, generation config, tokenizer, chat template, code). The
    config says what is written: its `dtype`, if that is not the base's, and never that it is quantised. What describes
    Mistral's own layout of the weights stays with it."""
    left = ["params.json"] if any(base.path.glob("consolidated*.safetensors")) else []
    for entry in sorted(base.path.iterdir()):
        if not entry.is_file() or entry.name in left or entry.name.endswith(".index.json"):
            continue
        if entry.suffix in COMPANIONS:
            with _writing(staging.partial / entry.name):
                shutil.copyfile(entry, staging.partial / entry.name)
    if (templates := base.path / "additional_chat_templates").is_dir():
        with _writing(staging.partial / templates.name):
            shutil.copytree(templates, staging.partial / templates.name, dirs_exist_ok=True)
    config = unquantized(base.config)
    if dtype is not None and config:
        config = config | {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}
    if config != base.config:
        staging.write_text("config.json", json.dumps(config, indent=2) + "\n")


def write_index(staging: Staging, tensors: Mapping[str, TensorSpec], files: Sequence[str]) -> None:
    """`model.safetensors.index.json`, where there is more than one file or its name is not the default."""
    if list(files) == ["model.safetensors"]:
        return
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in tensors.values())},
        "weight_map": {name: spec.file for name, spec in sorted(tensors.items())},
    }
    staging.write_text(INDEX, json.dumps(index, indent=2) + "\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong in writing to `path` into a sentence."""
    try:
        yield
    except OSError as error:
        raise Failed(
            f"{path}: cannot be written ({error.strerror or error}); what is done is kept, and the same command goes "
            "on from there"
        ) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two directories in one step where the file system can; else there is a moment without `other`."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done == 0:
        return
    if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(ctypes.get_errno(), f"{other}: could not be replaced")
    aside = other.with_name(other.name + ".old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
