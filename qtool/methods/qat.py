"""Plain quantization-aware training of the whole model: only weights train, the grid follows them.

In every step the range of a group is the extremes of its weights as they are now, so nothing is clipped and nothing but
the weights is learned (the scheme of LLM-QAT, arXiv 2305.17888, for weights; the range passes no gradient). The
gradient passes straight through the rounding unless ``rounding`` says otherwise. What there is to gain by learning the
grid too is the difference to ``lsq``.

``init_from`` starts from weights in the cells of the checkpoint's codes, whose own extremes then make the grid: the
checkpoint's, up to the rounding of scales, where its ranges were the extremes, and something near it where not.
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
    """A linear whose grid covers its weights, whatever they are."""

    def qparams(self) -> tuple[Tensor, Tensor]:
        """The grid of the weights' extremes, without gradients."""
        return minmax_qparams(self.weight.detach(), self.spec)


def make_linear(target: Target, config: Config) -> QuantLinear:
    """The layer that trains in the place of a target."""
    return MinMaxLinear(target.weight, linear_bias(target.linear), target.spec, config.rounding)


def groups_of(layer: QuantLinear, config: WeightsConfig, total: float) -> list[ParamGroup]:
    """What trains of a layer: the weights; ``total`` is the sum of the schedule's factors."""
    return [weight_group(layer, config, total)]


METHOD = trained_method("qat", "weights trained end to end on their min-max grid", Config, make_linear, groups_of)
