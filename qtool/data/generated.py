"""Text that a model writes itself: the data-free calibration of LLM-QAT (arXiv 2305.17888)."""

from collections.abc import Callable

import torch
from torch import Tensor

from qtool.data.vocabulary import check_ids
from qtool.models.config_values import config_value
from qtool.models.loaded import LoadedModel
from qtool.models.stepping import continued, find_cache
from qtool.models.tokenizer import tokenized
from qtool.system import progress
from qtool.system.errors import InputError
from qtool.system.tensors import size_for

Draw = Callable[[Tensor, int, int], Tensor]  # logits, position and number of the step -> tokens
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # largest KV cache of a batch


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
    first = len(prefix) + 1
    batches = torch.arange(num).split(batch_size(loaded, length))
    begin = find_cache(loaded, tokens[: len(batches[0]), :first], length)
    if begin is None:
        progress.note(
            f"{type(loaded.model).__name__} writes other text with a KV cache than without one, so the calibration "
            "text is generated without one, which takes longer"
        )
    steps = length - first
    with progress.counted("generating text, tokens", num * steps) as reach:
        for rows in batches:
            draw, before = _sampler(uniform[rows], num_greedy[rows], allowed, loaded.device), int(rows[0]) * steps

            def choose(
                logits: Tensor, position: int, draw: Draw = draw, before: int = before, size: int = len(rows)
            ) -> Tensor:
                reach(before + (position - first) * size)  # counts the tokens drawn before this step
                return draw(logits, position, position - first)

            tokens[rows] = continued(loaded, tokens[rows], range(first, length), choose, begin)
            reach(before + steps * len(rows))
    return tokens


def _sampler(uniform: Tensor, num_greedy: Tensor, allowed: Tensor, device: torch.device) -> Draw:
    """Return a function that chooses tokens from logits ``[b, vocabulary]``: greedy at first, then by inverse CDF."""
    uniform, num_greedy, allowed = uniform.to(device), num_greedy.to(device), allowed.to(device)

    def draw(logits: Tensor, position: int, step: int) -> Tensor:
        logits = logits.float()[:, allowed]
        cdf = logits.softmax(-1).cumsum(-1)
        sampled = torch.searchsorted(cdf, uniform[:, position : position + 1] * cdf[:, -1:], right=True)[:, 0]
        chosen = sampled if step >= 5 else torch.where(num_greedy > step, logits.argmax(-1), sampled)
        return allowed[chosen.clamp_(max=len(allowed) - 1)]

    return draw


def batch_size(loaded: LoadedModel, length: int) -> int:
    """Return how many sequences of ``length`` tokens have a KV cache within ``CACHE_BYTES``."""
    config = loaded.model.config.get_text_config()
    layers, width = (config_value(config, name) or 0 for name in ("num_hidden_layers", "hidden_size"))
    num_heads = config_value(config, "num_attention_heads") or 1  # models without attention keep less than one that has
    heads = config_value(config, "num_key_value_heads") or num_heads
    head_dim = config_value(config, "head_dim") or width // num_heads
    per_token: int = 2 * layers * heads * head_dim * loaded.model.dtype.itemsize
    return max(1, size_for(loaded.device, CACHE_BYTES) // max(1, per_token * length))
