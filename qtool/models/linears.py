"""Decoder blocks and linears in a module tree: finding, reading and replacing them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.config.quant import QuantConfig, QuantSpec
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.trained_linear import QuantLinear
from qtool.system.errors import InputError


@dataclass(frozen=True)
class Target:
    """A linear to quantize: its full name, the float module, its grid, and the index of its block."""

    name: str
    linear: nn.Module
    spec: QuantSpec
    block: int

    @property
    def weight(self) -> Tensor:
        """Float32 weight ``[out, in]``, a copy where the module stores another dtype or the transpose."""
        return dense_weight(self.linear)

    @property
    def stored_weight(self) -> Tensor:
        """The same in the dtype it has, a view."""
        return stored_weight(self.linear)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(out, in)``, without touching the weight."""
        rows, columns = self.stored_weight.shape
        return rows, columns


def shortened(faults: list[str]) -> Iterator[str]:
    """Each fault, those that differ only in block numbers and counts once, with how many more there are."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(re.sub(r"\d+", "0", fault), []).append(fault)
    for same in kinds.values():
        yield same[0] + (f" (and {len(same) - 1} more like it)" if len(same) > 1 else "")


def unmatched(quant: QuantConfig, names: list[str]) -> Iterator[str]:
    for pattern in quant.overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=1, cutoff=0.0)
            yield f"quant.overrides: no linear matches '{pattern}'; the nearest of {len(names)} names is {near[0]}"


def weight_of(module: nn.Module) -> nn.Parameter:
    """The parameter ``weight`` of a linear or a norm, as it is stored."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def stored_weight(linear: nn.Module) -> Tensor:
    """Weight ``[out, in]`` of an ``nn.Linear`` or a ``Conv1D`` (it stores the transpose) in its own dtype, a view."""
    weight = weight_of(linear).detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def dense_weight(linear: nn.Module) -> Tensor:
    """``stored_weight`` in float32."""
    return stored_weight(linear).float()


def linear_bias(linear: nn.Module) -> Tensor | None:
    """The bias ``[out]`` of a linear, if it has one."""
    bias = linear.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks.

    Raises:
        InputError: when there are none, or when they hold fused experts (3-D parameters).
    """
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
        and any(isinstance(part, nn.Linear | Conv1D | PackedLinear | QuantLinear) for part in module.modules())
    ]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers; it is not supported"
        )
    _, name, blocks = max(lists, key=lambda entry: entry[0])
    fused = [key for key, p in blocks.named_parameters() if p.dim() > 2]
    if fused:
        raise InputError(
            f"{name}.{fused[0]} is a fused {blocks.get_parameter(fused[0]).dim()}-D parameter (mixture of experts); "
            "such models are not supported yet: only linears with 2-D weights are"
        )
    return name, blocks


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of the module called ``name``."""
    model.set_submodule(name, layer)


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed linear by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
