"""Checkpoints in MXFP4, as gpt-oss is stored: of a tensor X of experts [E, inner, outer] X_blocks has the codes
[E, outer, inner / 32, 16], two to a byte, the lower half first, and X_scales the exponents [E, outer, inner / 32] of
each 32. So an expert's matrix lies transposed, and all of its codes are needed for a row.

Facts: transformers' integrations/mxfp4.py; the OCP Microscaling Formats specification 1.0, for E2M1 and E8M0.
"""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.elements import read_elements
from rvdist.weights.checkpoint.fp8 import MXFP4, Codes, Floats, Scaled, unpack
from rvdist.weights.checkpoint.header import TensorSpec

METHOD = "mxfp4"
_BLOCK = 32  # codes that share an exponent
_BLOCKS, _SCALES = "_blocks", "_scales"
_BOUNDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)  # between one code and the next


def as_mxfp4(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with codes and exponents put together; itself where it has none. Raises BadInput."""
    tensors: dict[str, TensorSpec] = {}
    scales: dict[str, TensorSpec] = {}
    stored: dict[str, TensorSpec] = {}
    for name, spec in checkpoint.tensors.items():
        stem = name.removesuffix(_BLOCKS)
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in checkpoint.tensors:
            continue
        if stem == name:
            tensors[name] = spec
            continue
        if stem in checkpoint.tensors:
            _refuse(checkpoint, f"has {stem} beside {name}, which stands for it")
        scale = checkpoint.tensors.get(stem + _SCALES)
        if scale is None or spec.dtype != "U8" or scale.dtype != "U8":
            _refuse(checkpoint, f"has {name} ({spec.dtype}) without exponents in U8, {stem}{_SCALES}")
        if len(spec.shape) != 4 or spec.shape[-1] != _BLOCK // 2 or scale.shape != spec.shape[:-1]:
            _refuse(checkpoint, f"has {name} of shape {list(spec.shape)} and {scale.name} of {list(scale.shape)}")
        experts, outer, blocks, _ = spec.shape
        tensors[stem] = TensorSpec(stem, "BF16", (experts, blocks * _BLOCK, outer), spec.file, spec.offset)
        stored[stem], scales[stem] = spec, scale
    if not scales:
        return checkpoint
    return Scaled(
        checkpoint.path, tensors, checkpoint.metadata, checkpoint.stamps, checkpoint.hub, scales, (_BLOCK, 1),
        kind=MXFP4, stored=stored, companions=checkpoint.companions,
    )  # fmt: skip


def meaning(codes: Codes, exponents: Codes) -> Floats:
    """What codes, a byte each, mean: some whole blocks of an expert, [outer, inner]."""
    values = np.take(MXFP4.values, codes)
    values.reshape(*exponents.shape, _BLOCK)[...] *= factor(exponents)[..., None]
    return values


def sample(checkpoint: Scaled, name: str, start: int, count: int) -> Floats:
    """Some elements of a tensor, in their own order; reads all of their experts."""
    shape, codes, scale = checkpoint.tensors[name].shape, checkpoint.codes(name), checkpoint.scales[name]
    sizes = [part.numel // shape[0] for part in (codes, scale)]
    first, last = start // math.prod(shape[1:]), -(-(start + count) // math.prod(shape[1:]))
    inner, outer = shape[1:]
    found = []
    for number in range(first, last):
        raw = [read_elements(checkpoint, part, number * n, n) for part, n in zip((codes, scale), sizes, strict=True)]
        single = unpack(np.frombuffer(raw[0], np.uint8), 4, 0, inner * outer).reshape(outer, inner)
        found.append(meaning(single, np.frombuffer(raw[1], np.uint8).reshape(outer, -1)).T.reshape(-1))
    offset = start - first * math.prod(shape[1:])
    return np.concatenate(found)[offset : offset + count]


def factor(exponents: Codes) -> Floats:
    """2 to the power of each: E8M0, in which 255 is no number."""
    power = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    return np.where(exponents == 255, np.float32(np.nan), power).astype(np.float32)


def encode_expert(values: Floats, before: Floats, codes: Codes, exponents: Codes) -> tuple[Codes, Codes]:
    """Codes, a byte each, and exponents of some whole blocks of an expert, [outer, inner]. Blocks that are as `before`
    keep theirs; another gets the least exponent with which nothing is cut off, and the nearest codes, the even of
    two."""
    shape = (*exponents.shape, _BLOCK)
    touched = (values != before).reshape(shape).any(-1)
    if not touched.any():
        return codes, exponents
    largest = np.abs(values).reshape(shape).max(-1)
    fraction, power = np.frexp(largest / np.float32(MXFP4.largest))
    power = np.clip(np.where(fraction == 0.5, power - 1, power), -127, 127)
    chosen = np.where(touched & (largest > 0), power + 127, exponents).astype(np.uint8)
    scaled = values.reshape(shape) / factor(chosen)[..., None]
    size = np.abs(scaled)
    low = np.searchsorted(_BOUNDS, size, side="left")
    even = low + ((low % 2 == 1) & (size == _BOUNDS[np.minimum(low, 6)]))
    fresh = (even | np.where(scaled < 0, 8, 0)).astype(np.uint8)
    return np.where(touched[..., None], fresh, codes.reshape(shape)).reshape(values.shape), chosen


def _refuse(checkpoint: Checkpoint, what: str) -> NoReturn:
    raise BadInput(
        f"{checkpoint.path}: is quantised by mxfp4 and {what}, which is not as gpt-oss is stored; convert it to "
        "bfloat16 first, or take the revision that it was quantised from"
    )
