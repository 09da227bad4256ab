"""The size of the cache of keys and values of a model, for a text of some length, from its config alone.

transformers' own cache is filled by a forward on the meta device, so that each kind of layer counts as it is: full
attention grows with the text, sliding attention stops at its window, and linear attention keeps states of a fixed size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from qtool.models.cache_argument import with_cache
from qtool.system.errors import InputError, first_line

BYTES = 2  # of a number of the cache in 16 bits, which engines use by default


class CacheSize(NamedTuple):
    """The cache of one text, in 16 bits; states that a model keeps in float32 have 4 bytes for each number."""

    num_bytes: int
    layers: dict[str, int]
    """The number of layers of each kind: full, sliding, linear."""


@torch.no_grad()
def cache_size(model: nn.Module, num_tokens: int) -> CacheSize:
    """Return the size of the cache after a text of ``num_tokens``; ``model`` is on the meta device.

    Raises:
        InputError: the model fills no cache that transformers knows, and its config does not say its sizes.
    """
    owner: Any = model
    config = owner.config.get_text_config()
    cache = DynamicCache(config=config)
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    try:
        owner(input_ids=tokens, **with_cache(model, cache))
    except Exception as error:  # an architecture can fail in any way, for example by a branch on a value
        return _of_attention(config, num_tokens, error)
    layers, size = dict[str, int](), 0
    for layer in cache.layers:
        held = list(_tensors(layer))
        kind = next((kind for kind in ("Linear", "Sliding") if kind in type(layer).__name__), "Full").lower()
        layers[kind] = layers.get(kind, 0) + bool(held)
        size += sum(t.numel() * (4 if kind == "linear" and t.dtype == torch.float32 else BYTES) for t in held)
    return CacheSize(size, {kind: count for kind, count in layers.items() if count})


def _tensors(layer: Any) -> Iterator[Tensor]:
    for value in vars(layer).values():
        parts = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
        yield from (part for part in parts if isinstance(part, Tensor) and part.dim() > 1)


def _of_attention(config: Any, num_tokens: int, error: Exception) -> CacheSize:
    """Return the size of the cache of a model all of whose layers have full attention, by its config."""
    count, heads = (getattr(config, key, None) for key in ("num_hidden_layers", "num_attention_heads"))
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"} or not (count and heads):
        raise InputError(f"the size of its cache is not known: {first_line(error):.200}") from error
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    held = 2 * count * (getattr(config, "num_key_value_heads", None) or heads) * channels * num_tokens
    return CacheSize(held * BYTES, {"full": count})
