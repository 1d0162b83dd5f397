"""A checkpoint of fp8 matrices with a scale for each block: element (i, j) is fp8 · scale[i // rows, j // columns].

As DeepSeek-V3 is stored: X in F8_E4M3, X_scale_inv beside it, the size of a block in config.json
(`quantization_config.weight_block_size`). Where that has none a matrix has one scale, X_scale_inv as Mistral 3 or
X_scale as AutoFP8 stores it; scales of activations may stand beside. Every other quantisation is refused here, so that
whatever else reads an opened source meets only numbers it can add.

Facts: transformers' integrations/finegrained_fp8.py, vLLM's quantization/fp8.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import ITEMSIZE, TensorSpec

QUANTIZATION, METHOD = "quantization_config", "fp8"
_SUFFIX, _OF_TENSORS = "_scale_inv", "_scale"
_SCALES = ("F32", "BF16", "F16")
_OF_ACTIVATIONS = re.compile(r"(.+)[._](?:activation|input|output)_scale|(?:.*\.)?(?:q|k|v|kv)_scale")
_PACKED = re.compile(r"(.+\.)?(qweight|qzeros|weight_packed)")
_KNOWN = (
    "of quantised weights fp8 with scales of blocks or matrices, compressed-tensors' symmetric fp8, int8 and int4, and "
    "gpt-oss' MXFP4 are known"
)
_WAY_OUT = "convert it to bfloat16 first, or take the revision that it was quantised from"

Codes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class Kind:
    """What codes are: `bits` each, of these `values`; a block whose largest element is `largest` has the scale 1."""

    name: str
    bits: int
    values: Floats
    largest: float

    def codes_in(self, spec: TensorSpec) -> int:
        """How many codes an element has as it is stored."""
        return ITEMSIZE[spec.dtype] * 8 // self.bits

    def __reduce__(self) -> tuple[Any, ...]:
        return _kind, (self.name,)  # there is one of each in a process


def _kind(name: str) -> Kind:
    return next(kind for kind in (FP8, INT8, PACKED8, PACKED4, MXFP4) if kind.name == name)


def _e4m3() -> Floats:
    """The value of each of the 256 codes: sign, 4 bits of exponent, 3 of fraction; no infinities."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, (code & 7) / 8
    size = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - 7), fraction * 2.0**-6)
    size[code & 127 == 127] = np.nan
    return np.where(code > 127, -size, size).astype(np.float32)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP8 = Kind("fp8", 8, _e4m3(), 448.0)
INT8 = Kind("int8", 8, np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32), 127.5)
PACKED8 = Kind("packed int8", 8, np.arange(-128, 128, dtype=np.float32), 127.5)
MXFP4 = Kind("mxfp4", 4, _E2M1, 6.0)
PACKED4 = Kind("packed int4", 4, np.arange(-8, 8, dtype=np.float32), 7.5)


@dataclass(frozen=True)
class Scaled(Checkpoint):
    """`tensors` has no scales: `scales` has those of each quantised tensor. `block`: how many rows and columns share
    one; 0: all. `kind`: what the codes are; `stored`: where they are, if not under the tensor's own name and dtype;
    `companions_of_codes`: what else describes them."""

    scales: dict[str, TensorSpec] = field(default_factory=dict, repr=False)
    block: tuple[int, int] = (128, 128)
    kind: Kind = field(default=FP8, kw_only=True)
    stored: dict[str, TensorSpec] = field(default_factory=dict, repr=False, kw_only=True)
    companions_of_codes: dict[str, TensorSpec] = field(default_factory=dict, repr=False, kw_only=True)

    def codes(self, name: str) -> TensorSpec:
        """A quantised tensor as it is stored."""
        return self.stored.get(name) or self.tensors[name]

    def block_of(self, name: str) -> tuple[int, int]:
        """How many rows and columns of a tensor share a scale."""
        height, width = self.tensors[name].shape[-2:]
        return min(self.block[0], height) or height, min(self.block[1], width) or width

    @cached_property
    def owners(self) -> dict[str, str]:
        """What the scales are called → whose they are."""
        return {scale.name: name for name, scale in self.scales.items()}

    @cached_property
    def coded(self) -> dict[str, str]:
        """What codes are called → which tensor's they are."""
        return {self.codes(name).name: name for name in self.scales}

    @property
    def power_of_two(self) -> bool:
        """Whether its scales are powers of two, as its config says."""
        return quantization_of(self.config).get("scale_fmt") == "ue8m0"


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config, at the top or in the config of a tower; empty where there is none."""
    return next(_sections(config), {})


def as_scaled(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its fp8 tensors and their scales put together; itself where it has none. Raises BadInput for
    fp8 that is scaled otherwise, and for every other quantisation."""
    quantization = quantization_of(checkpoint.config)
    if (method := quantization.get("quant_method", METHOD)) != METHOD:
        _refuse(checkpoint, f"is quantised by {method}")
    block: Any = quantization.get("weight_block_size")
    if block is None and "quant_method" in quantization:
        block = 0, 0
    scales = {}
    for name, spec in checkpoint.tensors.items():
        suffixes = (_SUFFIX, _OF_TENSORS) if block == (0, 0) or spec.dtype.startswith("F8") else (_SUFFIX,)
        found = [scale for suffix in suffixes if (scale := checkpoint.tensors.get(name + suffix))]
        if spec.dtype.startswith("F8"):
            scales[name] = _scale(checkpoint, spec, found, block)
        elif _PACKED.fullmatch(name) and not spec.is_floating_point:
            _refuse(checkpoint, f"is quantised: tensor {name} holds packed integers")
        elif f"{name}_scale" in checkpoint.tensors and not spec.is_floating_point:
            _refuse(checkpoint, f"is quantised: tensor {name} ({spec.dtype}) has the scales {name}_scale")
        elif found:
            _refuse(checkpoint, f"has the scales {found[0].name}, and {name} is {spec.dtype}, not fp8")
    if not scales:
        return checkpoint
    own = {scale.name for scale in scales.values()}
    tensors = {name: spec for name, spec in checkpoint.tensors.items() if name not in own}
    beside = {name: tensors.pop(name) for name in list(tensors) if _scales_activations(tensors[name], scales)}
    return Scaled(
        checkpoint.path, tensors, checkpoint.metadata, checkpoint.stamps, checkpoint.hub, scales, tuple(block),
        companions_of_codes=beside, companions=checkpoint.companions,
    )  # fmt: skip


def _sections(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every quantization_config, at the top or in the config of a tower."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from [value] if key == QUANTIZATION else _sections(value)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model when its weights are plain numbers."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != QUANTIZATION
    }


def _scale(checkpoint: Checkpoint, spec: TensorSpec, found: list[TensorSpec], block: Any) -> TensorSpec:
    """Of the tensors that are called as its scales are, the only one, which must be that."""
    each = "tensor" if block == (0, 0) else "block"
    if spec.dtype != "F8_E4M3":
        _refuse(checkpoint, f"stores tensor {spec.name} as {spec.dtype}, not as F8_E4M3")
    if not found or (block != (0, 0) and found[0].name != spec.name + _SUFFIX):
        _refuse(checkpoint, f"stores tensor {spec.name} as {spec.dtype} without the {each} scales {spec.name}{_SUFFIX}")
    if len(found) > 1:
        _refuse(checkpoint, f"has both {found[0].name} and {found[1].name}")
    (scale,) = found
    if block == (0, 0):
        alone = [(), (1,)] if len(spec.shape) == 2 else []
        fits = len(spec.shape) > 1 and scale.shape in [*alone, (*spec.shape[:-2], 1, 1)]
        blocks = "whole matrices (config.json has no weight_block_size)"
    elif isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        counts = tuple(-(-n // size) for n, size in zip(spec.shape[-2:], block, strict=False))
        fits = len(spec.shape) > 1 and scale.shape == (*spec.shape[:-2], *counts)
        blocks = f"blocks of {block[0]} × {block[1]}"
    else:
        _refuse(checkpoint, f"stores tensor {spec.name} in fp8, and its config.json has no weight_block_size")
    if not fits or scale.dtype not in _SCALES:
        _refuse(
            checkpoint,
            f"has {scale.name} of shape {list(scale.shape)} and dtype {scale.dtype}, which are no scales for the "
            f"{blocks} of {list(spec.shape)}",
        )
    return scale


def _scales_activations(spec: TensorSpec, scales: Mapping[str, TensorSpec]) -> bool:
    """Whether a tensor scales what goes into or out of one of these, or what is kept of keys and values."""
    found = _OF_ACTIVATIONS.fullmatch(spec.name)
    if not found or found[1] is None:
        return found is not None and spec.numel == 1
    return found[1] in scales or f"{found[1]}.weight" in scales


def _refuse(checkpoint: Checkpoint, what: str) -> NoReturn:
    raise BadInput(f"{checkpoint.path}: {what}; {_KNOWN}; {_WAY_OUT}")


def unpack(raw: Codes, bits: int, skip: int, count: int) -> Codes:
    """`count` codes, a byte each, out of bytes of which the first `skip` codes are not asked for."""
    if bits == 8:
        return raw[skip : skip + count]
    pairs = np.empty((len(raw), 2), np.uint8)
    np.bitwise_and(raw, 15, out=pairs[:, 0])
    np.right_shift(raw, 4, out=pairs[:, 1])
    return pairs.reshape(-1)[skip : skip + count]


def pack(codes: Codes, bits: int) -> Codes:
    """The bytes that codes are stored as."""
    return codes if bits == 8 else np.bitwise_or(codes[::2], np.left_shift(codes[1::2], np.uint8(4)))


def dequantize(
    codes: Codes,
    scale: Floats,
    block: tuple[int, int],
    shape: tuple[int, ...],
    begin: int,
    out: Floats,
    kind: Kind = FP8,
    above: int = 0,
) -> None:
    """Fills `out`, 1-d, with the elements of a tensor of this shape from the flat index `begin`: one fp32
    multiplication each, whatever the range. `codes` are theirs, `scale` is the tensor's, without those of so many rows
    of blocks `above`."""
    np.take(kind.values, codes, out=out, mode="clip")
    (height, width), (rows, columns) = shape[-2:], block
    scale = scale.reshape(-1, -(-width // columns))
    bands = -(-height // rows)  # of blocks in one matrix
    first, end = begin, begin + len(out)
    while begin < end:
        matrix, row = divmod(begin // width, height)
        band = row // rows
        stop = min(end, (matrix * height + min(height, (band + 1) * rows)) * width)
        across = np.repeat(scale[matrix * bands + band - above], columns)[:width]
        _scale_rows(out[begin - first : stop - first], across, begin % width)
        begin = stop


def _scale_rows(values: Floats, across: Floats, column: int) -> None:
    """Multiplies rows that lie one after the other, the first of which begins at `column`, by the same scales."""
    width = len(across)
    head = min(len(values), (width - column) % width)
    whole = (len(values) - head) // width * width
    values[:head] *= across[column : column + head]
    rows = values[head : head + whole].reshape(-1, width)
    rows *= across
    tail = values[head + whole :]
    tail *= across[: len(tail)]
