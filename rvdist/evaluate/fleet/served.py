"""What an engine is started on: a directory of links to the very files that an opened checkpoint consists of.

vLLM chooses among the files of a directory by rules of its own: it takes `consolidated*.safetensors` before all others,
any other weight file that lies there too, `params.json` instead of `config.json`. Here it finds nothing to choose from.
Knows nothing of vLLM.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.directory import INDEX, Checkpoint
from rvdist.weights.checkpoint.stacked import Stacked

_COMPANIONS = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
_OTHERS = {"params.json"}  # the configuration in Mistral's layout: of which weights, nobody knows


def companions(directory: Path) -> list[Path]:
    """What is read of a checkpoint besides weights: configuration, tokenizer, chat template, generation defaults."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.suffix in _COMPANIONS
        and not path.name.endswith(".index.json")
        and path.name not in _OTHERS
        and path.is_file()
    )


def strays(checkpoint: Checkpoint) -> list[str]:
    """Files beside a checkpoint that vLLM might take for a part of it."""
    return sorted(
        path.name
        for path in checkpoint.path.iterdir()
        if (path.suffix == ".safetensors" and path.name not in checkpoint.files) or path.name in _OTHERS
    )


@contextmanager
def link_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """The directory, for as long as an engine starts: then vLLM has read it, and what else lies beside it. The same
    checkpoint has the same name each time, since a name is part of what vLLM's compiled graphs are kept under;
    processes share it."""
    if isinstance(checkpoint, Stacked):
        raise BadInput(f"{checkpoint.path}: engines start on checkpoints; write its layers as one by a merge first")
    if other := next((name for name in checkpoint.files if not name.endswith(".safetensors")), None):
        raise BadInput(
            f"{checkpoint.path / other}: engines start on safetensors; write it as such by a merge with alpha=0"
        )
    files = {name: (checkpoint.path / name).resolve(strict=True) for name in checkpoint.files}
    files |= {path.name: path.resolve(strict=True) for path in companions(checkpoint.path)}
    index = {"metadata": {}, "weight_map": {name: spec.file for name, spec in checkpoint.tensors.items()}}
    known = [[name, str(file), (at := file.stat()).st_size, at.st_mtime_ns] for name, file in sorted(files.items())]
    root = own_directory("rvdist-engines") or Path(tempfile.mkdtemp(prefix="rvdist-engines-"))
    place = root / hashlib.blake2b(json.dumps([known, index]).encode(), digest_size=16).hexdigest()
    holder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(holder, fcntl.LOCK_SH)  # nobody removes what is there
        if not place.exists():
            made = Path(tempfile.mkdtemp(dir=root))
            for name, file in files.items():
                (made / name).symlink_to(file)
            if len(checkpoint.files) > 1:
                (made / INDEX).write_text(json.dumps(index))
            with suppress(OSError):  # another process was faster
                made.rename(place)
        yield place
    finally:
        with suppress(BlockingIOError):  # others start: the last of them does it
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in root.iterdir():
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        os.close(holder)


def own_directory(name: str) -> Path | None:
    """The directory on this machine that all processes of this user find under the name; None where another user's, or
    something else, stands there. Raises OSError."""
    directory = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    return directory if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() else None
