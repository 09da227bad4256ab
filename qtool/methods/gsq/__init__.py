"""GSQ: learn which code each weight takes, by Gumbel softmax, so that the block's output changes least.

Training that rounds in the forward and passes the gradient straight through (``efficientqat``, ``lsq``) shows a weight
the slope at its own code, and the weight takes another code only when it has crossed the border. Here each weight has a
logit for every code that it may take, and the forward mixes the codes by the softmax of logits and Gumbel noise: the
gradient compares all of them. As temperature falls and logits grow the mixture becomes a choice, which is packed (GSQ,
arXiv 2604.18556; ``assignment.py`` has the formulas). Logits and group scales of all linears of a block train at once
with Lion (arXiv 2302.06675). At 2 bits all four codes are candidates, at more bits five around the start code.
``efficientqat`` has the same training as a stage between its two phases (``method.gsq``).

Where we differ: the whole block trains at once, where the reference trains its attention first and leaves queries and
keys at GPTQ's codes; a block ends in its best state on windows that are held out, judged with hard codes, the start
among them; logits start without noise, so that no training means GPTQ's codes, bit for bit; they are in units of the
first step between neighbouring codes, where the reference has 0.03, so its strength of 100 to 500 is 3 to 15 here; its
learning rate of 2e-4 over 640 steps is a ``travel`` of 2.3; its weight decay, which shrinks logits by 7 % in a whole
training, is left out; grids may be asymmetric, with zero points that stay; ``goal: float`` steers towards the float
model, the reference (``inputs``) towards the float block on the quantized model's hidden states.

It has not paid yet: at 2 bits on the built-in model it lowers the errors of blocks, and the model gets worse, as
Block-AP does from GPTQ's codes.
"""

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Figures, Job, Method, Result
from qtool.blocks.task import BlockTask
from qtool.config.guided import GuidedConfig
from qtool.config.training import LastBlockConfig, Preset, PresetConfig, Presets, preset_field
from qtool.methods._starts import Init, starting_points
from qtool.methods.gsq.config import AssignmentConfig
from qtool.methods.gsq.training import train_assignments
from qtool.quant.affine import to_grid
from qtool.training.block_loss import loss_of
from qtool.training.guided import EndLoss, block_weights, end_loss

PRESETS: Presets = {"light": {"epochs": 1, "min_steps": 25}, "best": {"epochs": 16, "min_steps": 400}}


class Config(AssignmentConfig, LastBlockConfig, PresetConfig):
    """GSQ: assignments learned by Gumbel softmax."""

    presets: ClassVar[Presets] = PRESETS

    name: Literal["gsq"] = "gsq"
    preset: Preset = preset_field(PRESETS)
    init: Init = Field(
        "gptq",
        description="Codes at the start. gptq: those of gptq with its defaults; search: the nearest in the range with "
        "the smallest error of the weights, each input channel weighted by its mean square; minmax: the nearest "
        "between the extremes of each group. With search and minmax a logit falls with the distance of its code from "
        "the weight, with gptq from the start code.",
    )
    goal: Literal["float", "inputs"] = Field(
        "float",
        description="Output towards which a block is trained. float: that of the float model, so that a block corrects "
        "the blocks before it; inputs: that of the float block on the hidden states of the quantized model.",
    )
    guided: GuidedConfig = Field(
        GuidedConfig(),
        description="End-loss weights of tokens and channels in the loss; the last block with last_block_loss: kl has "
        "none.",
    )

    @model_validator(mode="after")
    def _predictions_are_of_the_float_model(self) -> "Config":
        if self.goal == "inputs" and self.last_block_loss == "kl":
            raise ValueError("last_block_loss: kl compares with the float model's predictions; it needs goal: float")
        return self


def quantize_block(task: BlockTask, config: Config, seed: int, guide: EndLoss | None = None) -> Figures:
    """Find the starting codes of the block, train its assignments, and pack the best state."""
    own = task.through(task.inputs) if config.goal == "inputs" else None
    starts = starting_points(task, config.init)
    positions = None
    if config.init != "gptq":
        positions = {t.name: to_grid(t.weight, *starts[t.name][1:]).flatten(1) for t in task.targets}
    weights = block_weights(guide, task)
    loss = loss_of(task, config.last_block_loss, weights=weights, goal=own)
    found, figures = train_assignments(task, starts, loss, config, seed, positions)
    for target in task.targets:
        task.pack(target, found[target.name])
    return figures


def run(job: Job, config: Config) -> Result:
    """Quantize the blocks in order on the text of the job; the seed fixes the windows and the noise of every step."""
    step = partial(quantize_block, config=config, seed=job.seed, guide=end_loss(job, config.guided))
    return run_blocks(job, step, with_float_states=True)


METHOD = Method("ptq", "assignments learned by Gumbel softmax, block by block", Config, run)
