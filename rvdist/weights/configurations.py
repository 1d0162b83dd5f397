"""What a model's configuration means, whichever version of transformers wrote it.

Rotary embeddings are spelled `rope_theta` and `rope_scaling` by transformers 4 and `rope_parameters` by 5, defaults are
written by one and left out by the other. What differs as it is written is read once more by transformers' own class
for the kind of model, if it has one. Runs no code of a checkpoint.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from rvdist.weights.checkpoint.private_transformers import configuration_classes

# What changes no number that a forward pass computes, or is compared elsewhere (shapes, token ids, tying).
_IRRELEVANT = re.compile(
    r"_name_or_path|name_or_path|transformers_version|architectures|auto_map|torch_dtype|dtype|use_cache|vocab_size"
    r"|.*_token_ids?|.*dropout.*|.*_drop|drop_path_rate|layerdrop|initializer_.*|init_std|return_dict"
    r"|output_(?:attentions|hidden_states|router_logits|scores)|use_return_dict|id2label|label2id|num_labels"
    r"|problem_type|task_specific_params|gradient_checkpointing"
    r"|pruned_heads|chunk_size_feed_forward|is_decoder|is_encoder_decoder|cross_attention_hidden_size"
    r"|add_cross_attention|pretraining_tp|router_aux_loss_coef|aux_loss_.*|z_loss_.*|torchscript|use_bfloat16"
    r"|tokenizer_class|finetuning_task|bad_words_ids|quantization_config|_attn_implementation.*|attn_implementation"
    r"|unsloth_.*|model_name|language|license"
)
_ROTARY = ("rope_theta", "rope_scaling", "rope_parameters")
_MOST_LAYERS = 100_000  # of anything that a class makes a list of
_DEEPEST = 16

Differing = tuple[str, Any, Any]


def compare_configs(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Differing]:
    """(key, of one, of the other) for all that changes the forward pass; keys of parts have dots. A key that either
    leaves out counts as what transformers makes of that, and not at all where it does not know the kind of model."""
    if not _differences(_flatten(one), _flatten(other)):
        return []
    ours, theirs = _read(one), _read(other)
    if ours is None or theirs is None:
        both = _flatten(one).keys() & _flatten(other).keys()
        return [found for found in _differences(_flatten(one), _flatten(other)) if found[0] in both]
    return _differences(ours, theirs)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Differing]:
    keys = dict.fromkeys([*ours, *theirs])
    return [(key, ours.get(key), theirs.get(key)) for key in keys if not _equal(ours.get(key), theirs.get(key))]


def _equal(one: Any, other: Any) -> bool:
    """1 and 1.0 are the same number; true is none."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return (type(one) is type(other) and one == other) or (_is_number(one) and _is_number(other) and one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it is written, flat, with one spelling for rotary embeddings."""
    return dict(_flat(config, ""))


def _flat(config: Mapping[str, Any], prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    rotary = {key: config.get(key) for key in _ROTARY}
    for key, value in config.items():
        if key in _ROTARY or _IRRELEVANT.fullmatch(key):
            continue
        if isinstance(value, Mapping) and key.endswith("_config") and depth < _DEEPEST:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)
        elif value is not None:
            yield prefix + key, value
    if any(value is not None for value in rotary.values()):
        yield from _parts(prefix + "rope_parameters", _rotary(**rotary))


def _parts(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for part, its in value.items():
            yield from _parts(f"{key}.{part}", its)
    else:
        yield key, value


def _rotary(rope_theta: Any, rope_scaling: Any, rope_parameters: Any) -> Any:
    """As transformers 5 spells it: {rope_type, rope_theta, …}, or a mapping of such by kinds of layers."""
    parts = [part for part in (rope_scaling, rope_parameters) if isinstance(part, Mapping)]
    whole = {key: value for part in parts for key, value in part.items() if value is not None}
    if whole and all(isinstance(value, Mapping) for value in whole.values()):
        return {kind: _rotary(None, None, value) for kind, value in whole.items()}
    if rope_theta is not None:
        whole.setdefault("rope_theta", rope_theta)
    old = whole.pop("type", None)
    whole["rope_type"] = whole.get("rope_type") or old or "default"
    return whole


def _read(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration with all defaults, by transformers' class for its kind of model; None where it has none, or
    none that takes it. Strangers write configurations: whatever one makes transformers raise counts as none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or _largest(config) > _MOST_LAYERS:
        return None
    with warnings.catch_warnings(action="ignore"):
        classes = configuration_classes()
    try:
        with warnings.catch_warnings(action="ignore"):
            from transformers.utils import logging

            verbosity = logging.get_verbosity()
            logging.set_verbosity_error()
            try:
                made = classes[model_type].from_dict(json.loads(json.dumps(config)))
                return _flatten(json.loads(made.to_json_string(use_diff=False)))
            finally:
                logging.set_verbosity(verbosity)
    except Exception:
        return None


def _largest(config: Any, depth: int = 0) -> float:
    """The largest number that counts layers or the like, by which a class may size a list."""
    if not isinstance(config, Mapping) or depth > _DEEPEST:
        return 0
    own: list[float] = [
        value for key, value in config.items() if ("layer" in key or "depth" in key) and _is_number(value)
    ]
    return max([0, *own, *(_largest(part, depth + 1) for part in config.values())])
