"""``quant.budget``: the size limit of the result, and the search for bit widths that meet it."""

from typing import Literal, Self

from pydantic import ByteSize, Field, model_validator

from qtool.config.section import Section

Width = Literal[2, 3, 4, 8]
CostEstimatorName = Literal["variance", "hessian", "block", "fisher", "loss", "delta-loss"]
Solver = Literal["dp", "lagrangian", "greedy"]


class BudgetConfig(Section):
    """Mixed precision: choose the width of each group of fused linears, and of tables that get a grid.

    The widths are those of the least cost within a size limit.
    """

    average_bits: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="Limit: stored bits per quantized weight on average, including scales and zero points, and the "
        "tables that are quantized. Give this, size or share.",
    )
    size: ByteSize | None = Field(
        None,
        ge=1,
        description="Limit: bytes of the weight files, e.g. 2.1GB, including tensors that stay in floating point. "
        "Give this, share or average_bits.",
    )
    share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Limit: bytes of the weight files as a share of those of the float model, e.g. 0.32. Give this, "
        "size or average_bits.",
    )
    estimator: CostEstimatorName = Field(
        "loss",
        description="Measure of the cost of b bits. variance: 4**-b times weight variance times input energy; "
        "hessian: squared weight error times input energy; block: error of the block's output; fisher: squared weight "
        "error times squared gradient; loss: KL divergence from the float model; delta-loss: gradient times weight "
        "error. The first three run block by block and never need the whole model in memory.",
    )
    rounding: Literal["gptq", "nearest"] = Field(
        "gptq",
        description="Rounding of the weights that the estimators block and loss measure; nearest suits methods that "
        "use no calibration text.",
    )
    solver: Solver = Field(
        "dp",
        description="Search for the widths. dp: the exact optimum; lagrangian: the optimum on the convex hull; "
        "greedy: repeat the step that saves the most cost per size.",
    )
    choices: tuple[Width, ...] = Field(
        (2, 3, 4, 8), min_length=1, description="Bit widths to choose from, in rising order."
    )
    floors: dict[str, Width] = Field(
        default_factory=dict,
        description="Pattern of full names of linears or tables -> minimum number of bits, also for the linears that "
        "are fused with a match.",
    )
    pins: dict[str, Width] = Field(
        default_factory=dict,
        description="Pattern of full names of linears or tables -> bits, also for the linears that are fused with a "
        "match; e.g. {lm_head: 8}.",
    )
    num_samples: int = Field(16, ge=1, description="Calibration windows to measure the costs on, at most.")

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if [self.average_bits, self.size, self.share].count(None) != 2:
            raise ValueError("give one of average_bits, size and share")
        if sorted(set(self.choices)) != list(self.choices):
            raise ValueError("choices must be in rising order, without repeats: [2, 3, 4, 8], or some of these")
        return self
