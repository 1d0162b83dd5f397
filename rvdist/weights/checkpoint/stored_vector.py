"""A stored vector: weight files that are marked as one, and `vector.json`, which says what each tensor is stored as."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.difference import (
    BLOCK,
    FORMS,
    Dense,
    Difference,
    Form,
    LowRank,
    Packed,
    Sparse,
    stamp_beside,
)
from rvdist.weights.checkpoint.directory import Checkpoint, read_json
from rvdist.weights.checkpoint.header import MAX_RANK, TensorSpec

DESCRIPTION = "vector.json"
MARK = {"rvdist": "vector"}  # in the metadata of every weight file
VERSIONS = (1, 2)  # 2: where tensors are packed

_PARTS = {
    "dense": ("",),
    "low_rank": (".left", ".right"),
    "sparse": (".indices", ".values"),
    "packed": (".starts", ".where", ".values"),
}
_MOST_ELEMENTS = 2**48  # of a tensor, which sparse storage could claim to have
_FACTORS, _VALUES, _INDICES = ("F16", "BF16", "F32"), ("F16", "BF16", "F32", "F64"), ("I32", "I64")


def part_names(name: str, form: str) -> list[str]:
    """What the parts of tensor `name` are called in the weight files."""
    return [name + suffix for suffix in _PARTS[form]]


def is_marked(checkpoint: Checkpoint) -> bool:
    """Whether its files say that they are a stored vector."""
    return any(metadata.items() >= MARK.items() for metadata in checkpoint.metadata.values())


def as_vector(checkpoint: Checkpoint) -> Difference:
    """The stored vector whose weight files are open as `checkpoint`. Raises BadInput."""
    path = checkpoint.path / DESCRIPTION
    if not path.exists():
        raise BadInput(f"{checkpoint.path}: holds a stored vector without its {DESCRIPTION}; copy it there")
    said = read_json(path)
    try:
        if said["version"] not in VERSIONS:
            raise BadInput(f"{path}: is of version {said['version']}, which this rvdist does not know; update it")
        parts = dict(checkpoint.tensors)
        forms = {name: _form(name, entry, parts) for name, entry in said["tensors"].items()}
        if parts:
            raise ValueError(f"it does not speak of {min(parts)}")
        tensors = {name: _spec(name, said["tensors"][name], form) for name, form in forms.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path}: does not fit the weight files beside it ({error}); copy or save it again") from None
    stamps = checkpoint.stamps | {DESCRIPTION: stamp_beside(checkpoint, DESCRIPTION)}
    return Difference(checkpoint.path, tensors, checkpoint.metadata, stamps, checkpoint.hub, "vector", forms)


def _form(name: str, entry: Mapping[str, Any], parts: dict[str, TensorSpec]) -> Form:
    """Takes what tensor `name` is made of out of `parts`."""
    kind: Callable[..., Form] = FORMS[entry["form"]]
    return kind(*(parts.pop(part) for part in part_names(name, entry["form"])))


def _spec(name: str, entry: Mapping[str, Any], form: Form) -> TensorSpec:
    shape = tuple(entry["shape"])
    sound = len(shape) <= MAX_RANK and all(type(n) is int and 0 <= n <= _MOST_ELEMENTS for n in shape)
    if not sound or math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(f"tensor {name} has a negative, fractional or impossible shape")
    first, dtype = (form.left, "F32") if isinstance(form, LowRank) else (form.values, form.values.dtype)
    if not _fits(form, shape, math.prod(shape)):
        raise ValueError(f"tensor {name} has parts of other shapes or dtypes")
    return TensorSpec(name, dtype, shape, first.file, first.offset)


def _fits(form: Form, shape: tuple[int, ...], numel: int) -> bool:
    """Whether its parts can be those of a tensor of this shape, which has so many elements."""
    if isinstance(form, LowRank):
        left, right = form.left, form.right
        fits = {left.dtype, right.dtype} <= {*_FACTORS} and len(left.shape) == len(right.shape) == 2
        return fits and left.shape[1:] == right.shape[:1] and left.shape[:1] + right.shape[1:] == shape
    values = form.values
    if values.dtype not in _VALUES:
        return False
    if isinstance(form, Dense):
        return values.shape == shape
    if len(values.shape) != 1 or values.numel > numel:
        return False
    if isinstance(form, Packed):
        lengths = {"U8": -(-numel // 8), "U16": values.numel}
        starts = form.starts.dtype == "I64" and form.starts.shape == (-(-numel // BLOCK) + 1,)
        return starts and form.where.shape == (lengths.get(form.where.dtype),)
    assert isinstance(form, Sparse)  # no other is in FORMS
    return form.indices.dtype in _INDICES and form.indices.shape == values.shape
