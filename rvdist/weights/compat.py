"""May these vectors be applied to this base? A report with reasons, from headers, configs and tokenizers.

The paper asks for identical layer structure and shapes, the same vocabulary and token ids, and the same
pre-trained origin (arXiv 2509.01363, section 3). What cannot work is refused; what works with a loss is
listed. Only a few sampled kilobytes of tensor data are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rvdist.core.errors import BadInput
from rvdist.core.point import Vector, WeightPoint, layer_count
from rvdist.weights.architecture import (
    Finding,
    compare_adapter_tokens,
    compare_configs,
    compare_tokenizers,
    judge_parts,
)
from rvdist.weights.checkpoint import mxfp4
from rvdist.weights.checkpoint.adapter import EMBEDDING
from rvdist.weights.checkpoint.bound import bind
from rvdist.weights.checkpoint.difference import Difference, is_adapter, needs_base
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.elements import read_elements
from rvdist.weights.checkpoint.fp8 import MXFP4, Scaled, dequantize, unpack
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.layouts import Relaid
from rvdist.weights.checkpoint.remapped import Remapped
from rvdist.weights.checkpoint.stacked import Stacked
from rvdist.weights.checkpoint.tied import contradiction, is_tied
from rvdist.weights.coverage import LEAST, fitting_rename, measure_coverage
from rvdist.weights.heads import check_tied_head
from rvdist.weights.mixtures import check_patterns, require_one_layout
from rvdist.weights.rows import require_rows

Floats = np.ndarray[Any, np.dtype[np.float64]]
_UNMERGED = (
    "an adapter stands there beside what it adapts, and is not merged: name it by itself as vector.path (verl saves it "
    "in actor/lora_adapter), or merge it by peft's merge_and_unload"
)
_LACKS, _UNION = ", and so does the output's tokenizer", "; tokenizer=union gives it these"
Coefficient = Callable[[str], float]  # m of a tensor
REFUSED_DISTANCE = 0.9
_SAMPLED_TENSORS, _SAMPLED_BYTES = 16, 64 * 1024
_KIND = {"adapter": "an adapter", "vector": "a stored vector"}


@dataclass(frozen=True)
class Compatibility:
    """`exceptions`: what applies only in part, or was not checked, one sentence each; empty means identical.
    `refusals`: why the point must not be computed. `distances`: sampled ‖base − minus‖ / ‖base‖ a vector."""

    exceptions: tuple[str, ...]
    refusals: tuple[str, ...]
    distances: dict[Vector, float]

    @property
    def level(self) -> str:
        """refused, applies with exceptions, or identical."""
        return "refused" if self.refusals else "applies with exceptions" if self.exceptions else "identical"


def check(
    point: WeightPoint, sources: Mapping[str, Checkpoint], force: bool = False, extra_rows: bool = False
) -> Compatibility:
    """Judges every term of `point`. Raises BadInput for what arithmetic cannot do at all (another shape,
    a tensor one donor lacks, nothing left under the mask) and, unless `force`, for the first refusal.
    `extra_rows`: of a tensor that has more rows in one checkpoint than in another, those that all have count."""
    base = sources[point.base]
    if isinstance(base, Difference):
        raise BadInput(f"{base.path}: is {_KIND[base.kind]}, and a target is a whole model; name it as vector.path")
    exceptions: list[str] = []
    refusals: list[str] = []
    distances: dict[Vector, float] = {}
    for checkpoint in {sources[source].path: sources[source] for source in point.sources()}.values():
        if is_tied(checkpoint.config) is None:
            exceptions.append(
                f"{checkpoint.path.name}: {contradiction(checkpoint.config)}; no head is stored beside it"
            )
    if isinstance(stack := base.inner if isinstance(base, Remapped) else base, Stacked):
        said, refused = judge_parts(stack)
        exceptions += said
        refusals += refused
    remapped = [str(one) for source in point.sources() if isinstance(one := sources[source], Remapped)]
    exceptions += [*([str(point.vocabulary)] if remapped else []), *remapped]
    for term in point.terms:
        plus, minus = sources[term.vector.plus], sources[term.vector.minus or term.vector.plus]
        require_one_layout((base, plus, minus), term.mask)
        exceptions += check_patterns(base, (plus, minus), term.mask)
        coefficient = partial(term.mask.coefficient, layers=layer_count(base.tensors))
        exceptions += [said for one in (plus, minus) for said in check_tied_head(base, one, term.mask, coefficient)]
        exceptions += check_vector(term.vector, sources, extra_rows, coefficient)
        if term.vector.rename:
            substitutions = ", then ".join(f"{pattern} → {new}" for pattern, new in term.vector.rename)
            exceptions.append(f"the tensors of {plus.path.name} and {minus.path.name} were renamed: {substitutions}")
        exceptions += _compare_tensors(base, plus, minus, extra_rows, coefficient)
        if not any(coefficient(name) for name in base.tensors if name in plus.tensors):
            raise BadInput(f"the mask {term.mask} leaves no tensor of {base.path}; widen include, exclude or layers")
        findings = [_judge_coverage(base, plus, minus if term.vector.minus else None, coefficient)]
        for donor in (plus, minus):
            if is_adapter(donor):
                findings += [] if remapped else [compare_adapter_tokens(base, donor, coefficient)]
                continue
            findings.append(compare_configs(base, donor))
            way_out = _LACKS + _UNION * (not isinstance(donor, Difference))
            findings += [] if remapped else [compare_tokenizers(base.beside, donor.beside, way_out=way_out)]
        for said, refused in findings:
            exceptions += said
            refusals += refused
        if isinstance(minus, Difference):
            exceptions.append(_why_not_sampled(minus))
        elif term.vector not in distances:
            distance = distances[term.vector] = sampled_distance(base, minus)
            if REFUSED_DISTANCE < distance < math.inf:  # what is not finite is for whoever computes to name
                refusals.append(
                    f"{minus.path} is not from the same pre-training as {base.path}: their sampled relative distance "
                    f"is {distance:.2f} (siblings are well below {REFUSED_DISTANCE}, unrelated models near 1.41)"
                )
    require_rows(point, sources)
    report = Compatibility(tuple(dict.fromkeys(exceptions)), tuple(dict.fromkeys(refusals)), distances)
    if report.refusals and not force:
        raise BadInput(f"{report.refusals[0]}; compat.force=true applies the vector all the same")
    return report


def check_donors(vector: Vector, sources: Mapping[str, Checkpoint], force: bool = False) -> list[str]:
    """What to say of a vector alone, which is to be stored: that of `check_vector`, and whether its donors have one
    architecture and one vocabulary. Raises BadInput, unless `force`, where they have not."""
    plus, minus = sources[vector.plus], sources[vector.minus or vector.plus]
    exceptions = check_vector(vector, sources)
    if is_adapter(plus) or is_adapter(minus):
        return exceptions
    for said, refused in (
        compare_configs(minus, plus, called="vector.minus"),
        compare_tokenizers(minus.beside, plus.beside, "vector.minus"),
    ):
        exceptions += said
        if refused and not force:
            raise BadInput(f"{refused[0]}; compat.force=true stores the vector all the same")
        exceptions += refused
    return exceptions


def check_vector(
    vector: Vector,
    sources: Mapping[str, Checkpoint],
    extra_rows: bool | None = None,
    coefficient: Coefficient = lambda name: 1.0,
) -> list[str]:
    """Whether these donors make a vector, whatever it is applied to: what a user should know of it. Raises BadInput
    where they make none. `extra_rows` is as in `check`; None where there is no such choice. Tensors with a
    `coefficient` of 0 are not asked about."""
    plus = sources[vector.plus]
    if vector.minus is None:
        if not isinstance(plus, Difference):
            raise BadInput(
                f"{plus.path}: is a whole checkpoint, and vector.path wants a stored vector or an adapter; "
                "name it as vector.plus, and what it was trained from as vector.minus"
            )
        return []
    minus = sources[vector.minus]
    for donor in (plus, minus):
        if isinstance(donor, Difference) and donor.kind == "vector":
            raise BadInput(f"{donor.path}: is a stored vector, a difference already; name it alone, as vector.path")
    if isinstance(minus, Difference) and not isinstance(plus, Difference):
        raise BadInput(
            f"{minus.path}: is an adapter, and vector.plus is a whole checkpoint; merge the adapter into its base "
            "with peft's merge_and_unload and name the result as vector.minus"
        )
    for adapter in filter(needs_base, (plus, minus) if isinstance(minus, Difference) else ()):
        raise BadInput(
            f"{adapter.path}: is an adapter that needs what it was trained on, and another adapter is none; merge both "
            "into their bases with peft's merge_and_unload, and name the results"
        )
    if isinstance(minus, Difference) or not isinstance(plus, Difference):
        _require_same_tensors(plus, minus, extra_rows, coefficient)
        return []
    for name in filter(coefficient, plus.tensors.keys() & minus.tensors.keys()):
        _require_same_shape(plus.tensors[name], plus, minus, extra_rows)
    if needs_base(plus) and (missing := sorted(filter(coefficient, plus.tensors.keys() - minus.tensors.keys()))):
        raise BadInput(
            f"{minus.path}: lacks tensor {missing[0]} of the adapter {plus.path}, which needs what it was trained on; "
            "name that as vector.minus, or leave the tensor out by vector.mask.exclude"
        )
    trained_on = f" (its config names {plus.trained_on})" if plus.trained_on else ""
    return [
        f"{plus.path.name} is an adapter: {minus.path.name} is taken to be what it was trained on{trained_on}, so that "
        "the vector is the adapter's own difference",
        *_list_names("{} of the adapter's tensors are not in what it was trained on", plus, minus),
    ]


def _require_same_tensors(
    plus: Checkpoint, minus: Checkpoint, extra_rows: bool | None, coefficient: Coefficient
) -> None:
    for have, lack in ((plus, minus), (minus, plus)):
        if missing := list(filter(coefficient, have.tensors.keys() - lack.tensors.keys())):
            hint = _donors_hint(have, lack) or (
                "a vector needs two donors with the same tensors, but for those that vector.mask.exclude leaves out"
            )
            raise BadInput(f"{lack.path}: lacks tensor {min(missing)}, which {have.path} has; {hint}")
    for name in filter(coefficient, plus.tensors):
        _require_same_shape(plus.tensors[name], plus, minus, extra_rows)


def _require_same_shape(spec: TensorSpec, one: Checkpoint, other: Checkpoint, extra_rows: bool | None) -> None:
    shape = other.tensors[spec.name].shape
    only_rows = len(shape) > 0 and shape[1:] == spec.shape[1:] and extra_rows is not None
    if shape != spec.shape and not (only_rows and extra_rows):
        if only_rows and is_adapter(one) and EMBEDDING.fullmatch(spec.name) and spec.shape[0] > shape[0]:
            raise BadInput(
                f"{one.path}: has {spec.shape[0]:,} rows of {spec.name}, {spec.shape[0] - shape[0]:,} more than "
                f"{other.path}; with its tokenizer.json beside it tokenizer=union gives the output these too, or merge "
                "it into its base with peft's merge_and_unload and use the result as vector.plus"
            )
        if empty := [part.path for part, size in ((one, spec.shape), (other, shape)) if 0 in size]:
            raise BadInput(
                f"{empty[0]}: tensor {spec.name} has no elements, as a training under ZeRO-3 saves weights that "
                "are not gathered; make it anew from the training's own checkpoint, by its zero_to_fp32.py"
            )
        way_out = "; compat.extra_rows=keep changes the rows that all have, and keeps the target's others"
        raise BadInput(
            f"{other.path}: tensor {spec.name} has shape {list(shape)} where {one.path} has {list(spec.shape)}; "
            f"weight arithmetic needs equal shapes{way_out * only_rows}"
        )


def _why_not_sampled(difference: Difference) -> str:
    name = difference.path.name
    if difference.kind == "vector":
        return f"{name} is a stored vector: whether its donors and the target share a pre-training was not sampled"
    taken = "the target is taken to be that, and " * needs_base(difference)
    return (
        f"{name} is an adapter, trained on {difference.trained_on or 'a base that its config does not name'}: {taken}"
        "only tensor names and shapes were compared"
    )


def _compare_tensors(
    base: Checkpoint, plus: Checkpoint, minus: Checkpoint, extra_rows: bool, coefficient: Coefficient
) -> Iterator[str]:
    if not base.tensors.keys() & plus.tensors.keys():
        way_out = _rename_hint(base, plus.tensors) or "it belongs to another architecture"
        raise BadInput(f"{plus.path}: has no tensor in common with {base.path}; {way_out}")
    for name in base.tensors:
        if name not in plus.tensors or not coefficient(name):
            continue
        _require_same_shape(plus.tensors[name], plus, base, extra_rows)
        if not base.tensors[name].is_floating_point:
            yield f"tensor {name} is not floating-point and stays as the target has it"
            continue
        rows = {}
        for role, checkpoint in {"the target": base, "plus": plus, "minus": minus}.items():
            if spec := checkpoint.tensors.get(name):  # what an adapter was trained on may lack it
                rows[role] = spec.shape[0] if spec.shape else 1
                if not spec.is_floating_point:
                    raise BadInput(
                        f"{checkpoint.path}: tensor {name} is stored as {spec.dtype}, and in the target it is "
                        f"{base.tensors[name].dtype}; a vector needs floating-point donors"
                    )
        if len(set(rows.values())) > 1:
            counts = ", ".join(f"{role} has {count}" for role, count in rows.items())
            yield f"tensor {name}: its first {min(rows.values())} rows get the vector ({counts})"
    yield from _list_names("the vector lacks {} of the target's tensors, which stay as they are", base, plus)
    yield from _list_names("{} of the vector's tensors are not in the target and were skipped", plus, base)


def _judge_coverage(base: Checkpoint, plus: Checkpoint, minus: Checkpoint | None, coefficient: Coefficient) -> Finding:
    """What to say of a vector that is applied in part, and why one of which little is applied is refused."""
    if needs_base(plus):
        plus = bind(plus, minus or base)
    coverage = measure_coverage(base, plus, None if is_adapter(plus) else minus, coefficient)
    if coverage is None:
        return [], []
    if coverage.size is None or coverage.size >= LEAST:
        return [str(coverage)], []
    left = {n: spec for n, spec in plus.tensors.items() if coefficient(n) and n not in base.tensors}
    renaming = _rename_hint(base, left)
    way_out = f"; {renaming}" if renaming else ""
    return [str(coverage)], [f"{plus.path}: little of it fits {base.path}: {coverage}{way_out}"]


def _rename_hint(base: Checkpoint, left: Mapping[str, TensorSpec]) -> str:
    """What would make tensors of these names the base's: to merge the adapter that they are of, or the vector.rename of
    one prefix that explains them."""
    return _UNMERGED if any(".lora_A." in name for name in left) else _spell(fitting_rename(base, left))


def _donors_hint(one: Checkpoint, other: Checkpoint) -> str:
    """The same of two donors: the rename that takes a prefix away, as there are many that put before names what no
    target has."""
    pairs = [(one, other), (other, one)]
    more = [{name: spec for name, spec in have.tensors.items() if name not in lack.tensors} for have, lack in pairs]
    if any(".lora_A." in name for own in more for name in own):
        return _UNMERGED
    renames = [fitting_rename(lack, own) for (_, lack), own in zip(pairs, more, strict=True)]
    return _spell(min(filter(None, renames), key=lambda pair: len(pair[1]), default=None))


def _spell(pair: tuple[str, str] | None) -> str:
    return f'their names differ by a prefix: set vector.rename=\'[["{pair[0]}","{pair[1]}"]]\'' if pair else ""


def _list_names(sentence: str, have: Checkpoint, lack: Checkpoint) -> Iterator[str]:
    names = sorted(have.tensors.keys() - lack.tensors.keys())
    if names:
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        yield f"{sentence.format(len(names))}: {shown}"


def sampled_distance(base: Checkpoint, other: Checkpoint) -> float:
    """‖base − other‖ / ‖base‖ over samples of the largest shared tensors. About √2 for unrelated models,
    far below 1 for fine-tunes of one initialisation."""
    shared = [
        spec
        for name, spec in base.tensors.items()
        if spec.is_floating_point and name in other.tensors and other.tensors[name].is_floating_point
    ]
    matrices = [spec for spec in shared if len(spec.shape) > 1] or shared
    chosen = sorted(matrices, key=lambda spec: -spec.numel)[:_SAMPLED_TENSORS]
    difference = norm = 0.0
    numels = [min(spec.numel, other.tensors[spec.name].numel) for spec in chosen]
    with ThreadPoolExecutor(_SAMPLED_TENSORS) as pool:  # a sample from the Hub is a wait and little else
        ours_all = pool.map(lambda spec, numel: _sample(base, spec, numel), chosen, numels)
        theirs_all = pool.map(lambda spec, numel: _sample(other, other.tensors[spec.name], numel), chosen, numels)
    for ours, theirs in zip(ours_all, theirs_all, strict=True):
        count = min(len(ours), len(theirs))
        difference += float(np.square(ours[:count] - theirs[:count]).sum())
        norm += float(np.square(ours[:count]).sum())
    return math.sqrt(difference / norm) if norm else 0.0


def _sample(checkpoint: Checkpoint, spec: TensorSpec, numel: int) -> Floats:
    """Values from the middle of the first `numel` elements of a tensor. As many and the same, whatever the dtype."""
    count = min(numel, _SAMPLED_BYTES // 8)
    start = (numel - count) // 2
    if isinstance(checkpoint, Relaid | Remapped):
        import torch

        from rvdist.weights.operand import open_operand

        with closing(open_operand(checkpoint)) as operand:
            taken = operand.read(spec.name, start, start + count, torch.empty(8 * count, dtype=torch.uint8))
            values: Floats = taken.double().numpy()
            return values
    if not isinstance(checkpoint, Scaled) or spec.name not in checkpoint.scales:
        return _widen(read_elements(checkpoint, spec, start, count), spec.dtype)
    if checkpoint.kind is MXFP4:
        return mxfp4.sample(checkpoint, spec.name, start, count).astype(np.float64)
    scale, codes = checkpoint.scales[spec.name], checkpoint.codes(spec.name)
    scales = _widen(read_elements(checkpoint, scale, 0, scale.numel), scale.dtype).astype(np.float32)
    several = checkpoint.kind.codes_in(codes)
    first, last = start // several, -(-(start + count) // several)
    raw = np.frombuffer(read_elements(checkpoint, codes, first, last - first), np.uint8)
    found = np.empty(count, np.float32)
    own = unpack(raw, checkpoint.kind.bits, start - first * several, count)
    dequantize(own, scales, checkpoint.block_of(spec.name), spec.shape, start, found, checkpoint.kind)
    return found.astype(np.float64)


def _widen(raw: bytes, dtype: str) -> Floats:
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float64)
