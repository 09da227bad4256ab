"""LSQ: quantization-aware training of the whole model, in which the scales are learned beside the weights.

Every forward rounds the weights, and the gradient passes through the rounding to the weights and to the scales (Esser
et al., arXiv 1902.08153), on asymmetric grids to the zero points too (LSQ+, arXiv 2004.09576). The loss is on the
model's output, so that later blocks can correct errors of earlier ones. Only the quantized linears train.

Where we differ: a scale belongs to a group of weights; the ranges at the start are searched, where the paper's
``2 mean|w| / sqrt(Qp)`` was made for layers that still have everything to learn; gradients of scales are not divided by
``sqrt(n Qp)`` unless ``rounding.scale_gradient`` says so, which makes no difference to Adam; and learning rates follow
from the model and the number of steps: a weight whose gradient never changes its sign moves by ``travel`` quantization
steps in the whole training, the ends of a range by ``scale_travel`` steps. ``lr`` and ``scale_lr`` take absolute
learning rates, as papers give them.
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
        "search",
        description="Range of each group at the start. minmax: its extremes; search: the range with the smallest error "
        "of its weights; lsq: the scale 2 mean|w| / sqrt(Qp), with Qp the highest level.",
    )


def lsq_qparams(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return ``scale = 2 mean|w| / sqrt(Qp)`` and the middle as zero point, each ``[out, groups]``.

    ``Qp`` is the number of codes above the middle.
    """
    highest = spec.qmax - spec.middle
    mean = grouped(weight, spec).abs().mean(-1)
    scale = stored_scale(torch.where(mean == 0, 1.0, mean) * (2 / highest**0.5), spec)
    return scale, torch.full_like(scale, spec.middle)


INITS = {"minmax": minmax_qparams, "search": search_qparams, "lsq": lsq_qparams}


def make_linear(target: Target, config: Config) -> QuantLinear:
    """Make the layer that trains in the place of a target."""
    layer = QuantLinear(target.weight, linear_bias(target.linear), target.spec, config.rounding)
    layer.scale.data, layer.zero_point.data = INITS[config.init](target.weight, target.spec)
    return layer


METHOD = trained_method(
    "qat", "all weights and scales trained end to end (learned step size)", Config, make_linear, grid_groups
)
