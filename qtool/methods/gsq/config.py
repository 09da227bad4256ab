"""The recipe keys of the training of assignments, of the method ``gsq`` and of a stage of ``efficientqat``."""

from pydantic import Field, PositiveFloat

from qtool.config.section import Section
from qtool.config.training import OptimConfig


class AssignmentConfig(Section):
    """The training of the assignments of a block: which code each weight takes."""

    epochs: float = Field(4.0, ge=0, description="Passes over the calibration windows for each block; 0: no training.")
    min_steps: int = Field(100, ge=0, description="Minimum number of steps per block, if epochs gives fewer.")
    batch_size: int = Field(4, ge=1, description="Windows per step.")
    travel: float = Field(
        2.0,
        ge=0,
        description="Distance that a logit can move over all steps; at the start those of neighbouring codes are 1 "
        "below that of the weight's code.",
    )
    scale_share: float = Field(
        0.1,
        ge=0,
        description="Distance that a scale can move over all steps, as a share of its size at the start.",
    )
    strength: tuple[PositiveFloat, PositiveFloat] = Field(
        (3.0, 15.0), description="Factor of the logits beside the Gumbel noise, at the start and at the end."
    )
    temperature: tuple[PositiveFloat, PositiveFloat] = Field(
        (2.0, 0.05), description="Temperature of the softmax over the codes, at the start and at the end."
    )
    validation_samples: int = Field(
        8,
        ge=1,
        description="Windows on which the best state of a block is chosen, with hard codes. They are not trained on, "
        "but at most one window in eight is held out; of fewer than eight windows, all are trained on.",
    )
    optim: OptimConfig = Field(
        OptimConfig(optimizer="lion", betas=(0.9, 0.95), final_share=0.1),
        description="Optimizer and learning rate schedule.",
    )
