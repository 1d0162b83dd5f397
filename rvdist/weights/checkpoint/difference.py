"""A source that is itself a difference: a LoRA adapter or a stored vector, opened by its headers.

Its tensors bear the names and shapes of the model's they change. What a file holds of one may be factors, or the
indices and values of what is not zero: this module says which, and `rvdist.weights.operand` computes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TypeGuard

from rvdist.core.regular import read_regular
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import HubStamp, Stamp, TensorSpec


@dataclass(frozen=True)
class Dense:
    """Every element, as it is, or times `scale`."""

    values: TensorSpec
    scale: float = 1.0


@dataclass(frozen=True)
class Rows:
    """`values` in place of the base's at these rows, which ascend; each is stored at its one of `places`. How many rows
    there are, the base tells."""

    values: TensorSpec
    rows: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """`values` in place of the base's, and of these, `rows` of their own: what was trained itself. The difference is
    what stands there − base."""

    values: TensorSpec
    rows: Rows | None = None


@dataclass(frozen=True)
class LowRank:
    """scale · left · right, [rows, r] and [r, columns]; the transpose of that where `transposed`. Of `count` > 1
    matrices, one after the other: each has r rows of `right`, and every count-th column of `left`. None: not yet known,
    as the adapters of experts do not say it."""

    left: TensorSpec
    right: TensorSpec
    scale: float = 1.0
    transposed: bool | None = False
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Dora(LowRank):
    """The base's matrix plus that product, of which each row, or column where `transposed`, is given the length that
    `magnitude` has for it, less the base's matrix."""

    magnitude: TensorSpec


@dataclass(frozen=True)
class Sparse:
    """`values` at the flat `indices`, which ascend; 0 everywhere else."""

    indices: TensorSpec
    values: TensorSpec


@dataclass(frozen=True)
class Packed:
    """`values`, in order, where anything is; 0 everywhere else. In blocks of BLOCK elements: `starts` counts the values
    before each and before the end. `where` is what of a block they are: a bit for each element (U8, the lowest first),
    or their places (U16), which ascend."""

    starts: TensorSpec
    where: TensorSpec
    values: TensorSpec


BLOCK = 4096  # elements of a `Packed` tensor
Form = Dense | Whole | Rows | LowRank | Sparse | Packed
FORMS: dict[str, type[Form]] = {"dense": Dense, "low_rank": LowRank, "sparse": Sparse, "packed": Packed}
BASED = (Whole, Rows, Dora)  # forms of adapters alone, which need what they were trained on


def stored_parts(form: Form) -> list[TensorSpec]:
    """What of it stands in files."""
    rows = stored_parts(form.rows) if isinstance(form, Whole) and form.rows else []
    return [part for part in vars(form).values() if isinstance(part, TensorSpec)] + rows


@dataclass(frozen=True)
class Difference(Checkpoint):
    """`tensors` are the differences, `forms` what is stored of each; `kind` is "adapter" or "vector".
    `trained_on` is what an adapter's config calls its base, `release` that of the peft that wrote it, `base` the
    checkpoint that was opened as it: without it the differences of some forms cannot be computed."""

    kind: str = "vector"
    forms: dict[str, Form] = field(default_factory=dict, repr=False)
    trained_on: str | None = None
    release: tuple[int, ...] | None = None
    base: Checkpoint | None = field(default=None, repr=False)

    def require_unchanged(self) -> None:
        super().require_unchanged()
        if self.base:
            self.base.require_unchanged()


def is_adapter(checkpoint: Checkpoint) -> TypeGuard[Difference]:
    """Whether it is a LoRA adapter: beside its weights stands no model's config, and perhaps a tokenizer."""
    return isinstance(checkpoint, Difference) and checkpoint.kind == "adapter"


def needs_base(checkpoint: Checkpoint) -> bool:
    """Whether it is an adapter that is a difference only beside what it was trained on, and stands alone."""
    return (
        isinstance(checkpoint, Difference)
        and checkpoint.base is None
        and any(
            isinstance(form, BASED) or (isinstance(form, LowRank) and form.transposed is None)
            for form in checkpoint.forms.values()
        )
    )


def stamp_beside(checkpoint: Checkpoint, name: str) -> Stamp | HubStamp:
    """The stamp of a small file beside the weights that says what they mean, so that it counts as one of them."""
    path = checkpoint.path / name
    if checkpoint.hub:
        return HubStamp(hashlib.sha256(read_regular(path, 1 << 26)).hexdigest(), path.stat().st_size)
    return Stamp.of(path)
