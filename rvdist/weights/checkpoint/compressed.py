"""Checkpoints that compressed-tensors wrote: fp8 or integers, one or several to a stored element, with a scale for each
tensor, row, group or block. All schemes but symmetric ones of 4 and 8 bits are refused by name.

Facts: the package's quant_args.py (strategies), compressors/pack_quantized (the order of packed codes).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.fp8 import FP8, INT8, PACKED4, PACKED8, Kind, Scaled, quantization_of
from rvdist.weights.checkpoint.header import TensorSpec

METHOD = "compressed-tensors"
_SCALES = ("F32", "BF16", "F16")
_KINDS = {
    ("float-quantized", "float", 8): FP8, ("naive-quantized", "float", 8): FP8,
    ("int-quantized", "int", 8): INT8, ("naive-quantized", "int", 8): INT8,
    ("pack-quantized", "int", 4): PACKED4, ("pack-quantized", "int", 8): PACKED8,
}  # fmt: skip
_OF_ACTIVATIONS = re.compile(r"(.*\.)?(input|output|q|k|v)_(scale|zero_point|global_scale)")


def as_compressed(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with codes and scales put together; itself where it has none. Raises BadInput for a scheme that is
    not known."""
    said = quantization_of(checkpoint.config)
    kind, block = _scheme(checkpoint, said)
    suffix = ".weight_packed" if kind in (PACKED4, PACKED8) else ".weight"
    tensors, scales, stored, beside = dict(checkpoint.tensors), {}, {}, {}
    for name, spec in checkpoint.tensors.items():
        stem = name.removesuffix(suffix)
        scale = checkpoint.tensors.get(f"{stem}.weight_scale")
        if stem == name or scale is None:
            if _OF_ACTIVATIONS.fullmatch(name):
                beside[name] = tensors.pop(name)
            elif name.endswith((".weight_packed", ".weight_zero_point", ".weight_g_idx")) or spec.dtype.startswith(
                "F8"
            ):
                _refuse(checkpoint, f"has {name} ({spec.dtype}), which its scheme does not explain")
            continue
        for other in ("weight_zero_point", "weight_g_idx"):
            if f"{stem}.{other}" in checkpoint.tensors:
                _refuse(checkpoint, f"has {stem}.{other}: an asymmetric or reordered scheme")
        logical = f"{stem}.weight"
        if name != logical and logical in checkpoint.tensors:
            _refuse(checkpoint, f"has {logical} beside {name}, which stands for it")
        shape = _shape(checkpoint, spec, kind)
        if scale.dtype not in _SCALES or not _fits(shape, scale.shape, block):
            _refuse(
                checkpoint,
                f"has {scale.name} of shape {list(scale.shape)} and dtype {scale.dtype}, which are no scales for "
                f"{list(shape)}",
            )
        del tensors[scale.name]
        scales[logical] = scale
        if kind is not FP8:
            del tensors[name]
            tensors[logical] = TensorSpec(logical, "BF16", shape, spec.file, spec.offset)
            stored[logical] = spec
        if (size := tensors.pop(f"{stem}.weight_shape", None)) is not None:
            beside[size.name] = size
    if not scales:
        return checkpoint
    order = {name: k for k, name in enumerate(checkpoint.tensors)}
    own = {name: stored[name].name if name in stored else name for name in tensors}
    tensors = {name: tensors[name] for name in sorted(tensors, key=lambda name: order[own[name]])}
    return Scaled(
        checkpoint.path, tensors, checkpoint.metadata, checkpoint.stamps, checkpoint.hub, scales, block,
        kind=kind, stored=stored, companions_of_codes=beside, companions=checkpoint.companions,
    )  # fmt: skip


def _scheme(checkpoint: Checkpoint, said: Mapping[str, Any]) -> tuple[Kind, tuple[int, int]]:
    """What its codes are, and how many rows and columns share a scale; 0: all."""
    sparsity = said.get("sparsity_config")
    is_dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"  # which says how many zeros there are
    for key, stands in (("transform_config", False), ("sparsity_config", is_dense)):
        if said.get(key) and not stands:
            _refuse(checkpoint, f"has weights that stand for others, as the {key} of its config says")
    groups = said.get("config_groups")
    listed = list(groups.values()) if isinstance(groups, dict) else []
    schemes = [
        group["weights"] for group in listed if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    if not schemes or len(schemes) < len(listed):
        _refuse(checkpoint, "is quantised by compressed-tensors without config_groups that say how")
    keys = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "actorder")
    distinct = {str([scheme.get(key) for key in keys]) for scheme in schemes}
    scheme, form = schemes[0], said.get("format")
    bits = scheme.get("num_bits")
    kind = _KINDS.get((str(form), str(scheme.get("type")), bits if type(bits) is int else 0))
    strategy, size = scheme.get("strategy"), scheme.get("group_size")
    structure = scheme.get("block_structure")
    block: tuple[int, int] | None = {"tensor": (0, 0), "channel": (1, 0)}.get(str(strategy))
    if strategy == "group" and type(size) is int and size > 0:
        block = 1, size
    if strategy == "block" and isinstance(structure, list) and len(structure) == 2:
        block = (structure[0], structure[1]) if all(type(n) is int and n > 0 for n in structure) else None
    plain = scheme.get("symmetric") is True and not scheme.get("actorder") and len(distinct) == 1
    if not plain or kind is None or block is None:
        _refuse(
            checkpoint,
            f"is quantised by compressed-tensors as {form} ({scheme.get('num_bits')} bits, {scheme.get('type')}, "
            f"{strategy}, {'symmetric' if scheme.get('symmetric') else 'asymmetric'})",
        )
    return kind, block


def _shape(checkpoint: Checkpoint, spec: TensorSpec, kind: Kind) -> tuple[int, ...]:
    """The shape of the matrix that codes stand for."""
    expected = {FP8: "F8_E4M3", INT8: "I8"}.get(kind, "I32")
    if spec.dtype != expected or len(spec.shape) < 2:
        _refuse(checkpoint, f"has {spec.name} of dtype {spec.dtype} where its scheme has {expected}")
    shape = (*spec.shape[:-1], spec.shape[-1] * kind.codes_in(spec))
    size = checkpoint.tensors.get(f"{spec.name.removesuffix('_packed')}_shape")
    said = size is not None and size.dtype in ("I64", "I32") and size.numel == len(shape)
    if not said and (size is not None or expected == "I32"):
        _refuse(checkpoint, f"has {spec.name} without its weight_shape")
    if size is not None:
        from rvdist.weights.checkpoint.elements import read_elements

        raw, width = read_elements(checkpoint, size, 0, size.numel), 8 if size.dtype == "I64" else 4
        own = tuple(int.from_bytes(raw[k : k + width], "little", signed=True) for k in range(0, len(raw), width))
        if own != shape:
            _refuse(checkpoint, f"has {spec.name} for a shape {list(own)}, whose rows are no whole packed elements")
    return shape


def _fits(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> bool:
    """Whether scales of this shape are those of the blocks of a tensor."""
    if block == (0, 0):
        return scales in ((), (1,)) and len(shape) == 2
    count = tuple(-(-n // (size or n)) for n, size in zip(shape[-2:], block, strict=True))
    return scales == (*shape[:-2], *count) or (block[1] == 0 and scales == shape[:-1] and len(shape) == 2)


def _refuse(checkpoint: Checkpoint, what: str) -> NoReturn:
    raise BadInput(
        f"{checkpoint.path}: {what}; of compressed-tensors' schemes the symmetric ones of fp8, int8 and packed int4 "
        "and int8 are known, one a checkpoint: convert it to bfloat16 first, or take the revision that it was "
        "quantised from"
    )
