"""A checkpoint directory in the Hugging Face safetensors layout, opened by its headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

from rvdist.core.errors import BadInput, Failed
from rvdist.core.foreign import parse_json
from rvdist.core.regular import read_regular
from rvdist.weights.checkpoint.header import (
    Header,
    HubStamp,
    Stamp,
    TensorSpec,
    read_header,
    require_no_pointer,
    unreadable,
)

_MOST_JSON = 64 << 20  # bytes
INDEX = "model.safetensors.index.json"
COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")  # what stands beside weights and belongs to them
_WHOLE = "model.safetensors"
_BIN_INDEX = "pytorch_model.bin.index.json"
_MODELS = (_WHOLE, INDEX, "pytorch_model.bin", _BIN_INDEX)
_SHARD = re.compile(r"pytorch_model-\d+-of-\d+\.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_SAVE = "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained({}).save_pretrained('OUT')\""
_UNPICKLE = (  # of a model, or of a training by Lightning, whose names begin with the attribute that held the model
    'python -c "import os, sys, torch; from safetensors.torch import save_file; '
    "s = torch.load(sys.argv[1], 'cpu', weights_only=True); s = s.get('state_dict', s.get('model', s)); "
    "n = os.path.commonprefix([*s]).rfind('.') + 1; os.makedirs('OUT'); "
    "save_file({k[n:]: v.contiguous().clone() for k, v in s.items()}, 'OUT/model.safetensors')\" {quoted}, "
    "and copy config.json and the tokenizer there; torch names what else is in it, and makes none of that"
)
_BESIDE_WEIGHTS = r"(?:optimizer|scheduler|scaler|rng_state|training_args|data|extra_state)[\d_]*\."
_FOREIGN = (  # what weights in other formats are called, what they are, and what makes safetensors of them
    (r".+\.gguf", "GGUF weights, llama.cpp's and mostly quantised", _SAVE.format("'{path}', gguf_file='{file}'")),
    (r".+\.distcp", "a distributed checkpoint of PyTorch, as FSDP writes", "accelerate merge-weights '{path}' OUT"),
    (r".+\.nemo", "a NeMo archive", "NeMo's scripts/checkpoint_converters/convert_*_nemo_to_hf.py"),
    (
        r"consolidated\..*\.pth",
        "weights in Meta's own layout",
        "transformers 4's python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir '{path}' "
        "--output_dir OUT",
    ),
    (r"zero_to_fp32\.py", "a ZeRO checkpoint of DeepSpeed", "python '{path}/{file}' '{path}' OUT --safe_serialization"),
    (
        r".*(?:zero_pp|mp)_rank_\d+_.*states\.pt",
        "a part of a ZeRO checkpoint of DeepSpeed",
        "python '{path}/../zero_to_fp32.py' '{path}/..' OUT --safe_serialization",
    ),
    (rf"(?!{_BESIDE_WEIGHTS}).+\.(?:pt|pth|ckpt|bin)", "pickled weights, which can run code when opened", _UNPICKLE),
)


@dataclass(frozen=True)
class Hub:
    """A Hub repository at a commit, which cannot change. `ranged`: the weight files that are read by ranges;
    every other one is downloaded whole, at its first read, by the node that reads it."""

    repository: str
    commit: str
    ranged: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit}"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor by name in file order, and each weight file's metadata and stamp.

    With `hub`, `path` is the snapshot in the cache of the machine that opened it: small files are in it, weight
    files only where they are cached (see checkpoint.hub). `companions`: the directory below it where config and
    tokenizer are, if not in it."""

    path: Path
    tensors: dict[str, TensorSpec]
    metadata: dict[str, dict[str, str]]
    stamps: dict[str, Stamp | HubStamp] = field(repr=False)
    hub: Hub | None = None
    companions: str = field(default="", kw_only=True)

    @property
    def beside(self) -> Path:
        """Where its config and its tokenizer are."""
        return self.path / self.companions

    @property
    def files(self) -> list[str]:
        """Names of its weight files."""
        return list(self.stamps)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json; empty where there is none. Raises BadInput for a damaged one."""
        path = self.beside / "config.json"
        return read_json(path) if path.exists() else {}

    def is_unchanged(self) -> bool:
        """Whether every weight file is the one whose header was read."""
        try:
            self.require_unchanged()
        except (BadInput, Failed):
            return False
        return True

    def require_unchanged(self) -> None:
        """Raises BadInput when a weight file is no longer the one whose header was read, Failed where that cannot be
        told."""
        if self.hub:
            return
        for name, stamp in self.stamps.items():
            try:
                now = Stamp.of(self.path / name)
            except OSError as error:
                raise Failed(f"{self.path / name}: cannot be read ({error.strerror}); run again when it can") from None
            if now != stamp:
                raise BadInput(f"{self.path / name}: changed while it was being read; run again when it is at rest")


def reshard(
    tensors: Sequence[TensorSpec], nbytes: Callable[[TensorSpec], int], max_shard_size: int
) -> list[list[TensorSpec]]:
    """Tensors, in order, in groups of at most `max_shard_size` bytes; one that is larger has a group for itself."""
    shards: list[list[TensorSpec]] = [[]]
    room = max_shard_size
    for spec in tensors:
        if shards[-1] and nbytes(spec) > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(spec)
        room -= nbytes(spec)
    return shards


def shard_names(count: int, stem: str = "model") -> list[str]:
    """What the weight files of a checkpoint are called, as transformers calls them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks every header of the checkpoint in the directory `path`. Raises BadInput."""
    if path.is_file():
        if path.name not in _MODELS and not _SHARD.fullmatch(path.name):
            _refuse_foreign(path.parent, [path.name])
        raise BadInput(f"{path}: is a file; give the directory that holds it")
    if not path.is_dir():
        raise BadInput(f"{path}: no such checkpoint directory; check the path")
    entries = sorted(path.iterdir())
    for entry in entries:
        if entry.suffix in COMPANIONS and entry.is_symlink() and not entry.exists():
            raise unreadable(entry, FileNotFoundError())
    names = [entry.name for entry in entries]
    return assemble(path, names, lambda files: (read_header(path / file) for file in files))


def assemble(
    path: Path,
    names: Collection[str],
    read_headers: Callable[[Sequence[str]], Iterable[Header]],
    hub: Hub | None = None,
) -> Checkpoint:
    """The checkpoint of which `path` has the index, if there is one, out of the files that have these `names`."""
    require_model_or_adapter(path, names)
    index = path / INDEX
    expected = weight_map(index) if index.exists() else None
    if expected is not None and _WHOLE in names and _WHOLE not in expected.values():
        if left := sorted({*expected.values()} & {*names}):
            raise BadInput(
                f"{index}: lists {left[0]} and other shards, and {_WHOLE} stands beside it, which transformers would "
                "read; delete what is stale, the index with its shards or that file"
            )
        expected = None  # of an older save, whose shards are gone: transformers reads the whole file, too
    files = sorted(set(expected.values())) if expected is not None else _weight_files(path, names, hub)

    tensors: dict[str, TensorSpec] = {}
    metadata: dict[str, dict[str, str]] = {}
    stamps: dict[str, Stamp | HubStamp] = {}
    for file, (specs, metadata[file], stamps[file]) in zip(files, read_headers(files), strict=True):
        for spec in specs:
            if spec.name in tensors:
                raise BadInput(f"{path}: tensor {spec.name} stands in {tensors[spec.name].file} and in {file}")
            tensors[spec.name] = spec
    if expected is not None:
        require_listed(index, expected, tensors)
    return Checkpoint(path, tensors, metadata, stamps, hub)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint. Raises BadInput."""
    return parse_object(path, read_small(path, _MOST_JSON))


def read_small(path: Path, most: int) -> bytes:
    """A file of a checkpoint, of at most `most` bytes. Raises BadInput."""
    try:
        content = read_regular(path, most)
    except OSError as error:
        raise unreadable(path, error) from None
    require_no_pointer(path, content)
    return content


def parse_object(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object that the file at `path` holds. Raises BadInput."""
    try:
        value = parse_json(content)
    except ValueError as error:
        raise BadInput(f"{path}: is not JSON ({error}); download or copy it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: is not a JSON object; download or copy it again")
    return value


def require_listed(index: Path, expected: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> None:
    """Raises BadInput where an index and the files that it lists do not agree on their tensors."""
    for name, file in expected.items():
        if name not in tensors or tensors[name].file != file:
            raise BadInput(f"{index}: says tensor {name} is in {file}, but it is not; download the index again")
    if unlisted := tensors.keys() - expected.keys():
        name = min(unlisted)
        raise BadInput(f"{index}: does not list tensor {name}, which is in {tensors[name].file}")


def weight_map(index: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Which file of its directory, of this suffix, an index says each tensor is in. Raises BadInput."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise BadInput(f"{index}: has no weight_map; download or copy it again")
    for name, file in listed.items():
        if not isinstance(file, str) or not _is_weight_file(file, suffix):
            raise BadInput(f"{index}: tensor {name} is in {file!r}, which is not a {suffix[1:]} file of its directory")
    return listed


def require_model_or_adapter(path: Path, names: Collection[str]) -> None:
    """Raises BadInput where a model and an adapter stand together: transformers reads that adapter's own base, vLLM the
    model."""
    models, adapters = ([file for file in of if file in names] for of in (_MODELS, _ADAPTERS))
    if models and adapters and "adapter_config.json" in names:
        raise BadInput(
            f"{path}: holds a model ({models[0]}) and an adapter ({adapters[0]}), and it is not known which is meant; "
            "copy that into a directory of its own, with its config"
        )


def _is_weight_file(file: str, suffix: str) -> bool:
    return file == Path(file).name and file.endswith(suffix) and len(file) < 256 and "\0" not in file


def _refuse_foreign(path: Path, names: Collection[str], hub: Hub | None = None) -> None:
    """Raises BadInput where weights are in another format, which it names, with what converts them."""
    for pattern, what, command in _FOREIGN:
        for file in sorted(names):
            if re.fullmatch(pattern, file):
                if hub:
                    raise BadInput(
                        f"{hub}: holds {what} ({file}); take a safetensors revision, or download it whole (hf download "
                        f"{quote(hub.repository)} --revision {hub.commit} --local-dir DIR) and give DIR"
                    )
                convert = command.replace("{path}", str(path)).replace("{file}", file)
                convert = convert.replace("{quoted}", quote(str(path / file)))
                raise BadInput(f"{path}: holds {what} ({file}); take a safetensors revision, or convert it: {convert}")


def _weight_files(path: Path, names: Collection[str], hub: Hub | None) -> list[str]:
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if _WHOLE in files:
        return [_WHOLE]
    if len(files) == 1:
        return files
    if files:
        raise BadInput(f"{path}: has {len(files)} safetensors files and no {INDEX}; download the index")
    shards = sorted(filter(_SHARD.fullmatch, names))
    if shards and _BIN_INDEX not in names:
        raise BadInput(
            f"{path}: has {len(shards)} pickled shards ({shards[0]}) and no {_BIN_INDEX}; download the index, "
            "with which they are read as they stand"
        )
    _refuse_foreign(path, names, hub)
    raise BadInput(f"{path}: has no safetensors weights; check the path")
