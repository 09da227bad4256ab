"""LSQ: quantization-aware training of the whole model, with the steps of the grid learned beside the weights.

Every forward rounds the weights, and the gradient passes through the rounding to the weights and to the scales (Esser
et al., arXiv 1902.08153), on asymmetric grids to the zero points too (LSQ+, arXiv 2004.09576). The loss is on the
model's output, so that later blocks make up for earlier ones. Nothing but the quantized linears trains.

Where we differ: a scale belongs to a group of weights; the ranges at the start are searched, where the paper's
``2 mean|w| / sqrt(Qp)`` was made for layers that still have everything to learn; gradients of scales are not divided by
``sqrt(n Qp)`` unless ``rounding.scale_gradient`` says so, which Adam does not notice; and the rates follow the model
and the budget: a weight whose gradient never changes its sign moves by ``travel`` quantization steps in the whole
training, and so do the ends of a range by ``scale_travel`` steps. ``lr`` and ``scale_lr`` take absolute rates, as
papers give them.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.config.training import GridConfig
from qtool.models.linears import Target, linear_bias
from qtool.quant.affine import grouped, minmax_qparams, stored_scale
from qtool.quant.ranges import search_qparams
from qtool.quant.trained_linear import QuantLinear
from qtool.training.linears import grid_groups, trained_method


class Config(GridConfig):
    """LSQ: weights, scales and zero points trained through the rounding, end to end."""

    name: Literal["lsq"] = "lsq"
    init: Literal["minmax", "search", "lsq"] = Field(
        "search", description="Ranges at the start: the extremes, the least error of weights, or 2 mean|w| / sqrt(Qp)."
    )


def lsq_qparams(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """``scale = 2 mean|w| / sqrt(Qp)`` around zero, ``Qp`` the codes above the middle; each ``[out, groups]``."""
    highest = spec.qmax - spec.middle
    mean = grouped(weight, spec).abs().mean(-1)
    scale = stored_scale(torch.where(mean == 0, 1.0, mean) * (2 / highest**0.5), spec)
    return scale, torch.full_like(scale, spec.middle)


INITS = {"minmax": minmax_qparams, "search": search_qparams, "lsq": lsq_qparams}


def make_linear(target: Target, config: Config) -> QuantLinear:
    """The layer that trains in the place of a target."""
    layer = QuantLinear(target.weight, linear_bias(target.linear), target.spec, config.rounding)
    layer.scale.data, layer.zero_point.data = INITS[config.init](target.weight, target.spec)
    return layer


METHOD = trained_method(
    "qat", "all weights and scales trained end to end (learned step size)", Config, make_linear, grid_groups
)
