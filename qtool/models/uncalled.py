"""Linears of a block that a packed layer cannot stand for: found by running the first block of each kind.

Their block does not call them, the model's own code reads their weight (Mamba's ``dt_proj``), or their class computes
something else than a linear (routers that derive from ``nn.Linear``).
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qtool.models.auto_class import is_multimodal
from qtool.models.block_calls import Stop, replaced_forwards, with_hidden
from qtool.models.experts import ExpertsLinear
from qtool.models.linears import linear_bias, stored_weight, weight_of
from qtool.system.errors import InputError, first_line

NUM_TOKENS = 4  # length of the text that blocks are run on
READ = "the model's own code reads their weight"
OTHER = "their class computes something else"
UNCALLED = "their block does not call them"
SAME = {"dtype", "device", "requires_grad", "layout", "is_cuda"}  # what a packed layer's ``weight`` has too


class _Watch(TorchFunctionMode):
    """Finds which linears are called, which compute what a linear does, and whose weight is read elsewhere."""

    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        self.linears = {id(weight_of(linear)): linear for linear in linears}
        self.inside: list[nn.Module] = []
        self.called: set[nn.Module] = set()
        self.other: set[nn.Module] = set()
        self.read: set[nn.Module] = set()
        self.hooks = [
            linear.register_forward_pre_hook(lambda module, _: self.inside.append(module)) for linear in linears
        ]
        self.hooks += [linear.register_forward_hook(self._after) for linear in linears]

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.called.add(module)
        if type(module) not in (nn.Linear, Conv1D) and not hasattr(module, "experts"):
            same = False
            with suppress(RuntimeError):  # of shapes that do not fit
                expected = F.linear(args[0], stored_weight(module), linear_bias(module))
                same = isinstance(out, Tensor) and out.shape == expected.shape
                same = same and torch.allclose(out, expected, rtol=0.02, atol=1e-3)
            self.other.update([] if same else [module])
        self.inside.remove(module)

    # Any: the signature is torch's
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(getattr(func, "__self__", None), "__name__", getattr(func, "__name__", ""))
        if name not in SAME:
            for leaf in tree_leaves((args, kwargs)):
                linear = self.linears.get(id(leaf)) if isinstance(leaf, nn.Parameter) else None
                if linear is not None and linear not in self.inside:
                    self.read.add(linear)
        return func(*args, **(kwargs or {}))

    def reason(self, linear: nn.Module) -> str | None:
        """Return why a packed layer cannot stand for ``linear``, or ``None``."""
        if linear in self.read:
            return READ
        return UNCALLED if linear not in self.called else OTHER if linear in self.other else None


@torch.no_grad()
def no_plain_linears(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> dict[str, str]:
    """Return the linears that a packed layer cannot stand for: full name -> ``READ``, ``OTHER`` or ``UNCALLED``.

    Blocks with the same class and linears are one kind; the first of each kind is run, on a few tokens.

    Raises:
        InputError: the model cannot be run, or changes its weights when it is run.
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
        (type(block), *((n, type(m), stored_weight(m).shape) for n, m in own.items()))
        for (_, block), own in zip(blocks, linears, strict=True)
    ]
    first = {kind: kinds.index(kind) for kind in kinds}
    versions = {name: (p, p._version) for name, p in model.named_parameters()}
    output: Any = None
    # the classes around a language model are many, and transformers cannot run all of them
    whole = isinstance(model, PreTrainedModel) and is_multimodal(model.config)

    def call(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal output
        if index == first[kinds[index]]:
            block = blocks[index][1]
            output = type(block).forward(block, hidden, *args, **kwargs)
        if index == len(blocks) - 1 and not whole:
            raise Stop
        return output if index == first[kinds[index]] else with_hidden(output, hidden)

    watch = _Watch([linear for index in first.values() for linear in linears[index].values()])
    try:
        device = next(model.parameters()).device
        with replaced_forwards([block for _, block in blocks], call), suppress(Stop), watch:
            model(input_ids=torch.arange(1, NUM_TOKENS + 1, device=device)[None], use_cache=False)
    except Exception as error:  # an architecture can fail in any way
        raise InputError(f"{type(model).__name__} cannot be run on a few tokens: {first_line(error)}") from error
    finally:
        for hook in watch.hooks:
            hook.remove()
    if changed := [name for name, (parameter, version) in versions.items() if parameter._version != version]:
        raise InputError(
            f"{type(model).__name__} changes its own weights when it runs ({changed[0]}); such models are not supported"
        )
    return {
        f"{name}.{part}": reason
        for (name, _), kind in zip(blocks, kinds, strict=True)
        for part, linear in linears[first[kind]].items()
        if (reason := watch.reason(linear)) is not None
    }
