"""Digests of what is in files, remembered by what the file system says of them.

xxh3-128 finds accidents and names contents; it is no defence against an adversary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import xxhash

from rvdist.core.errors import BadInput, Failed
from rvdist.core.regular import read_regular, write_regular
from rvdist.weights.checkpoint.beside import companions
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import HubStamp, Stamp, unreadable
from rvdist.weights.checkpoint.remapped import Remapped
from rvdist.weights.checkpoint.stacked import Stacked

_DIGEST = re.compile("[0-9a-f]{32}")
_OF_PIECES = (".distcp", ".metadata", ".pt")  # files whose names say which part of a tensor is in them


def file_digest(path: Path, cache: Path | None = None) -> str:
    """xxh3-128 of a file's bytes, 32 hexadecimal digits. With `cache`, a directory, a file whose stamp
    is unchanged is not read again. Raises Failed where it cannot be read."""
    try:
        return _file_digest(path, Stamp.of(path), cache)
    except OSError as error:
        raise Failed(f"{path}: cannot be read ({error.strerror}); run again when it can") from None


def _file_digest(path: Path, stamp: Stamp, cache: Path | None) -> str:
    remembered = cache / hashlib.sha256(repr(astuple(stamp)).encode()).hexdigest() if cache else None
    with suppress(OSError, ValueError):
        if remembered and _DIGEST.fullmatch(known := read_regular(remembered, 64).decode("ascii")):
            return known
    with open(path, "rb", buffering=0) as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    if remembered and Stamp.of(path) == stamp:
        with suppress(OSError):  # what is not remembered is read again; what is written in part is no digest
            write_regular(remembered, digest)
    return digest


def checkpoint_digest(checkpoint: Checkpoint, cache: Path | None = None) -> str:
    """A digest of a checkpoint's weights and configuration: of contents, never of paths, and of a file's name only
    where that says which part of a tensor it has.

    The weights of a Hub source are not fetched for it: the hashes that the Hub has of them count. So a local copy of
    the same files has another digest."""
    if checkpoint.hub:
        files = sorted(stamp.etag for stamp in checkpoint.stamps.values() if isinstance(stamp, HubStamp))
    else:
        of = {name: file_digest(checkpoint.path / name, cache) for name in checkpoint.files}
        files = sorted(f"{name} {own}" if name.endswith(_OF_PIECES) else own for name, own in of.items())
        if isinstance(checkpoint, Stacked):  # which layers of these files, and where
            files += [json.dumps([name, of[file], at]) for name, (file, at) in sorted(checkpoint.mapping.items())]
    if isinstance(checkpoint, Remapped):  # the rows of others, and which
        files += [checkpoint.digest, *(checkpoint_digest(lender, cache) for lender in checkpoint.lenders[1:])]
    made_of = json.dumps([files, checkpoint.config], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(made_of.encode())


def stamps_of(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """What the file system says of each file. Raises BadInput where one is not there any more."""
    try:
        return {(now := path): Stamp.of(path) for path in paths}
    except OSError as error:
        raise unreadable(now, error) from None


def require_same(before: Mapping[Path, Stamp], paths: Iterable[Path]) -> None:
    """Raises BadInput where these are not the files that there were before."""
    now = stamps_of(paths)
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) != now.get(path):
            raise BadInput(f"{path}: changed while it was being read; run again when it is at rest")


def digest_beside(base: Checkpoint, cache: Path | None = None) -> str:
    """A digest of what an output has beside its weights from this base: its config, its tokenizer, and the like."""
    files = {str(name): file_digest(path, cache) for name, path in companions(base).items()}
    anew = base.written_beside() if isinstance(base, Remapped) else {}
    return xxhash.xxh3_128_hexdigest(json.dumps([files, base.config, anew], sort_keys=True).encode())
