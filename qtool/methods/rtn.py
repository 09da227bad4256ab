"""Round-to-nearest (RTN): each weight goes to the nearest code of its group's grid. No data is needed.

The range of a group is its minimum and maximum (methods 6.1), or is searched: the min-max range is shrunk to whatever
lowers ``sum |w - Q(w)|**norm`` (methods 2.6 and 6.2; the scaling factor gamma of methods 4.3 is the same search).
A norm above 2 cares more for the large weights. There is nothing to train and no order to keep.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from qtool import progress
from qtool.config import MethodConfig, QuantConfig, QuantSpec
from qtool.methods import Method
from qtool.models import LoadedModel, linear_bias, replace_linear
from qtool.quant.affine import QuantizedWeight, minmax_qparams, quantize
from qtool.quant.linear import PackedLinear
from qtool.quant.ranges import search_qparams


class Config(MethodConfig):
    """Round to nearest."""

    name: Literal["rtn"] = "rtn"
    range: Literal["minmax", "search"] = Field(
        "minmax", description="How a group's range is chosen: its extremes, or a search for the smallest error."
    )
    norm: float = Field(2.4, gt=0, description="Exponent of the weight error that the range search lowers.")


def round_to_nearest(weight: Tensor, spec: QuantSpec, config: Config) -> QuantizedWeight:
    """``weight`` ``[out, in]`` on its own grid."""
    find = minmax_qparams(weight, spec) if config.range == "minmax" else search_qparams(weight, spec, config.norm)
    return QuantizedWeight(quantize(weight, *find, spec), *find, spec)


def run(loaded: LoadedModel, tokens: None, quant: QuantConfig, config: Config, seed: int) -> dict[str, list[float]]:
    """Quantize every target; ``tokens`` and ``seed`` are not used."""
    targets = loaded.targets(quant)
    for target in progress.track(targets, "rounding linears", len(targets)):
        packed = PackedLinear.from_quantized(
            round_to_nearest(target.weight, target.spec, config), linear_bias(target.linear)
        )
        replace_linear(loaded.model, target.name, packed)
    return {}


METHOD = Method("ptq", "round to nearest, min-max or searched range", Config, run, needs_data=lambda config: False)
