"""A checkpoint directory in the Hugging Face safetensors layout, opened by its headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rvdist.checkpoint.header import Stamp, TensorSpec, read_header
from rvdist.errors import BadInput

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor by name in file order, and each weight file's metadata and stamp."""

    path: Path
    tensors: dict[str, TensorSpec]
    metadata: dict[str, dict[str, str]]
    stamps: dict[str, Stamp] = field(repr=False)

    @property
    def files(self) -> list[str]:
        return list(self.stamps)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json") if (self.path / "config.json").exists() else {}

    def require_unchanged(self) -> None:
        """Raises BadInput when a weight file is no longer the one whose header was read."""
        for name, stamp in self.stamps.items():
            try:
                now = Stamp.of(self.path / name)
            except OSError:
                now = None
            if now != stamp:
                raise BadInput(f"{self.path / name}: changed while it was being read; run again when it is at rest")


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks every header of the checkpoint in the directory `path`. Raises BadInput."""
    if not path.is_dir():
        raise BadInput(f"{path}: no such checkpoint directory; check the path")
    index = path / INDEX
    expected = _weight_map(index) if index.exists() else None
    files = sorted(set(expected.values())) if expected is not None else _weight_files(path)

    tensors: dict[str, TensorSpec] = {}
    metadata, stamps = {}, {}
    for file in files:
        specs, metadata[file], stamps[file] = read_header(path / file)
        for spec in specs:
            if spec.name in tensors:
                raise BadInput(f"{path}: tensor {spec.name} stands in {tensors[spec.name].file} and in {file}")
            tensors[spec.name] = spec
    if expected is not None:
        for name, file in expected.items():
            if name not in tensors or tensors[name].file != file:
                raise BadInput(f"{index}: says tensor {name} is in {file}, but it is not; download the index again")
        if unlisted := tensors.keys() - expected.keys():
            name = min(unlisted)
            raise BadInput(f"{index}: does not list tensor {name}, which is in {tensors[name].file}")
    return Checkpoint(path, tensors, metadata, stamps)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint. Raises BadInput."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is not JSON ({error}); download or copy it again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: is not a JSON object; download or copy it again")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index}: has no weight_map; download or copy it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
            raise BadInput(f"{index}: tensor {name} is in {file!r}, which is not a safetensors file of its directory")
    return weight_map


def _weight_files(path: Path) -> list[str]:
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if len(found) == 1:
        return found
    if found:
        raise BadInput(f"{path}: has {len(found)} safetensors files and no {INDEX}; download the index")
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise BadInput(
            f"{path}: holds pickled weights, which can run code when opened; convert it with transformers' "
            "save_pretrained, or take a safetensors revision"
        )
    raise BadInput(f"{path}: has no safetensors weights; check the path")
