"""ParetoQ: one training for all widths, with a quantizer for each (Liu et al., arXiv 2502.02631).

At 2 bits levels lie in equal distances to both sides of zero, ``-0.75 .. 0.75`` of a learned ``alpha`` (stretched
elastic quantization): none of four levels is spent on zero, and none is alone on its side. Such a grid has its zero
point between two codes, which integers do not hold, so it needs ``quant.float_zero: true`` and ``symmetric: false``,
and exports that know only integers refuse it. Elsewhere, with more bits or on grids that a recipe wants with integers,
scales are learned as in ``lsq``, from the largest weight over the highest level, ``max|w| / (2**(num_bits - 1) - 1)``.

Where we differ: the paper trains everything on billions of tokens from a rate of 1e-5 or 2e-5 (``lr`` and ``scale_lr``
take those); here only the quantized linears train, and the default rates follow the model and the budget.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.config.plugins import Method
from qtool.config.sections import QuantConfig
from qtool.config.training import RoundingConfig
from qtool.models.loading import LoadedModel, Target, linear_bias
from qtool.quant.affine import grouped, stored_scale
from qtool.quant.packed_linear import QuantLinear, SeqLinear
from qtool.system import progress
from qtool.training.linears import GridConfig, grid_groups, train_linears

SEQ_BITS = 2


class Config(GridConfig):
    """ParetoQ: stretched elastic quantization at 2 bits, learned step sizes above, end to end."""

    name: Literal["paretoq"] = "paretoq"
    rounding: RoundingConfig = Field(
        RoundingConfig(scale_gradient="lsq"), description="The gradient of rounding and clamping."
    )


def make_linear(target: Target, config: Config) -> QuantLinear:
    """The layer that trains in the place of a target."""
    bias, spec = linear_bias(target.linear), target.spec
    if spec.num_bits == SEQ_BITS and spec.float_zero:
        return SeqLinear(target.weight, bias, spec, config.rounding)
    layer = QuantLinear(target.weight, bias, spec, config.rounding)
    if spec.symmetric:
        largest = grouped(layer.weight.detach(), spec).abs().amax(-1)
        layer.scale.data = stored_scale(torch.where(largest == 0, 1.0, largest) / (spec.middle - 1), spec)
    return layer


def run(
    loaded: LoadedModel, tokens: Tensor, quant: QuantConfig, config: Config, seed: int, labels: Tensor | None = None
) -> dict[str, list[float]]:
    """Train on ``tokens`` ``[n, t]``, of which those in ``labels`` are learned, and pack."""
    plain = [t for t in loaded.targets(quant) if t.spec.num_bits == SEQ_BITS and not t.spec.float_zero]
    if plain:
        progress.note(
            f"{len(plain)} linears of {SEQ_BITS} bits are trained with integer zero points, as lsq does; ParetoQ's "
            "levels need quant.symmetric: false and quant.float_zero: true"
        )
    return train_linears(loaded, tokens, quant, config, seed, make_linear, grid_groups, labels)


METHOD = Method(
    "qat",
    "weights and scales trained on levels around zero (ParetoQ)",
    Config,
    run,
    end_to_end=lambda config: True,
    takes_labels=True,
)
