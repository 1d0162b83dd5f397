"""What an adapter makes of a model's rows for tokens: which of them lie in its files, and which in what it was trained
on.

Source: peft's tuners/trainable_tokens/layer.py (`merge`) and utils/save_and_load.py (`save_embedding_layers`). Reads
headers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.difference import Difference, Rows, Whole
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.remapped import Numbers
from rvdist.weights.checkpoint.tokens import Tokens

MERGE = "merge it into its base with peft's merge_and_unload and use the result as vector.plus"
_WRITE = "write what it makes of its base (target, vector.path and output alone), and use that as vector.plus"
_KINDS = {"adapter": ("an adapter", MERGE), "vector": ("a stored vector", _WRITE)}
_SAVE = "save it again by save_pretrained(DIR, save_embedding_layers=True)"
Places = tuple[tuple[Checkpoint, ...], Numbers, Numbers]


@dataclass(frozen=True)
class Adapted(Checkpoint):
    """The model that an adapter makes, of which only `tensors` with a row for each token count. `places` has, by their
    names, checkpoints, and for each row its own among these and its row there."""

    places: dict[str, Places] = field(default_factory=dict, repr=False)


def adapt(one: Difference, trained_on: Checkpoint | None, names: Sequence[str]) -> Adapted:
    """The model that `one` makes of `trained_on`, None where that is not known. Raises BadInput where `one` changes one
    of `names` by a product, or such, and where a row is nowhere."""
    tensors, places = dict[str, TensorSpec](), dict[str, Places]()
    for name in names:
        form = one.forms.get(name)
        own = form.values if isinstance(form, Whole) else None
        some = form.rows if isinstance(form, Whole) else form
        under = _stored(one, name, own) if own else trained_on
        if under is None or not (some is None or isinstance(some, Rows)):
            what, way_out = _KINDS[one.kind]
            raise BadInput(f"{one.path}: is {what} that has no whole rows of {name}, and tokenizer is set; {way_out}")
        if name in under.tensors:
            spec = under.tensors[name]
            places[name] = _replace(one, name, some, under) if some else as_it_is(under, name)
            tensors[name] = replace(spec, shape=(len(places[name][1]), *spec.shape[1:]))
    return Adapted(one.path, tensors, one.metadata, one.stamps, one.hub, places=places)


def as_it_is(one: Checkpoint, name: str) -> Places:
    """Each row of a tensor where it stands in `one`."""
    count = one.tensors[name].shape[0]
    return (one,), np.zeros(count, np.int32), np.arange(count, dtype=np.int32)


def require_rows(one: Adapted, tokens: Tokens) -> None:
    """Raises BadInput where a token has a row in one of the tensors, and none in another."""
    counts = {name: spec.shape[0] for name, spec in one.tensors.items()}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    for token, number in tokens.ids.items():
        if counts[least] <= number < counts[most]:
            raise BadInput(
                f"{one.path}: has a row of {most} for token {token!r}, and neither it nor what it was trained on has "
                f"one of {least}; {_SAVE}"
            )


def _stored(one: Difference, name: str, values: TensorSpec) -> Checkpoint:
    """Values of the adapter's files as a tensor of this name."""
    return Checkpoint(one.path, {name: replace(values, name=name)}, one.metadata, one.stamps, one.hub)


def _replace(one: Difference, name: str, some: Rows, under: Checkpoint) -> Places:
    held = under.tensors[name].shape[0]
    owner = np.full(max(held, some.rows[-1] + 1), -1, np.int32)
    row = np.arange(len(owner), dtype=np.int32)
    owner[:held] = 0
    owner[list(some.rows)], row[list(some.rows)] = 1, some.places
    if (owner < 0).any():
        lacking = int(np.flatnonzero(owner < 0)[0])
        raise BadInput(
            f"{one.path}: has row {some.rows[-1]} of {name}, and neither it nor {under.path} has row {lacking}; {_SAVE}"
        )
    return (under, _stored(one, name, some.values)), owner, row
