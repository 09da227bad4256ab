"""Every method that trains the whole model, quickly."""

from typing import Any

from torch import Tensor

from qtool.config.plugins import Method
from qtool.config.quant import QuantConfig
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight

W4 = QuantConfig(num_bits=4, group_size=16)
QUICK = {"batch_size": 2, "travel": 0.3}


def train(
    method: Method, loaded: LoadedModel, tokens: Tensor, quant: QuantConfig = W4, **settings: Any
) -> tuple[dict[str, QuantizedWeight], dict[str, list[float]]]:
    series = method.run(loaded, tokens, quant, method.config(**QUICK | settings), 0)
    return {name: layer.quantized for name, layer in packed_linears(loaded.model).items()}, series
