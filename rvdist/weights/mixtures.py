"""Whether the experts of donors are stored as the base's are, and whether a mask means those of the base.

Knows names of tensors alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, layer_count
from rvdist.weights.checkpoint.difference import Difference
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.experts import layout_called, layouts
from rvdist.weights.checkpoint.layouts import called_otherwise

_TO_ONE_LAYOUT = {
    "checkpoint": "convert one of them with transformers' save_pretrained",
    "adapter": "merge it into its base with peft's merge_and_unload and use the result as vector.plus",
    "vector": "save it again from donors that are in the target's layout",
}
_BESIDE = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}


def require_one_layout(checkpoints: Sequence[Checkpoint], mask: Mask) -> None:
    """Raises BadInput where a donor has experts under names that the base, the first, has none of, or donors have such
    of each other: what the vector says of them would be skipped."""
    base, *donors = checkpoints
    for one, other in ((base, donors[0]), (base, donors[1]), (donors[0], donors[1])):
        _require_one_way(one, other, mask)
        count = layer_count(one.tensors | other.tensors)
        ours, theirs = (layouts(n for n in c.tensors if mask.coefficient(n, count)) for c in (one, other))
        for group in sorted(ours.keys() & theirs.keys()):
            own, its = ours[group], theirs[group]
            if its.keys() <= own.keys() or (one is not base and own.keys() <= its.keys()):
                continue  # an adapter may have some
            way_out = _TO_ONE_LAYOUT[other.kind if isinstance(other, Difference) else "checkpoint"]
            its_name, name = its[min(its.keys() - own.keys())], own[min(own.keys() - its.keys() or own.keys())]
            raise BadInput(
                f"{other.path}: stores its experts {layout_called(its)} ({its_name}) where {one.path} stores them "
                f"{layout_called(own)} ({name}); {way_out}, or leave the experts out by vector.mask.exclude"
            )


def _require_one_way(one: Checkpoint, other: Checkpoint, mask: Mask) -> None:
    """Raises BadInput for fused experts of which a tensor of another shape shows that the two have them transposed, and
    that the one which is alike in shape is not alike."""
    count = layer_count(one.tensors)
    for name, spec in one.tensors.items():
        stem, dot, last = name.rpartition(".")
        if last not in _BESIDE:
            continue
        beside = f"{stem}{dot}{_BESIDE[last]}"
        if beside in one.tensors and {name, beside} <= other.tensors.keys() and mask.coefficient(name, count):
            own, its = one.tensors[beside].shape, other.tensors[beside].shape
            if len(own) == 3 and own != its == (own[0], own[2], own[1]) and spec.shape == other.tensors[name].shape:
                raise BadInput(
                    f"{other.path}: has the matrices of {beside} transposed to those of {one.path}, {list(its)} where "
                    f"that has {list(own)}, and so those of {name}; {_TO_ONE_LAYOUT['checkpoint']}, or leave the "
                    "experts out by vector.mask.exclude"
                )


def check_patterns(base: Checkpoint, donors: Sequence[Checkpoint], mask: Mask) -> Iterator[str]:
    """Says which patterns of a mask match nothing. Raises BadInput for one that names what donors call their experts'
    tensors, and not what the base does: masks are matched to the base's names."""
    for key, patterns in (("include", mask.include), ("exclude", mask.exclude)):
        for pattern in patterns:
            matches = re.compile(pattern).fullmatch
            for donor in donors:
                for own, new in called_otherwise(donor):
                    if matches(own) and not matches(new):
                        raise BadInput(
                            f"mask.{key}: {pattern!r} matches {own} of {donor.path}, and not {new} of {base.path}, "
                            "which is made of it; masks are matched to the target's names: match that, or neither"
                        )
            if not any(matches(name) for name in base.tensors):
                yield f"mask.{key}: {pattern!r} matches no tensor of {base.path.name}"
