"""Text that a model writes itself: the data-free calibration of LLM-QAT (arXiv 2305.17888)."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qtool.data.vocabulary import check_ids
from qtool.models.cache_argument import with_cache
from qtool.models.config_values import config_value
from qtool.models.loaded import LoadedModel
from qtool.models.tokenizer import tokenized
from qtool.system import progress
from qtool.system.errors import InputError
from qtool.system.tensors import size_for

CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # largest KV cache of a batch
# largest difference between logits with and without a cache, relative to their norm
CACHE_ERROR = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.03}
Begin = Callable[[], dict[str, Any]]  # makes the arguments of the first call with a cache


def check_length(key: str, length: int, loaded: LoadedModel) -> None:
    """Refuse windows of ``length`` tokens that the model is not made for; ``key`` is the recipe key to change.

    Raises:
        InputError: ``length`` is above the model's context.
    """
    if length > loaded.max_length:
        raise InputError(
            f"{key} is {length}, and {loaded.path} is made for at most {loaded.max_length} tokens; "
            f"lower it to {loaded.max_length}"
        )


@torch.inference_mode()
def generated_tokens(loaded: LoadedModel, num: int, length: int, seed: int) -> Tensor:
    """Return text ``[num, length]`` int64 that the model writes itself, on the CPU.

    The first token is drawn from the vocabulary, the next 3 to 5 are the most likely ones, the rest are sampled at
    temperature 1. Special tokens, the end of text among them, are never drawn: so a window holds running text to its
    end, and no text after an end token, which many models have never seen in training. If the tokenizer begins every
    text with a BOS token, so does each window. The result depends on ``seed`` and not on the global random state, and
    on the batch size only through rounding in the model.

    Raises:
        InputError: windows longer than the model's context.
    """
    check_length("the window of generated text", length, loaded)
    tokenizer = loaded.tokenizer
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), loaded.num_embeddings)  # either may be the larger
    allowed = torch.tensor([i for i in range(size) if i not in special])
    if not len(allowed):
        raise InputError(f"the tokenizer of {loaded.path} has special tokens only; text cannot be generated with it")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(num, length, dtype=torch.int64)
    start = allowed[torch.randint(len(allowed), (num,), generator=generator)]
    num_greedy = torch.randint(3, 6, (num,), generator=generator)
    uniform = torch.rand(num, length, generator=generator)
    bos = tokenized(tokenizer, "", "the empty text")["input_ids"][:1]
    prefix = bos if bos and bos[0] == tokenizer.bos_token_id else []
    tokens[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    check_ids(tokens[:, : len(prefix)], loaded, "the token that begins every text")
    tokens[:, len(prefix)] = start
    batches = torch.arange(num).split(batch_size(loaded, length))
    begin = _cache(loaded, tokens[: len(batches[0]), : len(prefix) + 1], length)
    for rows in progress.track(batches, "generating text", len(batches)):
        draw = _sampler(uniform[rows], num_greedy[rows], allowed, loaded.device)
        tokens[rows] = _continued(loaded, tokens[rows], len(prefix) + 1, draw, begin)
    return tokens


def _continued(
    loaded: LoadedModel,
    tokens: Tensor,
    given: int,
    draw: Callable[[Tensor, int, int], Tensor],
    begin: Begin | None,
) -> Tensor:
    """Return ``tokens`` ``[b, length]`` with all columns after the first ``given`` written by the model.

    ``begin`` is one of the functions of ``_cache``; ``None``: every step reads all tokens before it.
    """
    tokens = tokens.to(loaded.device)
    step = None if begin is None else _Stepping(loaded, begin())
    seen = 0
    for position in range(given, tokens.shape[1]):
        if step is None:
            logits = loaded.model(tokens[:, :position], use_cache=False).logits
        else:
            logits = step(tokens[:, seen:position])
        tokens[:, position] = draw(logits[:, -1], position, position - given)
        seen = position
    return tokens.cpu()


class _Stepping:
    """A model that reads a text in parts: what it returns as memory of one part is passed on with the next."""

    def __init__(self, loaded: LoadedModel, arguments: dict[str, Any]) -> None:
        self.model, self.arguments = loaded.model, arguments
        self.names = inspect.signature(loaded.model.forward).parameters.keys() - {"logits", "labels", "loss"}

    def __call__(self, part: Tensor) -> Tensor:
        out = self.model(part, **self.arguments)
        self.arguments |= {name: out[name] for name in self.names & out.keys()}
        logits: Tensor = out.logits
        return logits


def _cache(loaded: LoadedModel, tokens: Tensor, length: int) -> Begin | None:
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
                step = _Stepping(loaded, begin())
                step(tokens)
                found.append(step(other)[:, -1].float())
            limit = CACHE_ERROR[loaded.model.dtype] * float(expected.norm())
            if all(float((logits - expected).norm()) <= limit for logits in found):
                return begin
    progress.note(
        f"{type(loaded.model).__name__} writes other text with a KV cache than without one, so the calibration text is "
        "generated without one, which takes longer"
    )
    return None


def _sampler(
    uniform: Tensor, num_greedy: Tensor, allowed: Tensor, device: torch.device
) -> Callable[[Tensor, int, int], Tensor]:
    """Return a function that chooses tokens from logits ``[b, vocabulary]``: greedy at first, then by inverse CDF."""
    uniform, num_greedy, allowed = uniform.to(device), num_greedy.to(device), allowed.to(device)

    def draw(logits: Tensor, position: int, step: int) -> Tensor:
        logits = logits.float()[:, allowed]
        cdf = logits.softmax(-1).cumsum(-1)
        sampled = torch.searchsorted(cdf, uniform[:, position : position + 1] * cdf[:, -1:], right=True)[:, 0]
        chosen = sampled if step >= 5 else torch.where(num_greedy > step, logits.argmax(-1), sampled)
        return allowed[chosen.clamp_(max=len(allowed) - 1)]

    return draw


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


def batch_size(loaded: LoadedModel, length: int) -> int:
    """Return how many sequences of ``length`` tokens have a KV cache within ``CACHE_BYTES``."""
    config = loaded.model.config.get_text_config()
    layers, width = (config_value(config, name) or 0 for name in ("num_hidden_layers", "hidden_size"))
    num_heads = config_value(config, "num_attention_heads") or 1  # models without attention keep less than one that has
    heads = config_value(config, "num_key_value_heads") or num_heads
    head_dim = config_value(config, "head_dim") or width // num_heads
    per_token: int = 2 * layers * heads * head_dim * loaded.model.dtype.itemsize
    return max(1, size_for(loaded.device, CACHE_BYTES) // max(1, per_token * length))
