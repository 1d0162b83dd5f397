"""What stands beside a base's weights, and goes with them into an output: config, tokenizer, templates, the index."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rvdist.core.errors import BadInput
from rvdist.core.regular import LeadsOut, open_regular, own_places
from rvdist.weights.checkpoint.directory import COMPANIONS, INDEX, Checkpoint, read_json
from rvdist.weights.checkpoint.fp8 import Scaled, without_quantization
from rvdist.weights.checkpoint.header import TensorSpec, unreadable
from rvdist.weights.checkpoint.remapped import TOKENIZER, Remapped
from rvdist.weights.checkpoint.staging import Staging, explain_errors

_TEMPLATES = "additional_chat_templates"
_MOST_BESIDE = 1 << 30  # bytes of a file that is copied from beside weights


def carry_over(base: Checkpoint, staging: Staging, dtype: str | None, weights: bool = False) -> None:
    """Copies what stands beside the base's weights (config, generation config, tokenizer, chat template, code). The
    config says what is written: its `dtype`, if that is not the base's, and that it is quantised only where the
    base's own `weights` are written as they are stored. What describes Mistral's own layout of the weights stays with
    it."""
    for name, path in companions(base).items():
        if len(name.parts) > 1:
            with explain_errors(staging.partial / name), suppress(FileExistsError):
                os.mkdir(name.parts[0], dir_fd=staging.handle.descriptor)
        staging.copy(_open_companion(path), str(name))
    as_stored = weights and dtype is None and isinstance(base, Scaled)
    config = base.config if as_stored else without_quantization(base.config)
    if dtype is not None and config:
        config = config | {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}
    if config != (read_json(path) if (path := base.beside / "config.json").exists() else {}):
        staging.write_text("config.json", json.dumps(config, indent=2) + "\n")
    for file, text in base.written_beside().items() if isinstance(base, Remapped) else ():
        staging.write_text(file, text)


def companions(base: Checkpoint) -> dict[Path, Path]:
    """What stands beside the base's weights and goes with them, by its name in the output. Raises BadInput for what is
    no regular file, or is a link to elsewhere: it would be published as a file."""
    left = ["params.json"] if any(base.beside.glob("consolidated*.safetensors")) else []
    files = {
        Path(entry.name): entry
        for entry in sorted(base.beside.iterdir())
        if entry.suffix in COMPANIONS and not entry.name.endswith(".index.json") and entry.name not in left
        if entry.is_symlink() or not entry.is_dir()
    }
    if (templates := base.beside / _TEMPLATES).is_dir():
        files |= {Path(_TEMPLATES) / entry.name: entry for entry in sorted(templates.iterdir()) if not entry.is_dir()}
    if isinstance(base, Remapped) and base.tokenizer:  # whose files may stand elsewhere
        own = [entry for entry in sorted(base.tokenizer.where.iterdir()) if TOKENIZER.fullmatch(entry.name)]
        files = {name: path for name, path in files.items() if base.goes_along(str(name))}
        files |= {Path(entry.name): entry for entry in own}
    for path in files.values():
        descriptor = _open_companion(path)
        with suppress(OSError):  # nothing was read
            os.close(descriptor)
    return files


def _open_companion(path: Path) -> int:
    beside = path.parent.parent if path.parent.name == _TEMPLATES else path.parent
    try:
        descriptor = open_regular(path, own_places(beside))
    except LeadsOut as error:
        raise BadInput(
            f"{path}: {error.strerror}, outside of its checkpoint, and would be copied into the output; replace the "
            "link by a copy, if it belongs there"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    if (size := os.fstat(descriptor).st_size) > _MOST_BESIDE:
        os.close(descriptor)
        raise BadInput(f"{path}: has {size:,} bytes, too many to belong to a checkpoint; move it away")
    return descriptor


def write_index(staging: Staging, tensors: Mapping[str, TensorSpec], files: Sequence[str]) -> None:
    """`model.safetensors.index.json`, where there is more than one file or its name is not the default."""
    if list(files) == ["model.safetensors"]:
        return
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in tensors.values())},
        "weight_map": {name: spec.file for name, spec in sorted(tensors.items())},
    }
    staging.write_text(INDEX, json.dumps(index, indent=2) + "\n")
