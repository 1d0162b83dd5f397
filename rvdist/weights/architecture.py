"""Whether two checkpoints have one architecture and one vocabulary: their configurations and tokenizers, compared.

Reads what stands beside weights, and no tensors.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rvdist.core.text import cut
from rvdist.weights.checkpoint.adapted import MERGE
from rvdist.weights.checkpoint.adapter import EMBEDDING
from rvdist.weights.checkpoint.difference import Difference, Rows, Whole
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.stacked import Stacked
from rvdist.weights.checkpoint.tied import is_tied
from rvdist.weights.checkpoint.tokens import FILE, token_ids
from rvdist.weights.configurations import compare_configs as differences

Finding = tuple[list[str], list[str]]  # exceptions, refusals
_LONGEST_VALUE = 200  # characters of a configuration's value in a sentence
_LONGEST_TOKEN, _SHOWN = 40, 3  # of tokens in one
_OF_LAYERS = re.compile(
    r"(?:.*\.)?(?:num_hidden_layers|n_layers?|num_layers|layers_block_type|max_window_layers|.*layer_types)"
)
_STRUCTURE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "num_experts", "num_experts_per_tok", "num_local_experts",
)  # fmt: skip


def compare_configs(
    base: Checkpoint, donor: Checkpoint, but: re.Pattern[str] | None = None, called: str = "the target"
) -> Finding:
    """What of their configurations that changes the forward pass differs, `but` for keys like these; of `base`, by what
    it is `called`."""
    if not base.config or not donor.config:
        lacking = donor if base.config else base
        return [f"{lacking.path.name} has no config.json: its architecture was not compared"], []
    differing = [found for found in differences(base.config, donor.config) if not (but and but.fullmatch(found[0]))]
    kinds = [differs for differs in differing if differs[0] == "model_type"]
    exceptions, refusals = [], []
    for key, ours, theirs in kinds or differing:  # of another kind of model everything differs
        if key.rpartition(".")[2] in _STRUCTURE:
            refusals.append(f"{donor.path}: its config has {key}={theirs} where {called} has {ours}")
        else:
            exceptions.append(f"{key} is {_shorten(ours)} in {called} and {_shorten(theirs)} in {donor.path.name}")
    return exceptions, refusals


def _shorten(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def compare_tokenizers(base: Path, donor: Path, called: str = "the target", way_out: str = "") -> Finding:
    """Whether tokens have the same ids in the tokenizers of two directories, the first by what it is `called`.
    `way_out` is what to say of tokens that it lacks."""
    ours, theirs = token_ids(base), token_ids(donor)
    if ours is None or theirs is None:
        lacking = base if ours is None else donor
        return [f"{lacking.name} has no tokenizer.json or vocab.json: token ids were not compared"], []
    if reason := _contradiction(ours, theirs, called):
        return [], [f"{donor}: its tokenizer differs from {called}'s ({reason})"]
    alone = (
        (donor.name, called, theirs.keys() - ours.keys(), way_out),
        (called, donor.name, ours.keys() - theirs.keys(), ""),
    )
    return [
        f"{has} has {len(own)} tokens that {lacks} lacks ({_few(own)}){said}" for has, lacks, own, said in alone if own
    ], []


def compare_adapter_tokens(base: Checkpoint, adapter: Difference, coefficient: Callable[[str], float]) -> Finding:
    """The same of an adapter that has a tokenizer beside it, as trainers save one; of tensors that `coefficient` takes.
    Refused where it changes rows of tokens that the base's tokenizer lacks: no prompt would reach them."""
    ours, theirs = base.beside, adapter.beside
    if all((where / FILE).exists() for where in (ours, theirs)) and filecmp.cmp(ours / FILE, theirs / FILE, False):
        return [], []  # a copy, as most are: not parsed
    known, said = token_ids(ours), token_ids(theirs)
    if known is None or said is None:
        return [], []
    if reason := _contradiction(known, said, "the target"):
        return [], [f"{theirs}: its tokenizer differs from the target's ({reason})"]
    new = {number: token for token, number in said.items() if token not in known}
    for name, form in adapter.forms.items():
        if name not in base.tensors or not EMBEDDING.fullmatch(name) or not coefficient(name):
            continue
        rows = form.rows if isinstance(form, Rows) else range(base.tensors[name].shape[0])
        if moved := [token for number, token in new.items() if number in rows]:
            way_out = "tokenizer=union gives the output these"
            if not isinstance(form, Rows | Whole):
                way_out = f"{MERGE}, its tokenizer beside it: {way_out}"
            return [], [
                f"{adapter.path}: changes rows of {name} for tokens that the target's tokenizer lacks ({_few(moved)}), "
                f"so that no prompt would reach them; {way_out}"
            ]
    if not new:
        return [], []
    return [
        f"the tokenizer beside {adapter.path.name} has {len(new)} tokens that the target's lacks "
        f"({_few(new.values())}), and the output has the target's: copy the adapter's there if prompts have them"
    ], []


def _contradiction(ours: Mapping[str, int], theirs: Mapping[str, int], called: str) -> str | None:
    """Where a token has another id in the second, or an id another token."""
    theirs_by_id = {number: token for token, number in theirs.items()}
    for token, number in ours.items():
        if theirs.get(token, number) != number:
            return f"token {token!r} has id {theirs[token]} where {called} has {number}"
        if theirs_by_id.get(number, token) != token:
            return f"id {number} is token {theirs_by_id[number]!r} where {called} has {token!r}"
    return None


def _few(tokens: Collection[str]) -> str:
    """Some of them, so that they can be shown."""
    shown = ", ".join(repr(cut(token, _LONGEST_TOKEN)) for token in sorted(tokens)[:_SHOWN])
    return shown + ", …" * (len(tokens) > _SHOWN)


def judge_parts(stack: Stacked) -> Finding:
    """Whether layers of these checkpoints can be one model: what of them differs beside the number of layers. The first
    exception says what is stacked."""
    exceptions, refusals, described = [str(stack)], list[str](), stack.described
    assert described is not None
    for part in {part.checkpoint.path: part.checkpoint for part in stack.parts}.values():
        if part.path == described.path:
            continue
        if is_tied(part.config) != is_tied(described.config):
            refusals.append(
                f"{part.path}: its head is its embedding where that of {described.path} is not, or the other way round"
            )
        configs = compare_configs(described, part, _OF_LAYERS)
        for said, refused in (configs, compare_tokenizers(described.beside, part.beside)):
            exceptions += said
            refusals += refused
    return exceptions, refusals
