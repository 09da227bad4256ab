"""A text that a model reads in parts, and keeps in its KV cache between them, whatever cache its architecture has.

A cache is used only where the model computes the same with it as without it, which ``find_cache`` tries.
"""

import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qtool.models.cache_argument import with_cache
from qtool.models.loaded import LoadedModel

# largest difference between logits with and without a cache, relative to their norm
CACHE_ERROR = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.03}
Begin = Callable[[], dict[str, Any]]  # makes the arguments of the first call with a cache


class Stepping:
    """A model that reads a text in parts: what it returns as memory of one part is passed on with the next."""

    def __init__(self, loaded: LoadedModel, arguments: dict[str, Any]) -> None:
        self.model, self.arguments = loaded.model, arguments
        self.names = inspect.signature(loaded.model.forward).parameters.keys() - {"logits", "labels", "loss"}

    def __call__(self, part: Tensor) -> Tensor:
        out = self.model(part, **self.arguments)
        self.arguments |= {name: out[name] for name in self.names & out.keys()}
        logits: Tensor = out.logits
        return logits


def find_cache(loaded: LoadedModel, tokens: Tensor, length: int) -> Begin | None:
    """Return a function that makes the first call's arguments of a cache for ``length`` tokens; ``None``: none works.

    A cache works if the logits after a second step are those without a cache; tried are ours and the model's own.
    """

    def ours() -> dict[str, Any]:
        cache = DynamicCache(config=loaded.model.config)
        cache.layers = [_Preallocated(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return with_cache(loaded.model, cache)

    def own() -> dict[str, Any]:
        return with_cache(loaded.model, None)

    tokens = tokens.to(loaded.device)
    other = (tokens[:, -1:] + 1) % loaded.num_embeddings  # a token repeated would say the same without its context
    whole = torch.cat([tokens, other], 1)
    expected = loaded.model(whole, use_cache=False).logits[:, -1].float()
    for begin in (ours, own):
        with suppress(Exception):  # models refuse caches of other classes with errors of many kinds
            found = []
            for _ in range(2):  # a model that remembers something itself fails at its second text
                step = Stepping(loaded, begin())
                step(tokens)
                found.append(step(other)[:, -1].float())
            limit = CACHE_ERROR[loaded.model.dtype] * float(expected.norm())
            if all(float((logits - expected).norm()) <= limit for logits in found):
                return begin
    return None


def continued(
    loaded: LoadedModel,
    tokens: Tensor,
    positions: Iterable[int],
    draw: Callable[[Tensor, int], Tensor],
    begin: Begin | None,
) -> Tensor:
    """Return ``tokens`` ``[b, length]``, on the CPU, with the columns ``positions``, one after the other, written anew.

    ``draw`` chooses the tokens ``[b]`` of a column from logits ``[b, vocabulary]`` and the column's number. ``begin``
    is one of the functions of ``find_cache``; ``None``: every step reads all tokens before it.
    """
    tokens = tokens.to(loaded.device)
    step, seen = None if begin is None else Stepping(loaded, begin()), 0
    for position in positions:
        if step is None:
            logits = loaded.model(tokens[:, :position], use_cache=False).logits
        else:
            logits = step(tokens[:, seen:position])
        tokens[:, position] = draw(logits[:, -1], position)
        seen = position
    return tokens.cpu()


class _Preallocated(DynamicLayer):
    """A cache layer of fixed capacity: nothing is copied as it grows, which is three times faster on a CPU."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.capacity = capacity
        self.length = 0

    # Any: the signature is transformers'
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.all_keys, self.all_values = (
                x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states)
            )
        end = self.length + key_states.shape[2]
        self.all_keys[:, :, self.length : end] = key_states
        self.all_values[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values
