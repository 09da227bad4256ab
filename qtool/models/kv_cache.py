"""The linears that make the keys and values of the KV cache: found by running the model, without a table of names.

The model of a config is built without weights, and run on a few tokens with a cache that keeps the tensors it is given.
The gradients of all keys and of all values of a block then tell which linears they come from.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from qtool.config.quant import QuantSpec
from qtool.models import experts
from qtool.models.auto_class import auto_class
from qtool.models.cache_argument import with_cache
from qtool.system.errors import InputError

NUM_TOKENS = 3  # length of the text that the model is run on
_known: dict[str, dict[str, int]] = {}  # results by config: a run needs a result several times, and each takes seconds


class _Seen(DynamicCache):
    """A cache that records the keys and values it is given, ``[1, heads, tokens, channels]``, and returns them."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.tensors: list[tuple[str, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.tensors += [("keys", key_states), ("values", value_states)]
        return key_states, value_states


def key_value_linears(config: PretrainedConfig) -> dict[str, int]:
    """Return the linears that make the keys or the values of a block and nothing else, with the channels of a head.

    Raises:
        InputError: keys or values do not come from one linear of their own, or the model gives none to a cache.
    """
    cannot = "kv_cache: keys and values cannot be rounded in this model: "
    outputs: dict[str, Tensor] = {}
    config = copy.deepcopy(config)
    config.get_text_config().pad_token_id = (
        None  # models compare tokens with it, and tokens on the meta device have no values
    )
    try:
        with warnings.catch_warnings(), torch.device("meta"), torch.enable_grad():
            warnings.simplefilter("ignore")
            model = auto_class(config).from_config(config, trust_remote_code=False).eval()
            experts.unfuse(model)
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear | Conv1D):
                    module.register_forward_hook(_leaf(outputs, name))
            cache = _Seen(model.config)
            model(input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.long), **with_cache(model, cache))
    except Exception as error:  # models that cannot run without weights raise errors of many kinds
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise InputError(f"{cannot}it does not run without weights ({reason}); leave kv_cache out") from error
    found: dict[str, int] = {}
    for what, tensor in cache.tensors:
        grads = torch.autograd.grad(tensor.sum(), list(outputs.values()), allow_unused=True, retain_graph=True)
        makers = [name for name, grad in zip(outputs, grads, strict=True) if grad is not None]
        _, heads, _, channels = tensor.shape
        if len(makers) != 1 or outputs[makers[0]].shape[-1] != heads * channels:
            by = " and ".join(makers) or "no linear"
            raise InputError(
                f"{cannot}{what} come from {by}, not from one linear of their own, so qtool cannot round them "
                "separately; leave kv_cache out"
            )
        found[makers[0]] = channels
    if not found:
        raise InputError(f"{cannot}it gives no keys or values to a cache; leave kv_cache out")
    return found


def with_heads(
    specs: dict[str, QuantSpec], rows: dict[str, int], config: PretrainedConfig
) -> tuple[dict[str, QuantSpec], list[str]]:
    """Return ``specs`` with ``kv_cache`` only on linears of keys and values, and all faults, one line each.

    There, ``kv_group_size`` becomes the number of channels that share a range. ``rows`` has the output channels of each
    linear.
    """
    text = config.to_json_string(use_diff=False)
    try:
        heads = _known.get(text) or _known.setdefault(text, key_value_linears(config))
    except InputError as error:
        return specs, [str(error)]
    wrong = [
        f"kv_cache: {name} makes keys or values and stays in floating point (quant.overrides), so they would not be "
        "rounded; quantize it, or leave kv_cache out"
        for name in heads
        if name not in specs
    ]
    found = {}
    for name, spec in specs.items():
        makes = name in heads and spec.kv_cache is not None
        size = (spec.kv_group_size or heads[name]) if makes else None
        if size and rows[name] % size:
            wrong.append(
                f"kv_group_size {size} does not divide the {rows[name]} channels that {name} makes; choose a divisor"
            )
        found[name] = spec.model_copy(update={"kv_cache": spec.kv_cache if makes else None, "kv_group_size": size})
    return found, wrong


def _leaf(outputs: dict[str, Tensor], name: str) -> Any:
    """Return a hook that keeps a linear's output as a leaf of the autograd graph, and passes on a copy of it."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out  # for example a router's scores and choices
        outputs[name] = out.detach().requires_grad_()
        return outputs[name].clone()

    return hook
