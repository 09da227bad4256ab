"""GSQ: learn which code each weight takes.

Docs later.
"""

from functools import partial
from typing import ClassVar, Literal

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Figures, Job, Method, Result
from qtool.blocks.task import BlockTask
from qtool.config.training import Preset, PresetConfig, Presets, preset_field
from qtool.methods._starts import Init, starting_points
from qtool.methods.gsq.config import AssignmentConfig
from qtool.methods.gsq.training import train_assignments
from qtool.quant.affine import to_grid
from qtool.training.block_loss import BlockLoss

PRESETS: Presets = {"light": {"epochs": 1, "min_steps": 25}, "best": {"epochs": 16, "min_steps": 400}}


class Config(AssignmentConfig, PresetConfig):
    """GSQ: assignments learned by Gumbel softmax, from GPTQ's codes."""

    presets: ClassVar[Presets] = PRESETS

    name: Literal["gsq"] = "gsq"
    preset: Preset = preset_field(PRESETS)
    init: Init = "gptq"
    near: bool = False


def quantize_block(task: BlockTask, config: Config, seed: int) -> Figures:
    """Quantize the block by GPTQ, train the assignments from its codes, and pack the best state."""
    own = task.through(task.inputs) if config.goal == "own" else None
    weights = {target.name: target.weight.clone() for target in task.targets} if config.near else {}
    starts = starting_points(task, config.init)
    positions = {n: to_grid(w, *starts[n][1:]).flatten(1) for n, w in weights.items()} if config.near else None
    assert task.float_outputs is not None
    found, figures = train_assignments(task, starts, BlockLoss(own or task.float_outputs), config, seed, positions)
    for target in task.targets:
        task.pack(target, found[target.name])
    return figures


def run(job: Job, config: Config) -> Result:
    """Quantize the blocks in order on the text of the job; the seed fixes the windows and the noise of every step."""
    step = partial(quantize_block, config=config, seed=job.seed)
    return run_blocks(job, step, with_float_states=True)


METHOD = Method("ptq", "assignments learned by Gumbel softmax, block by block", Config, run)
