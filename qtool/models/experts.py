"""Mixtures of experts: the weights of a layer's experts as one linear of ``experts * out`` rows.

transformers holds the experts of a layer in parameters ``[experts, out, in]`` of a class that its decorator
``use_experts_implementation`` marks, and lets the forward of all such classes be registered. Grids are per row, so a
matrix ``[experts * out, in]`` is quantized, packed and trained as that of any linear; only products need to know where
the rows of an expert end (``quant/expert_product.py``).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qtool.models.config_values import config_value
from qtool.quant.expert_product import by_parts, product

NAME = "qtool"  # the name under which the forward is registered with transformers
CHOICES = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_k")  # config keys: experts for each token
MANY = 8  # experts for each token where the config has no such key
FUSED = ("gate_up_proj", "up_proj", "down_proj")  # names of parameters with the weights of all experts


class ExpertsLinear(nn.Linear):
    """The linears of the experts of a layer, ``weight [experts * out, in]``; biases stay with the model's own module.

    ``forward`` takes rows that are sorted by expert, and the number of rows of each expert. While the weight of a
    streamed model is on the meta device, ``read(e)`` reads that of an expert, ``[out, in]``, from the model's files.
    """

    def __init__(self, weight: Tensor, experts: int, read: Callable[[int], Tensor] | None = None) -> None:
        """Hold ``weight`` ``[experts * out, in]``."""
        rows, columns = weight.shape
        with torch.device("meta"):
            super().__init__(columns, rows, bias=False)
        self.experts, self.read = experts, read
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:  # type: ignore[override]  # rows belong to experts
        """Map ``x [rows, in]`` to ``[rows, out]``."""
        if self.read is not None and self.weight.is_meta and not x.is_meta:
            read = self.read
            return by_parts(x, counts, lambda expert, rows: F.linear(rows, read(expert).to(rows)))
        return product(x, self.weight, None, counts)

    def expert_weights(self) -> Iterator[Tensor]:
        """Yield the weight ``[out, in]`` of each expert in its stored dtype."""
        if self.read is not None and self.weight.is_meta:
            yield from map(self.read, range(self.experts))
        else:
            yield from self.weight.detach().chunk(self.experts)


def experts_forward(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # Any: many classes
    """Return the weighted sum ``[tokens, d]`` of the outputs of the experts that a router chose, for each token.

    ``hidden`` is ``[tokens, d]``, ``index`` and ``weights`` are ``[tokens, choices]``. An index beyond the last expert
    masks a choice. This is the forward of every class with the decorator; linears get their rows sorted by expert.
    """
    if hidden.is_meta:  # nothing was chosen
        return torch.zeros_like(hidden)
    choices = index.shape[-1]
    flat, order = index.reshape(-1).sort(stable=True)
    counts = torch.bincount(flat, minlength=self.num_experts)[: self.num_experts].tolist()
    order, chosen = order[: sum(counts)], flat[: sum(counts)]

    def linear(name: str, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, name)(x, counts)
        return y + getattr(self, f"{name}_bias")[chosen] if self.has_bias else y

    y = linear("gate_up_proj" if self.has_gate else "up_proj", hidden[order // choices])
    y = linear("down_proj", self._apply_gate(y) if self.has_gate else self.act_fn(y))
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return torch.zeros_like(hidden).index_add_(0, order // choices, y.to(hidden.dtype))


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def is_experts(module: nn.Module) -> Any:  # Any: a guard of the type would need a class
    """Return whether a module holds the experts of a layer: of a class with the decorator."""
    return hasattr(module, "_is_expert_parallel")


def fused_parameters(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """Return the module and the attribute of each parameter that holds a layer's experts, by its full name."""
    return {
        f"{name}.{attribute}": (module, attribute)
        for name, module in model.named_modules()
        if is_experts(module)
        for attribute in FUSED
        if isinstance(getattr(module, attribute, None), nn.Parameter)
    }


def unfuse(model: nn.Module) -> None:
    """Replace each parameter with the weights of experts by an ``ExpertsLinear`` of the same name."""
    for module, attribute in fused_parameters(model).values():
        weight = getattr(module, attribute).detach()
        weight = weight.transpose(1, 2) if module.is_transposed else weight
        put(module, attribute, ExpertsLinear(weight.reshape(-1, weight.shape[-1]), len(weight)))


def put(module: Any, attribute: str, layer: nn.Module) -> None:  # Any: many classes
    """Put ``layer`` in the place of a parameter with the weights of experts."""
    delattr(module, attribute)
    setattr(module, attribute, layer)
    module.config._experts_implementation = NAME


def expert_linears(model: nn.Module) -> dict[str, ExpertsLinear]:
    """Return all linears of experts in ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertsLinear)}


def num_experts(linear: nn.Module) -> int:
    """Return the number of experts whose weights are stacked in a linear, 1 for a plain one."""
    return linear.experts if isinstance(linear, ExpertsLinear) else 1


def choices(model: PreTrainedModel, linear: nn.Module) -> int:
    """Return the number of experts that a token goes to, 1 for a plain linear: the rows that it has in ``linear``."""
    if num_experts(linear) == 1:
        return 1
    config = model.config.get_text_config()
    given = [config_value(config, name) for name in CHOICES]
    return max((value for value in given if isinstance(value, int)), default=MANY)


def on_disk(model: PreTrainedModel, name: str, num_rows: int) -> dict[str, Tensor]:
    """Return the published names of the weight ``name`` of experts, each with the rows ``[rows]`` that it holds.

    ``name`` is that of an ``ExpertsLinear`` or of the parameter in its place; ``num_rows`` is ``experts * out``.
    transformers itself splits a tensor that holds the numbers of the rows.
    """
    module: Any = model.get_submodule(name.rpartition(".")[0])
    rows = torch.arange(num_rows).reshape(module.num_experts, -1, 1)
    rows = rows.transpose(1, 2) if module.is_transposed else rows
    return {key: found.flatten() for key, found in revert_weight_conversion(model, {name: rows}).items()}
