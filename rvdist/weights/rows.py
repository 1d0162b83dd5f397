"""What methods that see whole rows ask of a tensor: a row fits into a chunk, and all sources have all of it."""

from __future__ import annotations

from collections.abc import Mapping

from rvdist.core.errors import BadInput
from rvdist.core.point import WeightPoint, layer_count
from rvdist.weights.checkpoint.directory import Checkpoint

LONGEST = 128 * 1024  # elements of a row


def require_rows(point: WeightPoint, sources: Mapping[str, Checkpoint]) -> None:
    """Raises BadInput for a tensor that the point's method cannot see by rows."""
    if not point.method.facts.whole_rows:
        return
    base = sources[point.base]
    layers = layer_count(base.tensors)
    for name, spec in base.tensors.items():
        changing = point.recipe(name, layers, lambda source, name=name: name in sources[source].tensors)  # type: ignore[misc]
        if not spec.is_floating_point or not changing:
            continue
        row = spec.shape[-1] if spec.shape else 1
        if row > LONGEST:
            raise BadInput(
                f"{base.path}: tensor {name} has rows of {row:,} elements, and {point.method.name} needs whole ones of "
                f"at most {LONGEST:,}; choose another method"
            )
        for _, vector in changing:
            for source in vector.sources():
                if len(spec.shape) < 2 and sources[source].tensors[name].numel != spec.numel:
                    raise BadInput(
                        f"{sources[source].path}: tensor {name} has {sources[source].tensors[name].numel:,} elements "
                        f"where {base.path} has {spec.numel:,}, and {point.method.name} needs whole rows; choose "
                        "another method"
                    )
