"""What torch.save wrote, read without torch: where each tensor's bytes lie in the file. Nothing of it is run.

Raises ValueError for what is not such a file, or has tensors that are no plain range of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rvdist.weights.checkpoint.archive import Archive
from rvdist.weights.checkpoint.header import ITEMSIZE, MAX_NAME, MAX_RANK
from rvdist.weights.checkpoint.pickled import Made, Named, read_pickle

_MOST_PICKLE = 64 << 20  # bytes
_STORAGES = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32",
    "DoubleStorage": "F64", "ComplexFloatStorage": "C64",
}  # fmt: skip
DTYPES = {
    "torch.bool": "BOOL", "torch.uint8": "U8", "torch.int8": "I8", "torch.int16": "I16", "torch.int32": "I32",
    "torch.int64": "I64", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32",
    "torch.float64": "F64", "torch.complex64": "C64", "torch.uint16": "U16", "torch.uint32": "U32",
    "torch.uint64": "U64", "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_UNTYPED = "torch.storage.UntypedStorage"
_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_WITH_TYPE = "torch._tensor._rebuild_from_type_v2"
_SUBCLASS = "torch._utils._rebuild_wrapper_subclass"
_PARALLEL = ("torch.distributed.tensor", "torch.distributed._tensor", "torch.distributed._tensor.api")
_PLACED = [
    *(f"{module}.DTensor" for module in _PARALLEL),
    *(f"{module}.placement_types.{kind}" for module in _PARALLEL[:2] for kind in ("Shard", "Replicate", "Partial")),
    *(f"{module}.placement_types.{kind}" for module in _PARALLEL[:2] for kind in ("_StridedShard", "DTensorSpec")),
    *(f"{module}.placement_types.TensorMeta" for module in _PARALLEL[:2]),
    *(f"torch.distributed.tensor._dtensor_spec.{kind}" for kind in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")),
    "torch.distributed.device_mesh.DeviceMesh", "torch.distributed._mesh_layout._MeshLayout",
    "torch.distributed._mesh_layout._FlatLayout", "torch.serialization._get_layout", "torch.device",
]  # fmt: skip
ALLOWED = frozenset(
    [
        *DTYPES, *(f"torch.{storage}" for storage in _STORAGES), _UNTYPED, *_TENSOR, *_PARAMETER, _WITH_TYPE, _SUBCLASS,
        *_PLACED, "torch.Size", "torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer", "collections.OrderedDict",
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor, of a safetensors dtype, and where its bytes begin in the file, one element after the other."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds of a tensor of this shape; `mesh` is the shape of its device mesh, `shards` the dimension
    that each of the mesh's dimensions cuts, None where it holds copies."""

    local: Stored
    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    shards: tuple[int | None, ...]


class TorchFile:
    """What torch.save wrote to bytes [begin, end) of an open file, or to all of it. `value` is what it holds, as data:
    `tensor` says where a tensor in it lies."""

    def __init__(self, descriptor: int, begin: int = 0, end: int | None = None) -> None:
        self._descriptor = descriptor
        self._archive = Archive(descriptor, begin, os.fstat(descriptor).st_size if end is None else end)
        roots = [name for name in self._archive.members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("it is a zip archive, but not one of torch.save: it has no data.pkl of its own")
        self._root = roots[0].removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in self._archive.members and self._archive.bytes_of(order, 16) != b"little":
            raise ValueError("its numbers are not little-endian")
        self.value = read_pickle(self._archive.bytes_of(roots[0], _MOST_PICKLE), ALLOWED, persistent=True)
        self._place = lru_cache(None)(self._archive.place)

    def tensor(self, made: Any) -> Stored | Part | None:
        """Where a tensor of `value` lies; None for what is no tensor."""
        made = _unwrap(made)
        if not isinstance(made, Made):
            return None
        if made.of in _TENSOR:
            return self._stored(made)
        if made.of == _WITH_TYPE:
            return self._typed(made.args)
        return None

    def plain(self, made: Any) -> Stored:
        """The same of what can only be a tensor that lies here whole."""
        found = self.tensor(made)
        if not isinstance(found, Stored):
            raise ValueError("it holds something else where a tensor should be")
        return found

    def _typed(self, args: tuple[Any, ...]) -> Stored | Part:
        """A tensor with attributes, or one of which this is a part."""
        function, kind, inner, state = _several(args, 4)
        if not isinstance(function, Named) or not isinstance(kind, Named):
            raise ValueError("it has a tensor of no type")
        if function.name in _TENSOR:
            return self._stored(Made(function.name, inner))
        if function.name != _SUBCLASS or not kind.name.endswith(".DTensor"):
            raise ValueError(f"it has a tensor of type {kind.name}, which is not known")
        of = attributes_of(state)
        spec = attributes_of(of.get("_spec"))
        mesh = self._mesh(attributes_of(spec.get("mesh")))
        placements = spec.get("placements")
        if not isinstance(placements, tuple) or len(placements) != len(mesh):
            raise ValueError("it has a distributed tensor whose placement does not fit its mesh")
        shape = sizes_of(_several(inner, 3)[2])
        return Part(self.plain(of.get("_local_tensor")), shape, mesh, tuple(map(_cut_by, placements)))

    def _mesh(self, mesh: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of a device mesh whose ranks are numbered in order."""
        ranks = self.plain(mesh["mesh"] if "mesh" in mesh else mesh.get("_rank_map"))
        if ranks.dtype not in ("I32", "I64") or ranks.numel > 1 << 16:
            raise ValueError("it has a device mesh that is not known")
        size = ITEMSIZE[ranks.dtype]
        raw = os.pread(self._descriptor, ranks.numel * size, ranks.offset)
        if raw != b"".join(k.to_bytes(size, "little") for k in range(ranks.numel)):
            raise ValueError("the ranks of its device mesh are not numbered in order")
        if "mesh" in mesh:
            return ranks.shape
        layout = attributes_of(mesh.get("_layout"))
        axes = [attributes_of(axis) for axis in layout["axes"]] if isinstance(layout.get("axes"), tuple) else [layout]
        if len(axes) > MAX_RANK:
            raise ValueError("its device mesh has too many dimensions")
        shape, stride = (
            tuple(number for axis in axes for number in sizes_of(_tuple(axis.get(key))) or (1,))  # (): an axis of one
            for key in ("shape", "stride")
        )
        rows = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
        steps = [row if size == 1 else step for size, step, row in zip(shape, stride, rows, strict=False)]
        if math.prod(shape) != ranks.numel or steps != rows or len(stride) != len(shape):
            raise ValueError("it has a device mesh of another layout than rows of ranks")
        return shape

    def _stored(self, made: Made) -> Stored:
        args = made.args
        if not isinstance(args, tuple) or len(args) < 6:
            raise ValueError("it has a tensor of too few parts")
        storage, shape, strides = args[0], sizes_of(args[2]), sizes_of(args[3])
        kind, key, count = self._storage(storage)
        dtype: str | None = _STORAGES.get(kind.removeprefix("torch."))
        if made.of == _TENSOR[1]:
            dtype = DTYPES.get(args[6].name) if len(args) > 6 and isinstance(args[6], Named) else None
        if dtype is None:
            raise ValueError(f"it has a tensor of a dtype that is not known ({kind})")
        (begin,) = sizes_of((args[1],))
        name = f"{self._root}data/{key}"
        if name not in self._archive.members:
            raise ValueError(f"it lacks the storage {key[:80]}")
        numel, itemsize = math.prod(shape), ITEMSIZE[dtype]
        step = 1
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            if size > 1 and numel and stride != step:
                raise ValueError(
                    f"it has a tensor of shape {list(shape)} with strides {list(strides)}, which is not stored row by "
                    "row; save it again after contiguous()"
                )
            step *= size
        held = self._archive.members[name].size
        if (begin + numel) * itemsize > held or count * (1 if kind == _UNTYPED else itemsize) > held:
            raise ValueError(f"it has a tensor of shape {list(shape)} that is larger than its storage")
        return Stored(dtype, shape, self._place(name) + begin * itemsize)

    def _storage(self, storage: Any) -> tuple[str, str, int]:
        """Its class, its key and how many elements it has."""
        if isinstance(storage, Made) and storage.of == "storage":
            tag, kind, key, _, count = _several(storage.args, 5)
            named = isinstance(kind, Named) and isinstance(key, str) and len(key) <= MAX_NAME
            if tag == "storage" and named and type(count) is int:
                return kind.name, key, count
        raise ValueError("it has a tensor without a storage")


def _unwrap(made: Any) -> Any:
    """The tensor of a parameter."""
    for _ in range(2):
        if isinstance(made, Made) and made.of in _PARAMETER and made.args:
            made = made.args[0]
    return made


def _cut_by(placement: Any) -> int | None:
    kind = placement.of.rpartition(".")[2] if isinstance(placement, Made) else ""
    if kind == "Replicate":
        return None
    if kind == "_StridedShard":
        raise ValueError("it has strided shards, as FSDP with tensor parallelism leaves them")
    dim = attributes_of(placement).get("dim")
    if kind != "Shard" or type(dim) is not int or not 0 <= dim < MAX_RANK:
        raise ValueError(f"it has a distributed tensor placed by {kind or 'what is no placement'}")
    return dim


def attributes_of(made: Any) -> dict[Any, Any]:
    """The attributes of an object, from the state that it would be given."""
    state = made.state if isinstance(made, Made) else made
    for part in state if isinstance(state, tuple) else (state,):
        if isinstance(part, dict):
            return part
    return {}


def _tuple(value: Any) -> Any:
    return value if isinstance(value, tuple) else (value,)


def _several(args: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(args, tuple) or len(args) < count:
        raise ValueError("it has a tensor of too few parts")
    return args[:count]


def sizes_of(values: Any) -> tuple[int, ...]:
    """Sizes of a tensor. Raises ValueError where they are none."""
    if not isinstance(values, tuple) or len(values) > MAX_RANK:
        raise ValueError("it has a tensor of no shape, or of too many dimensions")
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in values) or math.prod(values) >= 1 << 62:
        raise ValueError("it has a tensor of an impossible shape")
    return values
