"""``quant.budget``: how large the result may be, and how the widths that fit are found."""

from typing import Literal, Self

from pydantic import ByteSize, Field, model_validator

from qtool.config.section import Section

Width = Literal[2, 3, 4, 8]
Estimator = Literal["variance", "hessian", "block", "fisher", "loss", "delta-loss"]
Solver = Literal["dp", "lagrangian", "greedy"]


class BudgetConfig(Section):
    """Mixed precision: the width of each group of fused linears, chosen so that all fit and the model suffers least."""

    average_bits: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="Stored bits per quantized weight, scales and zero points counted, as reports count them.",
    )
    size: ByteSize | None = Field(
        None, ge=1, description="Bytes of the weight files, e.g. 2.1GB, with all that stays in floating point."
    )
    estimator: Estimator = Field(
        "loss",
        description="What a width costs: variance (2**-2b by weight variance and input energy), hessian (squared error "
        "by input energy), block (error of the block's output), fisher (squared error by squared gradient), loss "
        "(divergence from the float model), delta-loss (gradient times error). The first three need no whole model.",
    )
    rounding: Literal["gptq", "nearest"] = Field(
        "gptq", description="How block and loss round what they measure; nearest suits methods that read no text."
    )
    solver: Solver = Field(
        "dp", description="dp: the exact optimum; lagrangian: on the convex hull; greedy: best next step."
    )
    choices: tuple[Width, ...] = Field((2, 3, 4, 8), min_length=1, description="The widths to choose from.")
    floors: dict[str, Width] = Field(
        default_factory=dict, description="Pattern of full linear names -> least bits, of all that is fused with them."
    )
    pins: dict[str, Width] = Field(
        default_factory=dict, description="Pattern of full linear names -> bits, of all that is fused with them."
    )
    num_samples: int = Field(16, ge=1, description="Calibration windows that costs are measured on, at most.")

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.average_bits is None) == (self.size is None):
            raise ValueError("give one of average_bits and size")
        if sorted(set(self.choices)) != list(self.choices):
            raise ValueError("choices must rise: [2, 3, 4, 8], or some of these")
        return self
