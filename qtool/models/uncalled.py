"""Linears of a block that are no plain linears: their weight is read without a call, or their class adds something.

Models with state-space or convolution layers have such linears (Mamba's ``dt_proj``). A packed layer in their place
would be used wrongly, so they are found by running the first block of each kind on a few tokens.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from qtool.models.block_calls import Stop, replaced_forwards, with_hidden
from qtool.models.experts import ExpertsLinear
from qtool.models.linears import linear_bias, stored_weight, weight_of
from qtool.system.errors import InputError, first_line

NUM_TOKENS = 4  # length of the text that blocks are run on


def has_other_weights(block: nn.Module) -> bool:
    """Return whether a block has weights besides linears and vectors such as those of norms."""
    return any(
        isinstance(module, _ConvNd) or any(p.dim() > 1 for p in module.parameters(recurse=False))
        for module in block.modules()
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    )


@torch.no_grad()
def no_plain_linears(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> set[str]:
    """Return the names of linears that their block does not call, or that compute something else than a linear does.

    A linear whose weight the model's own code changes is one of them.

    Blocks with the same class and linears are one kind; the first of each kind is run.

    Raises:
        InputError: the model cannot be run.
    """
    linears = [
        {
            n: m
            for n, m in block.named_modules()
            if isinstance(m, nn.Linear | Conv1D) and not isinstance(m, ExpertsLinear)
        }
        for _, block in blocks
    ]
    kinds = [
        (type(block), *((n, tuple(stored_weight(m).shape)) for n, m in own.items()))
        for (_, block), own in zip(blocks, linears, strict=True)
    ]
    first = {kind: kinds.index(kind) for kind in kinds}
    versions = {module: weight_of(module)._version for own in linears for module in own.values()}
    plain: set[nn.Module] = set()
    output: Any = None

    def check(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        expected = F.linear(args[0], stored_weight(module), linear_bias(module)) if args else None
        if expected is not None and isinstance(out, Tensor) and out.shape == expected.shape:
            plain.update([module] if torch.allclose(out, expected, rtol=0.02, atol=1e-3) else [])

    def call(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal output
        if index == first[kinds[index]]:
            block = blocks[index][1]
            output = type(block).forward(block, hidden, *args, **kwargs)
        if index == len(blocks) - 1:
            raise Stop
        return output if index == first[kinds[index]] else with_hidden(output, hidden)

    hooks = [module.register_forward_hook(check) for own in linears for module in own.values()]
    try:
        device = next(model.parameters()).device
        with replaced_forwards([block for _, block in blocks], call), suppress(Stop):
            model(input_ids=torch.arange(1, NUM_TOKENS + 1, device=device)[None], use_cache=False)
    except Exception as error:  # an architecture can fail in any way
        raise InputError(f"{type(model).__name__} cannot be run on a few tokens: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    plain -= {module for module, version in versions.items() if weight_of(module)._version != version}
    found = {kind: {n for n, m in linears[index].items() if m not in plain} for kind, index in first.items()}
    return {f"{name}.{part}" for (name, _), kind in zip(blocks, kinds, strict=True) for part in found[kind]}
