"""LLM-QAT: quantization-aware training without data, distilled from the float model (Liu et al., arXiv 2305.17888).

The model writes the text that it is trained on (``data.source: generated``, the default: the first tokens are its most
likely ones, the others are sampled), and the loss is the divergence from the float model. On symmetric grids the scale
is the largest weight of a group over the highest level, ``max|w| / (2**(num_bits - 1) - 1)``, computed anew in every
step: no weight is clipped, and the lowest code is not used, so 2 bits give three levels. Asymmetric grids span the
extremes. The paper has one scale for each output channel: ``quant.group_size: -1``.

Where we differ: the divergence is a mean over tokens, where the paper's code divides by the number of windows, which
makes the learning rate depend on their length; and only the quantized linears train, at learning rates that follow from
the model and the number of steps.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from qtool.config.training import WeightsConfig
from qtool.methods.qat import MinMaxLinear, groups_of
from qtool.models.linears import Target, linear_bias
from qtool.quant.affine import grouped, stored_scale
from qtool.training.linears import trained_method


class Config(WeightsConfig):
    """LLM-QAT: weights distilled from the float model, on text that it writes itself."""

    positive_scales: ClassVar[bool] = True

    name: Literal["llmqat"] = "llmqat"


class AbsMaxLinear(MinMaxLinear):
    """A linear whose symmetric grid ends at its largest absolute weight, on both sides."""

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return the grid of the current weights, without gradients."""
        if not self.spec.symmetric:
            return super().qparams()
        largest = grouped(self.weight.detach(), self.spec).abs().amax(-1)
        scale = stored_scale(torch.where(largest == 0, 1.0, largest) / (self.spec.middle - 1), self.spec)
        return scale, torch.full_like(scale, self.spec.middle)


def make_linear(target: Target, config: Config) -> AbsMaxLinear:
    """Make the layer that trains in the place of a target."""
    return AbsMaxLinear(target.weight, linear_bias(target.linear), target.spec, config.rounding)


METHOD = trained_method("qat", "weights distilled end to end without data (LLM-QAT)", Config, make_linear, groups_of)
