"""The KV cache of a model, as argument and output: transformers 5.24 renamed ``past_key_values`` to ``cache``."""

import inspect
from typing import Any

from torch import nn


def takes_cache(model: nn.Module) -> bool:
    """Return whether ``model`` takes a KV cache as an argument, as all but a few recurrent and old models do."""
    return not {"cache", "past_key_values"}.isdisjoint(inspect.signature(model.forward).parameters)


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:  # Any: models have caches of many classes
    """Return the keyword argument that gives ``model`` its KV cache; ``None``: the model makes one."""
    new = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if new else "past_key_values": cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """Return the KV cache in the output of a model that was called with ``use_cache``."""
    return output["cache"] if "cache" in output else output["past_key_values"]
