"""Plain quantization-aware training of the whole model: only weights train, and the grid follows them.

In every step the range of a group is the current extremes of its weights, so nothing is clipped and only the weights
are learned (the scheme of LLM-QAT, arXiv 2305.17888, for weights; the range passes no gradient). The gradient passes
straight through the rounding unless ``rounding`` says otherwise. ``lsq`` learns the grid as well; the difference of the
two is what that gains.

With ``init_from`` the weights start in the cells of the checkpoint's codes, and their own extremes make the grid. That
is the checkpoint's grid, up to the rounding of scales, where its ranges were the extremes, and a similar one elsewhere.
"""

from typing import Literal

from torch import Tensor

from qtool.config.training import WeightsConfig
from qtool.models.linears import Target, linear_bias
from qtool.quant.affine import minmax_qparams
from qtool.quant.trained_linear import QuantLinear
from qtool.training.fit import ParamGroup
from qtool.training.linears import trained_method, weight_group


class Config(WeightsConfig):
    """Plain quantization-aware training: weights trained through the rounding, end to end."""

    name: Literal["qat"] = "qat"


class MinMaxLinear(QuantLinear):
    """A linear whose grid always spans the extremes of its weights."""

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return the grid of the weights' extremes, without gradients."""
        return minmax_qparams(self.weight.detach(), self.spec)


def make_linear(target: Target, config: Config) -> QuantLinear:
    """Make the layer that trains in the place of a target."""
    return MinMaxLinear(target.weight, linear_bias(target.linear), target.spec, config.rounding)


def groups_of(layer: QuantLinear, config: WeightsConfig, total: float) -> list[ParamGroup]:
    """Return the parameters of a layer that train, its weights; distances are divided by ``total``."""
    return [weight_group(layer, config, total)]


METHOD = trained_method("qat", "weights trained end to end on their min-max grid", Config, make_linear, groups_of)
