"""Layers of SignRound in the middle of their training."""

import torch

from qtool.config.quant import QuantSpec
from qtool.methods.signround import SignRoundLinear
from qtool.quant.ranges import search_qparams


def random_layer(spec: QuantSpec, seed: int = 0) -> SignRoundLinear:
    """Return a layer in the middle of its training, with random offsets and factors."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 32, generator=generator) * 0.05
    layer = SignRoundLinear(weight, None, spec, search_qparams(weight, spec))
    layer.offset.data = torch.rand(layer.offset.shape, generator=generator) - 0.5
    layer.factors.data = torch.rand(layer.factors.shape, generator=generator) * 0.6 + 0.6
    return layer
