"""What methods ask of tensors that they see by whole rows, or as whole matrices: a row fits into a chunk, and all
sources have all of it; a matrix and what it is decomposed by fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rvdist.core.errors import BadInput
from rvdist.core.point import Vector, WeightPoint, layer_count
from rvdist.weights.checkpoint.difference import Difference, Dora, LowRank
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import ITEMSIZE, TensorSpec
from rvdist.weights.checkpoint.layouts import form_of

if TYPE_CHECKING:
    from rvdist.weights.arithmetic.matrices import Matrices

LONGEST = 128 * 1024  # elements of a row


def require_rows(point: WeightPoint, sources: Mapping[str, Checkpoint]) -> None:
    """Raises BadInput for a tensor that the point's method cannot see by rows."""
    if not point.method.facts.whole_rows:
        return
    base = sources[point.base]
    for name, spec, changing in _changed(point, sources):
        row = spec.shape[-1] if spec.shape else 1
        if row > LONGEST:
            raise BadInput(
                f"{base.path}: tensor {name} has rows of {row:,} elements, and {point.method.name} needs whole ones of "
                f"at most {LONGEST:,}; choose another method"
            )
        for vector in changing:
            for source in vector.sources():
                if len(spec.shape) < 2 and sources[source].tensors[name].numel != spec.numel:
                    raise BadInput(
                        f"{sources[source].path}: tensor {name} has {sources[source].tensors[name].numel:,} elements "
                        f"where {base.path} has {spec.numel:,}, and {point.method.name} needs whole rows; choose "
                        "another method"
                    )


def matrix_room(point: WeightPoint, sources: Mapping[str, Checkpoint]) -> int:
    """How many bytes of the temporary directory a worker takes at most for a matrix of the point."""
    if not point.method.facts.whole_matrices:
        return 0
    method = _matrices(point)
    seen = ((spec.shape, len(changing)) for _, spec, changing in _changed(point, sources) if len(spec.shape) > 1)
    return max((method.bytes_aside(shape, count) for shape, count in seen), default=0)


def matrix_memory(
    point: WeightPoint, sources: Mapping[str, Checkpoint], dtype: str | None = None
) -> tuple[int, str, tuple[int, ...]]:
    """About how many bytes a worker or a rank of an engine holds at most for a matrix of the point, and the tensor and
    the shape that ask for it; 0 and nothing where the point's method sees no matrices. `dtype`: that of the output,
    None for the base's own."""
    if not point.method.facts.whole_matrices:
        return 0, "", ()
    method = _matrices(point)
    most: tuple[int, str, tuple[int, ...]] = (0, "", ())
    for name, spec, changing in _changed(point, sources):
        if len(spec.shape) < 2:
            continue
        used = [point.base, *(source for vector in changing for source in vector.sources())]
        stored = [sources[source].tensors[name].dtype for source in used] + [dtype] * bool(dtype)
        wide = any(ITEMSIZE[one] > 2 for one in stored if one)
        forms = [form_of(own, name) for own in map(sources.get, used[1:]) if isinstance(own, Difference)]
        ranks = [form.left.shape[-1] // form.count for form in forms if isinstance(form, LowRank)]
        rank = sum(min(rank, *spec.shape[-2:]) for rank in ranks)
        nbytes = method.bytes_held(spec.shape, rank, 8 if wide else 4)
        most = max(most, (nbytes, name, spec.shape))
    return most


def _matrices(point: WeightPoint) -> Matrices:
    from rvdist.weights.arithmetic.matrices import Matrices
    from rvdist.weights.arithmetic.registry import build

    method = build(point.method)
    assert isinstance(method, Matrices)
    return method


def require_memory(point: WeightPoint, sources: Mapping[str, Checkpoint], limit: int, dtype: str | None = None) -> None:
    """Raises BadInput for a tensor whose matrix takes more than `limit` bytes."""
    nbytes, name, shape = matrix_memory(point, sources, dtype)
    if nbytes > limit:
        sides = " × ".join(map(str, shape))
        raise BadInput(
            f"{sources[point.base].path}: {point.method.name} decomposes a matrix of tensor {name} "
            f"({sides}), which takes a worker {nbytes / 2**20:,.1f} MiB, and merge.memory is {limit / 2**20:,.1f} MiB; "
            "raise it, with fewer merge.workers, or keep the vector from this tensor (vector.mask.exclude)"
        )


def require_low_rank(point: WeightPoint, sources: Mapping[str, Checkpoint]) -> None:
    """Raises BadInput for a matrix of a settled point that is not stored as factors, where the method merges these."""
    if not point.method.facts.low_rank:
        return
    for name, spec, changing in _changed(point, sources):
        for vector in changing if len(spec.shape) > 1 else ():
            for own in (sources[source] for source in vector.sources()):
                form = form_of(own, name) if isinstance(own, Difference) else None
                if not isinstance(form, LowRank) or isinstance(form, Dora):
                    raise BadInput(
                        f"{own.path}: holds tensor {name} not as two factors, and {point.method.name} merges LoRA "
                        "adapters and vectors stored with vector.rank; choose another method, such as tsv_m, or keep "
                        "the vector from this tensor (vector.mask.exclude)"
                    )


def _changed(point: WeightPoint, sources: Mapping[str, Checkpoint]) -> Iterator[tuple[str, TensorSpec, list[Vector]]]:
    """The tensors of the base that vectors change, and which do."""
    tensors = sources[point.base].tensors
    layers = layer_count(tensors)
    for name, spec in tensors.items():
        terms = point.recipe(name, layers, lambda source, name=name: name in sources[source].tensors)  # type: ignore[misc]
        if terms and spec.is_floating_point:
            yield name, spec, [vector for _, vector in terms]
