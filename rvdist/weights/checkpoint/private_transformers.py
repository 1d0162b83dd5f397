"""What we take from transformers beyond its public interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rvdist.core.private import Library

TRANSFORMERS = Library("transformers", "5.19.0")
NEEDED = (
    "transformers.models.auto.configuration_auto:CONFIG_MAPPING",
    "transformers.conversion_mapping:get_checkpoint_conversion_mapping",
)
# Files have some towers as whole models, which transformers takes them out of.
_WITHIN = (
    (r"^model\.language_model\.model\.", "model.language_model."),
    (r"vision_tower\.vision_model\.", "vision_tower."),
)


def configuration_classes() -> Any:
    """The class of a configuration by its model_type, as a mapping. Raises Failed where there is no such mapping."""
    return TRANSFORMERS.get(NEEDED[0])


def renames_in_memory(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The substitutions, one after the other, that give the tensors of a model's files the names that they have in
    memory; those alone that rename whole tensors."""
    mapping, classes = TRANSFORMERS.get(NEEDED[1]), config.get("architectures")
    keys = [*(classes if isinstance(classes, list) else []), config.get("model_type")]
    found: list[Any] = next((own for key in keys if isinstance(key, str) and (own := mapping(key)) is not None), [])
    pairs = [(own.source_patterns, own.target_patterns) for own in found if not hasattr(own, "operations")]
    return [*((sources[0], targets[0]) for sources, targets in pairs if len(sources) == len(targets) == 1), *_WITHIN]


def tied_names(model: Any) -> set[str]:
    """The parameters of a model that are another one too, and so need not be stored."""
    try:
        return set(model.all_tied_weights_keys)
    except AttributeError:
        raise TRANSFORMERS.lacks("PreTrainedModel.all_tied_weights_keys") from None
