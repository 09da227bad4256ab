"""The recipe keys of end-loss weights: how far the loss of the whole model decides what a block's error costs."""

from typing import Literal

from pydantic import Field

from qtool.config.section import Section


class GuidedConfig(Section):
    """Weights of tokens and channels from gradients of the loss of the float model."""

    power: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Exponent of the mean squared gradient that weighs a token or a channel. 0: no weights, and no "
        "backward pass; 1: the squared gradient itself.",
    )
    loss: Literal["sampled", "text"] = Field(
        "sampled",
        description="Labels of the cross entropy whose gradients count. sampled: one token for each position, drawn "
        "from the float model's prediction, which gives the true Fisher information; text: the next token.",
    )
    clip: float = Field(
        0.999,
        gt=0,
        le=1,
        description="Quantile to which squared gradients of tokens are limited, because a few tokens, the first of "
        "windows above all, have most of their sum; 1: no limit.",
    )


class GuidedHessian(GuidedConfig):
    """End-loss weights in the Hessians of linears."""

    slices: int = Field(
        1,
        ge=1,
        description="Slices of the output channels of each linear, each with token weights and a Hessian of its own. "
        "Time and factorisations grow with their number.",
    )
