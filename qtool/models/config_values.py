"""Values of a model's config, which may differ from layer to layer or be missing."""

from typing import Any

from transformers import PreTrainedConfig


def config_value(config: PreTrainedConfig, name: str) -> Any:  # Any: values are of many types
    """Return the value called ``name``, the largest where layers differ, and ``None`` if there is none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to give one value where layers differ
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
        return max((value for value in found if value is not None), default=None)
