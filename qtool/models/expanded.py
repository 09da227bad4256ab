"""Ordinary layers in the place of packed ones: the same weights, dequantized once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qtool.models.experts import ExpertsLinear, is_experts
from qtool.models.linears import packed_weights
from qtool.quant.packed_embedding import PackedEmbedding
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.packed_weight import PackedWeight


def expand(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> int:
    """Replace packed linears and embeddings of ``model``, which are in memory, by ordinary ones in ``dtype``.

    Return the bytes in files that the weights would take more than before.
    """
    layers, grown = packed_weights(model), 0
    for name in names:
        layer = layers[name]
        weight = layer.dequantized(dtype)
        put_float(model, name, layer, weight)
        grown += weight.nbytes - sum(tensor.nbytes for part, tensor in layer.state_dict().items() if part != "bias")
    return grown


def put_float(model: nn.Module, name: str, layer: PackedWeight, weight: Tensor) -> None:
    """Put an ordinary layer with ``weight`` ``[out, in]`` in the place of ``layer``, which is called ``name``.

    A head that reads a packed embedding becomes an ordinary one that is tied to it.
    """
    if isinstance(layer, PackedEmbedding):
        table = layer.as_float(weight)
        heads = {path: head for path, head in model.named_modules() if head in layer.readers}
        model.set_submodule(name, table)
        for path, head in heads.items():
            model.set_submodule(path, _linear(table.weight, head.bias))
        return
    assert isinstance(layer, PackedLinear)
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    experts = owner.num_experts if is_experts(owner) else None
    model.set_submodule(name, _linear(weight, layer.bias) if experts is None else ExpertsLinear(weight, experts))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear with ``weight`` ``[out, in]``, itself if a parameter, and ``bias`` ``[out]`` in its dtype."""
    with torch.device("meta"):  # no random weights are drawn
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return linear
