"""Ordinary layers in the place of packed ones: the same weights, dequantized once."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtool.models.linears import packed_weights
from qtool.quant.packed_embedding import PackedEmbedding, TiedLinear
from qtool.quant.packed_weight import PackedWeight


def expand(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> int:
    """Replace packed linears and embeddings of ``model``, which are in memory, by ordinary ones in ``dtype``.

    A head that reads one of the embeddings becomes an ordinary one that is tied to it. Return the bytes in files that
    the weights would take more than before.
    """
    layers, grown = packed_weights(model), 0
    for name in names:
        layer = layers[name]
        grown -= sum(tensor.nbytes for part, tensor in layer.state_dict().items() if part != "bias")
        if isinstance(layer, PackedEmbedding):
            table = layer.as_float(layer.dequantized(dtype))
            for path, head in list(model.named_modules()):
                if isinstance(head, TiedLinear) and head.table is layer:
                    model.set_submodule(path, _linear(head, table.weight))
            model.set_submodule(name, table)
            grown += table.weight.nbytes
        else:
            weight = layer.dequantized(dtype)
            model.set_submodule(name, _linear(layer, weight))
            grown += weight.nbytes
    return grown


def _linear(layer: PackedWeight, weight: Tensor) -> nn.Linear:
    """Return a linear with ``weight`` ``[out, in]``, itself if it is a parameter, and the bias of ``layer``."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    bias = getattr(layer, "bias", None)
    linear.bias = bias if isinstance(bias, nn.Parameter) else linear.bias
    return linear
