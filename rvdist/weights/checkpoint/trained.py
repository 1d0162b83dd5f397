"""Checkpoints as trainings leave them, opened where they are: pickled weights (`pytorch_model.bin`), directories of
torch.distributed.checkpoint (`.distcp`), verl's shard a rank; and directories of several checkpoints, of which one has
to be named. Nothing is unpickled (checkpoint.pickled).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from rvdist.core.errors import BadInput
from rvdist.core.regular import open_regular, read_regular
from rvdist.weights.checkpoint.directory import (
    Checkpoint,
    read_json,
    require_listed,
    require_model_or_adapter,
    weight_map,
)
from rvdist.weights.checkpoint.header import (
    MAX_NAME,
    MAX_TENSORS,
    HubStamp,
    Stamp,
    TensorSpec,
    require_no_pointer,
    unreadable,
)
from rvdist.weights.checkpoint.pickled import Made, Named, read_pickle
from rvdist.weights.checkpoint.pieces import Piece, assembled
from rvdist.weights.checkpoint.torch_file import DTYPES, Part, Stored, TorchFile, attributes_of, sizes_of

_WHOLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_model.bin"
_METADATA, _MOST_METADATA = ".metadata", 64 << 20  # bytes
_SHARDED_DIRECTORY = "pytorch_model_fsdp_0"  # as accelerate calls it, within a checkpoint
_RANK = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")
_STEP = re.compile(r"(?:checkpoint-|global_step_?|step-)(\d+)")
_MEGATRON = re.compile(r"dist_ckpt|mp_rank_\d\d(_\d{3})*|iter_\d{7}|model_optim_rng\.pt")
_MODEL = ("model", "state_dict", "module", "app")  # what the part of a saved state is called that is the model's
_DCP = "torch.distributed.checkpoint"
_ALLOWED = frozenset(
    [
        *(
            f"{_DCP}.metadata.{name}"
            for name in (
                "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
                "BytesStorageMetadata", "_MEM_FORMAT_ENCODING", "StorageMeta",
            )
        ),
        f"{_DCP}.filesystem._StorageInfo", "torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath",
        "pathlib._local.PosixPath", "collections.OrderedDict", *DTYPES,
    ]
)  # fmt: skip
_MERGERS = {
    "verl": "python -m verl.model_merger merge --backend fsdp --local_dir '{path}' --target_dir OUT",
    "distcp": "accelerate merge-weights '{path}' OUT",
    "bin": "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{path}', dtype='auto')."
    "save_pretrained('OUT')\"",
}


def open_trained(path: Path) -> Checkpoint | None:
    """The checkpoint in a directory that has no safetensors weights; None where it is no such. Raises BadInput."""
    if not path.is_dir():
        return None
    names = {entry.name for entry in path.iterdir()}
    if any(name.endswith(".safetensors") for name in names):
        return None
    _refuse_megatron(path, names)
    require_model_or_adapter(path, names)
    if ADAPTER in names and "adapter_config.json" in names:
        return _open_bins(path, [ADAPTER])
    if _INDEX in names or _WHOLE in names:
        listed = weight_map(path / _INDEX, ".bin") if _INDEX in names else None
        if listed and _WHOLE in names and _WHOLE not in listed.values():
            if left := sorted({*listed.values()} & names):
                raise BadInput(
                    f"{path / _INDEX}: lists {left[0]} and other shards, and {_WHOLE} stands beside it, which "
                    "transformers would read; delete what is stale, the index with its shards or that file"
                )
            listed = None  # of an older save, whose shards are gone
        return _open_bins(path, sorted(set(listed.values())) if listed else [_WHOLE], listed)
    if _METADATA in names and any(name.endswith(".distcp") for name in names):
        return _open_distributed(path, "")
    if (path / _SHARDED_DIRECTORY / _METADATA).is_file():
        return _open_distributed(path, f"{_SHARDED_DIRECTORY}/")
    if any(map(_RANK.fullmatch, names)):
        return _open_ranks(path, names)
    _refuse_many(path, names)
    return None


# --- pytorch_model.bin


def _open_bins(path: Path, files: Iterable[str], listed: Mapping[str, str] | None = None) -> Checkpoint:
    """The tensors of these files; `listed` is what their index says."""
    tensors: dict[str, TensorSpec] = {}
    stamps: dict[str, Stamp | HubStamp] = {}
    for file in files:
        with _opened(path / file, "bin") as (descriptor, stamps[file]):
            opened = TorchFile(descriptor)
            for name, made in _state(opened).items():
                if name in tensors:
                    raise ValueError(f"tensor {name} stands in {tensors[name].file} too")
                found = opened.tensor(made)
                if not isinstance(found, Stored):
                    raise ValueError(f"it holds something else than a whole tensor under the name {name[:80]}")
                tensors[name] = TensorSpec(name, found.dtype, found.shape, file, found.offset)
    if listed is not None:
        require_listed(path / _INDEX, listed, tensors)
    return Checkpoint(path, tensors, {file: {} for file in files}, stamps)


def _state(opened: TorchFile) -> dict[str, Any]:
    """The tensors of a file that holds a model's, by name."""
    state = opened.value
    if isinstance(state, dict) and not any(isinstance(value, Made) for value in state.values()):
        state = next((state[key] for key in _MODEL if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state or len(state) > MAX_TENSORS:
        raise ValueError("it holds no model's tensors by name")
    for name in state:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise ValueError("it has a tensor without a name, or with a name beyond measure")
        name.encode()  # half a surrogate raises
    return state


# --- torch.distributed.checkpoint


def _open_distributed(path: Path, below: str) -> Checkpoint:
    """The model's tensors; what an optimizer or a trainer keeps beside them is left alone."""
    where = path / below / _METADATA
    try:
        raw = read_regular(where, _MOST_METADATA)
    except OSError as error:
        raise unreadable(where, error) from None
    pieces: dict[str, list[Piece]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    wanted: dict[str, list[tuple[int, int, str, Piece]]] = {}  # of each file: from, to, the tensor, its piece
    with _explained(where, "distcp"):
        said = attributes_of(read_pickle(raw, _ALLOWED))
        stored = _places(said.get("storage_data"))
        for saved, name in _names(said).items():
            about = attributes_of(said["state_dict_metadata"][saved])
            dtype, shape = _dtype(about.get("properties")), sizes_of(about.get("size"))
            kinds[name], pieces[name] = (dtype, shape), []
            for chunk in map(attributes_of, about.get("chunks") or ()):
                begin, size = sizes_of(chunk.get("offsets")), sizes_of(chunk.get("sizes"))
                if len(begin) != len(shape) or len(size) != len(shape) or (saved, begin) not in stored:
                    raise ValueError(f"it does not say where a piece of tensor {name} is")
                file, first, last = stored[saved, begin]
                wanted.setdefault(below + file, []).append((first, last, name, Piece(begin, size, below + file, 0)))
    stamps: dict[str, Stamp | HubStamp] = {}
    for file in sorted(wanted):
        with _opened(path / file, "distcp") as (descriptor, stamps[file]):
            after = 0
            for first, last, name, piece in sorted(wanted[file], key=lambda one: one[:2]):
                if last > stamps[file].size:
                    raise ValueError(f"it ends inside tensor {name}; copy it again")
                if first < after:  # each is read by itself: many of the same bytes would take for ever
                    raise ValueError(f"its pieces overlap at tensor {name}")
                after = last
                opened = TorchFile(descriptor, first, last)
                found = opened.plain(opened.value)
                if (found.dtype, found.shape) != (kinds[name][0], piece.shape):
                    raise ValueError(f"its piece of tensor {name} is not what {_METADATA} says")
                pieces[name].append(Piece(piece.begin, piece.shape, file, found.offset))
    with _explained(where, "distcp"):
        tensors = {name: assembled(name, *kinds[name], pieces[name]) for name in pieces}
    stamps[below + _METADATA] = Stamp.of(where)
    return Checkpoint(path, tensors, {file: {} for file in wanted}, stamps)


def _names(said: Mapping[str, Any]) -> dict[str, str]:
    """The model's tensors: what each is saved as, and its name. A state of several parts says what its parts are."""
    metadata, paths = said.get("state_dict_metadata"), said.get("planner_data")
    if not isinstance(metadata, dict) or not metadata or len(metadata) > MAX_TENSORS:
        raise ValueError("it lists no tensors")
    ways: dict[str, tuple[str, ...]] = {}
    for saved, about in metadata.items():
        if not isinstance(about, Made) or not about.of.endswith(".TensorStorageMetadata"):
            continue
        if not isinstance(saved, str) or not 0 < len(saved) <= MAX_NAME:
            raise ValueError("it has a tensor without a name, or with a name beyond measure")
        saved.encode()
        way = paths.get(saved) if isinstance(paths, dict) else None
        known = isinstance(way, tuple) and way and all(isinstance(part, str | int) for part in way)
        ways[saved] = tuple(map(str, way or ())) if known else (saved,)
    for depth in range(2):  # below the first, where that has names of tensors: else it is a tree of modules
        of_model = {saved: way[1:] for saved, way in ways.items() if len(way) > 1 and way[0] in _MODEL}
        if of_model and (depth == 0 or any("." in way[-1] for way in of_model.values())):
            ways = of_model
    if any(len(way) == 1 and "." in way[0] for way in ways.values()):  # the model's stand beside parts, as torchtitan's
        ways = {saved: way for saved, way in ways.items() if len(way) == 1}
    names = {saved: ".".join(way) for saved, way in ways.items()}
    if not names:
        raise ValueError("it lists no tensors")
    if len({*names.values()}) < len(names):
        raise ValueError("it has two tensors of one name")
    return names


def _places(storage: Any) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """(what a tensor is saved as, where its piece begins) → file, from, to."""
    places = {}
    for key, value in storage.items() if isinstance(storage, dict) else ():
        index, info = attributes_of(key), attributes_of(value)
        file, first, size = (info.get(part) for part in ("relative_path", "offset", "length"))
        if not isinstance(index.get("fqn"), str) or index.get("offset") is None:
            continue  # no tensor
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".distcp") or "\0" in file:
            raise ValueError(f"it says that tensors are in {file!r}, which is no .distcp file of its directory")
        file.encode()  # half a surrogate raises
        if type(first) is not int or type(size) is not int or first < 0 or size < 0:
            raise ValueError("it has a piece of no place")
        if info.get("transform_descriptors"):
            raise ValueError("its pieces were compressed or encrypted when they were saved")
        places[index["fqn"], sizes_of(index["offset"])] = (file, first, first + size)
    return places


def _dtype(properties: Any) -> str:
    state = properties.state if isinstance(properties, Made) else None
    first = state[0] if isinstance(state, tuple) and state else attributes_of(properties).get("dtype")
    if not isinstance(first, Named) or first.name not in DTYPES:
        raise ValueError("it has a tensor of a dtype that is not known")
    return DTYPES[first.name]


# --- verl's shards


def _open_ranks(path: Path, names: Collection[str]) -> Checkpoint:
    found = sorted((match for name in names if (match := _RANK.fullmatch(name))), key=lambda m: int(m[2]))
    worlds = {int(match[1]) for match in found}
    world = min(worlds)
    if len(worlds) > 1 or [int(match[2]) for match in found] != list(range(world)):
        raise BadInput(
            f"{path}: has {len(found)} shards (model_world_size_N_rank_R.pt) where each of {world} ranks saved one; "
            "copy those of one save, all of them"
        )
    pieces: dict[str, list[Piece]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    stamps: dict[str, Stamp | HubStamp] = {}
    for rank, file in enumerate(match[0] for match in found):
        with _opened(path / file, "verl") as (descriptor, stamps[file]):
            opened = TorchFile(descriptor)
            state = _state(opened)
            if rank and state.keys() != pieces.keys():
                raise ValueError("it has other tensors than the shard of rank 0")
            for name, made in state.items():
                part = opened.tensor(made)
                if part is None:
                    raise ValueError(f"it holds something else than a tensor under the name {name[:80]}")
                local, shape = (part.local, part.shape) if isinstance(part, Part) else (part, part.shape)
                if kinds.setdefault(name, (local.dtype, shape)) != (local.dtype, shape):
                    raise ValueError(f"its tensor {name} has another dtype or shape than rank 0's")
                piece = _piece(part, rank, world, file)
                pieces.setdefault(name, []).extend([piece] if piece else [])
    with _explained(path, "verl"):
        tensors = {name: assembled(name, *kinds[name], pieces[name]) for name in pieces}
    beside = "huggingface" if (path / "huggingface" / "config.json").is_file() and "config.json" not in names else ""
    return Checkpoint(path, tensors, {file: {} for file in stamps}, stamps, companions=beside)


def _piece(part: Part | Stored, rank: int, world: int, file: str) -> Piece | None:
    """What a rank holds, as FSDP cuts: each dimension of the mesh in turn, in pieces of one size but the last; None
    where another rank holds the same."""
    if isinstance(part, Stored):
        return None if rank else Piece((0,) * len(part.shape), part.shape, file, part.offset)
    if math.prod(part.mesh) != world:
        raise ValueError(f"its mesh has {math.prod(part.mesh)} ranks, and the file says {world}")
    begin, end = [0] * len(part.shape), list(part.shape)
    copy = False
    for k, (size, dim) in enumerate(zip(part.mesh, part.shards, strict=True)):
        at = rank // math.prod(part.mesh[k + 1 :]) % size
        if dim is None:
            copy = copy or at > 0
            continue
        if dim >= len(part.shape):
            raise ValueError("it has a distributed tensor that is cut in a dimension that it has not")
        step = -(-(end[dim] - begin[dim]) // size)
        begin[dim], end[dim] = (
            min(begin[dim] + at * step, end[dim]),
            min(begin[dim] + (at + 1) * step, end[dim]),
        )
    shape = tuple(last - first for first, last in zip(begin, end, strict=True))
    if shape != part.local.shape:
        raise ValueError(
            f"it holds {list(part.local.shape)} of a tensor where FSDP's cuts give rank {rank} {list(shape)}"
        )
    return None if copy else Piece(tuple(begin), shape, file, part.local.offset)


# --- directories of several


def _refuse_many(path: Path, names: Collection[str]) -> None:
    """Raises BadInput for an output directory of a trainer that holds checkpoints: it is for the user to say which."""
    steps = sorted((int(match[1]), name) for name in names if (match := _STEP.fullmatch(name)))
    steps = [(step, name) for step, name in steps if (path / name).is_dir()]
    if "zero_to_fp32.py" in names:
        return  # what stands there is one checkpoint, by rank
    if not steps:
        if (path / "actor").is_dir():
            raise BadInput(f"{path}: is a step of verl's, of several models; name one of them, as {path / 'actor'}")
        return
    shown = ", ".join(name for _, name in steps[:20]) + (", …" if len(steps) > 20 else "")
    last = steps[-1][1]
    best = ""
    with suppress(BadInput):
        said = read_json(path / last / "trainer_state.json").get("best_model_checkpoint")
        if isinstance(said, str) and Path(said).name in {name for _, name in steps}:
            best = f", and {Path(said).name} is its best as {last}/trainer_state.json says"
    inner = "/actor" if (path / last / "actor").is_dir() else ""
    raise BadInput(
        f"{path}: is a training's directory of {len(steps)} checkpoints ({shown}) and has no weights of its own; "
        f"{last} is its last{best}; name one of them, as {path / last}{inner}"
    )


def _refuse_megatron(path: Path, names: Collection[str]) -> None:
    """Raises BadInput for what Megatron saved, by rank or as its own kind of distributed checkpoint."""
    distributed = {"common.pt", "metadata.json"} <= {*names} and (_METADATA in names or ".zmetadata" in names)
    if distributed or any(map(_MEGATRON.fullmatch, names)):
        actor = path.parent if path.name == "dist_ckpt" else path  # as verl has it
        raise BadInput(
            f"{path}: is a checkpoint of Megatron, whose tensors have other names and hold other parts together than a "
            "target's; export it first, by Megatron-Bridge's AutoBridge (export_ckpt) or "
            f"python -m verl.model_merger merge --backend megatron --local_dir '{actor}' --target_dir OUT"
        )


# --- what all share


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[int, Stamp]]:
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        with _explained(path, kind):
            require_no_pointer(path, os.pread(descriptor, 16, 0))
            yield descriptor, Stamp.of(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        _refuse(path, str(error), kind)
    except (
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
    ) as error:  # of what is not what it stands for
        _refuse(path, f"it is damaged: {error}", kind)


def _refuse(path: Path, why: str, kind: str) -> NoReturn:
    convert = _MERGERS[kind].replace("{path}", str(path if kind == "verl" and path.is_dir() else path.parent))
    raise BadInput(
        f"{path}: cannot be read without running it ({why}); download or copy it again, or convert it where you trust "
        f"it: {convert}"
    )
