"""What masks and adapters do to a head that is the target's embedding: one matrix moves once, or stays.

Source: peft's tuners/tuners_utils.py (`merge_and_unload`), which adds what adapts either of the two to the matrix that
they share. Touches no tensor data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from rvdist.core.errors import BadInput
from rvdist.core.point import Mask
from rvdist.weights.checkpoint.difference import Whole, is_adapter
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.tied import heads_of, is_embedding, is_head, is_tied

_BOTH = "is its embedding (tie_word_embeddings)"


def check_tied_head(
    base: Checkpoint, donor: Checkpoint, mask: Mask, coefficient: Callable[[str], float]
) -> Iterator[str]:
    """Says where a head moves with its embedding, or stays with it, of which nothing was said. Raises BadInput for a
    mask that names the one and not the other, and for an adapter that changes one alone in a way that the other cannot
    have."""
    if not is_tied(base.config):
        return
    _require_one_matrix(base, donor, coefficient)
    for embedding in filter(is_embedding, base.tensors):
        likeliest, *others = heads_of(embedding)
        names, moves = [likeliest, *(name for name in others if name in donor.tensors)], coefficient(embedding)
        _require_both(base, mask, embedding, [name for name in names if coefficient(name) != moves])
        if moves != coefficient(likeliest):
            if embedding in donor.tensors:
                does = "moves" if moves else "stays"
                yield f"{likeliest} {does} with {embedding}: the head of {base.path.name} {_BOTH}"
        elif embedding in donor.tensors and moves and is_adapter(donor):
            adapted = f"{donor.path.name} adapts {embedding.removesuffix('.weight')}"
            yield f"{adapted}, and the head of {base.path.name} {_BOTH}: it moves too, as where peft merges"


def _require_both(base: Checkpoint, mask: Mask, embedding: str, heads: Sequence[str]) -> None:
    for key, patterns in (("include", mask.include), ("exclude", mask.exclude)):
        for pattern in patterns:
            named = [head for head in heads if re.fullmatch(pattern, head)]
            if named and not re.fullmatch(pattern, embedding):
                raise BadInput(
                    f"mask.{key}: {pattern!r} matches {named[0]} and not {embedding}, and the head of {base.path} "
                    f"{_BOTH}, so that both move or neither; match {embedding} too, or neither"
                )


def _require_one_matrix(base: Checkpoint, donor: Checkpoint, coefficient: Callable[[str], float]) -> None:
    """What an adapter adds to a head alone cannot be written where the head is the embedding, nor can an embedding that
    was trained as a copy beside a head that stayed."""
    if not is_adapter(donor):
        return
    copied = any(is_head(name) and name not in donor.tensors for name in donor.forms)  # the embedding, stored twice
    for name in filter(coefficient, [name for name in donor.forms if name in donor.tensors]):
        if is_embedding(name) and copied:
            continue
        of_embedding = isinstance(donor.forms[name], Whole) and is_embedding(name)
        if is_head(name) or of_embedding:
            other = "head" if of_embedding else "embedding"
            both = [name, *filter(is_embedding, base.tensors)] if is_head(name) else [name]
            left_out = ",".join(f"'{re.escape(one)}'" for one in both)
            raise BadInput(
                f"{donor.path}: adapts {name.removesuffix('.weight')}, which {base.path} ties to its {other} "
                f"(tie_word_embeddings), so that the {other} would move too; untie the target, or leave "
                f"{'both' if is_head(name) else 'it'} out by vector.mask.exclude=[{left_out}]"
            )
