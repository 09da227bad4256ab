"""The recipe keys of EfficientQAT: Block-AP's, and E2E-QP's in a section inside them."""

from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

from pydantic import Field

from qtool.config.guided import GuidedConfig
from qtool.config.training import (
    OF_DEPTH,
    EndToEndConfig,
    LastBlockConfig,
    OptimConfig,
    Preset,
    Presets,
    TrainedConfig,
    preset_field,
)
from qtool.methods.gsq.config import AssignmentConfig

Part = Literal["weights", "norms", "scales", "zero_points"]
PARTS: tuple[Part, ...] = get_args(Part)
RENAMED = {  # former keys of both phases, see Section.renamed
    "scale_travel": "scale_share, a share of the scale itself (scale_travel of other methods is in quantization steps)"
}

PRESETS: Presets = {
    "light": {
        "epochs": 0.5,
        "min_steps": 25,
        "travel": 0.2,
        "scale_share": 0.04,
        "zero_travel": 0.2,
        "norm_travel": 0.02,
        "e2e": {"steps": 24, "validation_samples": 2},
    },
    "best": {"epochs": 8, "min_steps": 400, "e2e": {"epochs": 12, "min_steps": 128}},
}


class BlockConfig(LastBlockConfig, TrainedConfig):
    """The keys of Block-AP."""

    renamed: ClassVar[Mapping[str, str]] = RENAMED
    presets: ClassVar[Presets] = PRESETS

    preset: Preset = preset_field(PRESETS)
    init: Literal["minmax", "search", "gptq"] = Field(
        "search",
        description="Start of each block, unless init_from is given. minmax: the extremes of each group; search: the "
        "range with the smallest error of its weights, each input channel weighted by its mean square; gptq: the codes "
        "of gptq with its defaults.",
    )
    trains: tuple[Part, ...] = Field(
        PARTS, min_length=1, description="Parameters that Block-AP trains; zero_points on asymmetric grids only."
    )
    low_rank: int = Field(
        0,
        ge=0,
        description="Rank of a term inside the rounding that trains in place of the weights; 0: the weights train.",
    )
    epochs: float = Field(2.0, ge=0, description="Passes of Block-AP over the calibration windows; 0: no training.")
    min_steps: int = Field(
        100, ge=0, description="Minimum number of steps of Block-AP per block, if epochs gives fewer."
    )
    batch_size: int = Field(4, ge=1, description="Windows per step of Block-AP.")
    travel: float = Field(
        0.5,
        ge=0,
        description="Distance that a weight can move over all steps, in quantization steps (the mean scale of its "
        "linear); sets the learning rate of weights.",
    )
    scale_share: float = Field(
        0.1,
        ge=0,
        description="Distance that a scale can move over all steps, as a share of its size at the start; sets the "
        "learning rate of scales.",
    )
    zero_travel: float = Field(
        0.5,
        ge=0,
        description="Distance that a zero point can move over all steps, in codes; sets the learning rate of zero "
        "points.",
    )
    norm_travel: float = Field(
        0.05,
        ge=0,
        description="Distance that a norm's weight can move over all steps, as a share of the mean absolute weight of "
        "the norm; sets the learning rate of norms.",
    )
    weight_lr: float | None = Field(
        None,
        ge=0,
        description="Learning rate of weights and norms, in place of travel and norm_travel; unset: these decide. The "
        "paper has 2e-5 at 2 bits, else 1e-5.",
    )
    quant_lr: float | None = Field(
        None,
        ge=0,
        description="Learning rate of scales and zero points, in place of scale_share and zero_travel; unset: these "
        "decide. The paper has 1e-4.",
    )
    validation_samples: int = Field(
        8,
        ge=1,
        description="Windows on which the best state of a block is chosen. They are not trained on, but at most one "
        "window in eight is held out; of fewer than eight windows, all are trained on.",
    )
    guided: GuidedConfig = Field(
        GuidedConfig(),
        description="End-loss weights of tokens and channels in the loss of Block-AP; the last block with "
        "last_block_loss: kl has none.",
    )
    optim: OptimConfig = Field(OptimConfig(eps=1e-12), description="Optimizer and learning rate schedule of Block-AP.")
    gsq: AssignmentConfig = Field(
        AssignmentConfig(epochs=0.0),
        description="A training of the assignments of each block, which begins at the codes of Block-AP, as in the "
        "method gsq; off unless its epochs are given.",
    )


class ScaleConfig(EndToEndConfig):
    """The keys of E2E-QP."""

    renamed: ClassVar[Mapping[str, str]] = {**EndToEndConfig.renamed, **RENAMED}

    steps: int | None = Field(
        None,
        ge=0,
        description="Number of training steps, in place of epochs; 0: no second phase; unset: epochs decides.",
    )
    epochs: float = Field(3.0, gt=0, description="Passes over the calibration windows.")
    trains: tuple[Literal["scales", "zero_points"], ...] = Field(
        ("scales", "zero_points"),
        min_length=1,
        description="Parameters that E2E-QP trains; zero_points on asymmetric grids only.",
    )
    scale_share: float = Field(
        0.2,
        ge=0,
        description="Distance that a scale can move over all steps, as a share of its size at the start; sets the "
        "learning rate of scales. " + OF_DEPTH,
    )
    zero_travel: float = Field(
        0.5,
        ge=0,
        description="Distance that a zero point can move over all steps, in codes; sets the learning rate of zero "
        "points. " + OF_DEPTH,
    )
    lr: float | None = Field(
        None,
        ge=0,
        description="Learning rate of scales and zero points, in place of scale_share and zero_travel; unset: these "
        "decide. The paper has 2e-5 at 2 bits, else 1e-5.",
    )
