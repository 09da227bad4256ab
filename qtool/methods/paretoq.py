"""ParetoQ: one training for all widths, with a quantizer for each (Liu et al., arXiv 2502.02631).

At 2 bits the levels lie at equal distances on both sides of zero, ``-0.75 .. 0.75`` of a learned ``alpha`` (stretched
elastic quantization): no level is spent on zero, and each side has two. The zero point of such a grid lies between two
codes, so it needs ``quant.float_zero: true`` and ``symmetric: false``, and export formats with integer zero points
refuse it. With more bits, or with integer zero points, scales are learned as in ``lsq``; they start at the largest
weight over the highest level, ``max|w| / (2**(num_bits - 1) - 1)``.

Where we differ: the paper trains all parameters on billions of tokens at a learning rate of 1e-5 or 2e-5 (``lr`` and
``scale_lr`` take these); here only the quantized linears train, and the default learning rates follow from the model
and the number of steps.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.blocks.job import Job, Method, Result
from qtool.config.quant import QuantSpec
from qtool.config.training import GridConfig, RoundingConfig
from qtool.models.linears import Target, linear_bias
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight, grouped, stored_scale
from qtool.quant.rounding import PLAIN
from qtool.quant.trained_linear import QuantLinear
from qtool.system import progress
from qtool.system.errors import InputError
from qtool.training.linears import grid_groups, train_linears

SEQ_BITS = 2  # width of stretched elastic quantization


class Config(GridConfig):
    """ParetoQ: stretched elastic quantization at 2 bits, learned step sizes above, end to end."""

    positive_scales: ClassVar[bool] = True

    name: Literal["paretoq"] = "paretoq"
    rounding: RoundingConfig = Field(
        RoundingConfig(scale_gradient="lsq"), description="Gradient of rounding and clamping."
    )


def make_linear(target: Target, config: Config) -> QuantLinear:
    """Make the layer that trains in the place of a target."""
    bias, spec = linear_bias(target.linear), target.spec
    if spec.num_bits == SEQ_BITS and spec.float_zero:
        return SeqLinear(target.weight, bias, spec, config.rounding)
    layer = QuantLinear(target.weight, bias, spec, config.rounding)
    if spec.symmetric:
        largest = grouped(layer.weight.detach(), spec).abs().amax(-1)
        layer.scale.data = stored_scale(torch.where(largest == 0, 1.0, largest) / (spec.middle - 1), spec)
    return layer


def run(job: Job, config: Config) -> Result:
    """Train on the text of the job and pack; the seed determines the order of windows."""
    plain = [t for t in job.targets if t.spec.num_bits == SEQ_BITS and not t.spec.float_zero]
    if plain:
        progress.note(
            f"{len(plain)} linears of {SEQ_BITS} bits are trained with integer zero points, as lsq does; ParetoQ's "
            "levels need quant.symmetric: false and quant.float_zero: true"
        )
    return train_linears(job, config, make_linear, grid_groups)


METHOD = Method(
    "qat",
    "weights and scales trained on levels around zero (ParetoQ)",
    Config,
    run,
    end_to_end=lambda config: True,
)


class SeqLinear(QuantLinear):
    """A linear with stretched elastic quantization (ParetoQ, arXiv 2502.02631): levels at equal distances from zero.

    ``alpha (round(clip(w / alpha, -0.99, 0.99) n - 1/2) + 1/2) / n`` with ``n = 2**(num_bits - 1)`` is our grid with
    ``scale = alpha / n`` and the zero point fixed at ``qmax / 2``, between two codes; therefore ``float_zero``. At 2
    bits the levels are ``-0.75 alpha .. 0.75 alpha``. The gradient of a weight is zero beyond ``|w / alpha| = 0.99``,
    close to the edges of the outer cells; the gradient of ``alpha`` is LSQ's, with all weights of the matrix counted in
    its factor. The trained parameter is the scale: an optimizer that ignores the size of gradients moves ``alpha`` by
    ``n`` times its step.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, spec: QuantSpec, rounding: RoundingConfig = PLAIN) -> None:
        """Start from ``alpha``, the largest absolute weight of each group."""
        assert spec.float_zero, "levels at equal distances from zero need a zero point between codes"
        super().__init__(weight, bias, spec, rounding)
        alpha = affine.grouped(self.weight.detach(), spec).abs().amax(-1)
        self.scale.data = affine.stored_scale(torch.where(alpha == 0, 1.0, alpha) / spec.middle, spec)
        self.zero_point.data.fill_(spec.qmax / 2)
        self.zero_point.requires_grad_(False)

    @property
    def scale_gradient_factor(self) -> float:
        """The factor ``1 / sqrt(numel(W) (2**(num_bits - 1) - 1))``."""
        return 1 / math.sqrt(self.num_weights * (self.spec.middle - 1))

    def start_from(self, quantized: QuantizedWeight, margin: float = 0.0) -> None:
        """Start at exactly the codes of ``quantized``, whose zero points must be ``qmax / 2``.

        ``margin`` is the least distance of a weight from the edges of its code's cell, in codes.

        Raises:
            InputError: ``quantized`` has another grid.
        """
        if not bool((quantized.zero_point == self.spec.qmax / 2).all()):
            raise InputError(
                f"the weights to start from have zero points other than {self.spec.qmax / 2}, the value that this "
                "method fixes; start from a checkpoint of the same method, or from the float model"
            )
        super().start_from(quantized, margin)

    def grid_weight(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return the weight in grid units, clipped at ``|w / alpha| = 0.99``, ``[out, groups, group_size]``."""
        grid = super().grid_weight(scale, zero_point)
        edge = 0.99 * self.spec.middle
        return grid.clamp(self.spec.qmax / 2 - edge, self.spec.qmax / 2 + edge)
