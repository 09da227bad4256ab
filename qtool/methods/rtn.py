"""Round-to-nearest (RTN): each weight goes to the nearest code of its group's grid. No data is needed.

The range of a group is its minimum and maximum, or it is searched: the min-max range is shrunk where that lowers
``sum |w - Q(w)|**norm``, as LR-QAT (arXiv 2406.06385) and GPTQ's range search do. A norm above 2 gives more weight to
the errors of large weights. ``range_factor`` multiplies the extremes of all groups, the scaling factor of arXiv
2411.06084 as its abstract describes it. Nothing is trained, and the order of linears does not matter.
"""

from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job, Method, Result
from qtool.blocks.shares import by_rows
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantSpec
from qtool.config.sections import MethodConfig
from qtool.quant.affine import QuantizedWeight, dequantize, minmax_qparams, on_grid
from qtool.quant.ranges import search_qparams


class Config(MethodConfig):
    """Round to nearest."""

    name: Literal["rtn"] = "rtn"
    range: Literal["minmax", "search"] = Field(
        "minmax",
        description="Range of each group. minmax: its extremes; search: the range with the smallest error of its "
        "weights.",
    )
    range_factor: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor of the range minmax: below 1 the largest weights are clipped, and steps are smaller.",
    )
    norm: float = Field(2.4, gt=0, description="Exponent of the weight error that the range search lowers.")

    @model_validator(mode="after")
    def _factor_acts(self) -> Self:
        if self.range == "search" and self.range_factor != 1:
            raise ValueError("range_factor acts only with range: minmax; the search finds a factor for each group")
        return self


def round_to_nearest(weight: Tensor, spec: QuantSpec, config: Config) -> QuantizedWeight:
    """Round ``weight`` ``[out, in]`` to a grid that is fitted to it."""
    if config.range == "search":
        grid = search_qparams(weight, spec, config.norm)
    else:
        grid = minmax_qparams(weight if config.range_factor == 1 else weight * config.range_factor, spec)
    return on_grid(weight, grid, spec)


def run(job: Job, config: Config) -> Result:
    """Quantize every target; the text and the seed of the job are not used.

    The series ``weight_error`` has ``|Q(w) - w|**2 / |w|**2`` over the linears of each block.
    """

    def quantize_block(task: BlockTask) -> dict[str, float]:
        change = total = 0.0
        for target in task.targets:
            weight = target.weight
            rounded = by_rows(weight, target.spec, partial(round_to_nearest, spec=target.spec, config=config))
            change += float((dequantize(*rounded) - weight).square().sum())
            total += float(weight.square().sum())
            task.pack(target, rounded)
        return {"weight_error": change / total if total else 0.0}

    return run_blocks(job, quantize_block)


METHOD = Method(
    "ptq",
    "round to nearest, min-max or searched range",
    Config,
    run,
    needs_data=lambda config: False,
    round_weight=round_to_nearest,
)
