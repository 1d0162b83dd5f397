"""A checkpoint of fp8 matrices with a scale for each block: element (i, j) is fp8 · scale[i // rows, j // columns].

As DeepSeek-V3 is stored: X in F8_E4M3, X_scale_inv beside it, the size of a block in config.json
(`quantization_config.weight_block_size`). Every other quantisation is refused here, so that whatever else reads an
opened source meets only numbers it can add.
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
from rvdist.weights.checkpoint.header import TensorSpec

QUANTIZATION = "quantization_config"
_SUFFIX = "_scale_inv"
_SCALES = ("F32", "BF16", "F16")
_PACKED = re.compile(r"(.+\.)?(qweight|qzeros|weight_packed)")
_WAY_OUT = "convert it to bfloat16 first, or take the revision that it was quantised from"

Codes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Scaled(Checkpoint):
    """`tensors` has no scales: `scales` has those of each fp8 tensor, whose own spec is as it is stored. `block`: how
    many rows and columns share one."""

    scales: dict[str, TensorSpec] = field(default_factory=dict, repr=False)
    block: tuple[int, int] = (128, 128)

    @cached_property
    def owners(self) -> dict[str, str]:
        """What the scales are called → whose they are."""
        return {scale.name: name for name, scale in self.scales.items()}

    @property
    def power_of_two(self) -> bool:
        """Whether its scales are powers of two, as its config says."""
        return next(_sections(self.config), {}).get("scale_fmt") == "ue8m0"


def as_scaled(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its fp8 tensors and their scales put together; itself where it has none. Raises BadInput for
    fp8 that is scaled otherwise, and for every other quantisation."""
    quantization = next(_sections(checkpoint.config), {})
    if (method := quantization.get("quant_method", "fp8")) != "fp8":
        _refuse(checkpoint, f"is quantised by {method}")
    block: Any = quantization.get("weight_block_size")
    scales = {}
    for name, spec in checkpoint.tensors.items():
        if spec.dtype.startswith("F8"):
            scales[name] = _scale(checkpoint, spec, block)
        elif _PACKED.fullmatch(name) and not spec.is_floating_point:
            _refuse(checkpoint, f"is quantised: tensor {name} holds packed integers")
        elif name + _SUFFIX in checkpoint.tensors:
            _refuse(checkpoint, f"has the scales {name}{_SUFFIX}, and {name} is {spec.dtype}, not fp8")
    if not scales:
        return checkpoint
    own = {scale.name for scale in scales.values()}
    tensors = {name: spec for name, spec in checkpoint.tensors.items() if name not in own}
    return Scaled(
        checkpoint.path, tensors, checkpoint.metadata, checkpoint.stamps, checkpoint.hub, scales, tuple(block),
        companions=checkpoint.companions,
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


def _scale(checkpoint: Checkpoint, spec: TensorSpec, block: Any) -> TensorSpec:
    scale = checkpoint.tensors.get(spec.name + _SUFFIX)
    if scale is None or spec.dtype != "F8_E4M3":
        _refuse(checkpoint, f"stores tensor {spec.name} as {spec.dtype} without the block scales {spec.name}{_SUFFIX}")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        _refuse(checkpoint, f"stores tensor {spec.name} in fp8, and its config.json has no weight_block_size")
    blocks = (*spec.shape[:-2], *(-(-n // size) for n, size in zip(spec.shape[-2:], block, strict=False)))
    if len(spec.shape) < 2 or scale.shape != blocks or scale.dtype not in _SCALES:
        _refuse(
            checkpoint,
            f"has {scale.name} of shape {list(scale.shape)} and dtype {scale.dtype}, which are no scales for the "
            f"blocks of {block[0]} × {block[1]} of {list(spec.shape)}",
        )
    return scale


def _refuse(checkpoint: Checkpoint, what: str) -> NoReturn:
    raise BadInput(f"{checkpoint.path}: {what}, and only fp8 with a scale for each block is known; {_WAY_OUT}")


def _e4m3() -> Floats:
    """The value of each of the 256 codes: sign, 4 bits of exponent, 3 of fraction; no infinities."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, (code & 7) / 8
    size = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - 7), fraction * 2.0**-6)
    size[code & 127 == 127] = np.nan
    return np.where(code > 127, -size, size).astype(np.float32)


_E4M3 = _e4m3()


def dequantize(
    codes: Codes, scale: Floats, block: tuple[int, int], shape: tuple[int, ...], begin: int, out: Floats
) -> None:
    """Fills `out`, 1-d, with the elements of a tensor of this shape from the flat index `begin`: one fp32
    multiplication each, whatever the range. `codes` are theirs, `scale` is all of the tensor's."""
    np.take(_E4M3, codes, out=out, mode="clip")
    (height, width), (rows, columns) = shape[-2:], block
    scale = scale.reshape(-1, scale.shape[-1])
    bands = -(-height // rows)  # of blocks in one matrix
    first, end = begin, begin + len(out)
    while begin < end:
        matrix, row = divmod(begin // width, height)
        band = row // rows
        stop = min(end, (matrix * height + min(height, (band + 1) * rows)) * width)
        across = np.repeat(scale[matrix * bands + band], columns)[:width]
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
