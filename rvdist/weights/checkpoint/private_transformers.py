"""What we take from transformers beyond its public interface."""

from __future__ import annotations

from typing import Any

from rvdist.core.private import Library

TRANSFORMERS = Library("transformers", "5.19.0")
NEEDED = ("transformers.models.auto.configuration_auto:CONFIG_MAPPING",)


def configuration_classes() -> Any:
    """The class of a configuration by its model_type, as a mapping. Raises Failed where there is no such mapping."""
    return TRANSFORMERS.get(NEEDED[0])


def tied_names(model: Any) -> set[str]:
    """The parameters of a model that are another one too, and so need not be stored."""
    try:
        return set(model.all_tied_weights_keys)
    except AttributeError:
        raise TRANSFORMERS.lacks("PreTrainedModel.all_tied_weights_keys") from None
