"""GSQ: learn which code each weight takes.

Docs later.
"""

from functools import partial
from typing import Literal

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Figures, Job, Method, Result
from qtool.blocks.task import BlockTask
from qtool.config.sections import MethodConfig
from qtool.methods.gsq.config import AssignmentConfig
from qtool.methods.gsq.training import solved, train_assignments
from qtool.training.block_loss import BlockLoss


class Config(AssignmentConfig, MethodConfig):
    """GSQ: assignments learned by Gumbel softmax, from GPTQ's codes."""

    name: Literal["gsq"] = "gsq"


def quantize_block(task: BlockTask, config: Config, seed: int) -> Figures:
    """Quantize the block by GPTQ, train the assignments from its codes, and pack the best state."""
    own = task.through(task.inputs) if config.goal == "own" else None
    starts = solved(task)
    assert task.float_outputs is not None
    found, figures = train_assignments(task, starts, BlockLoss(own or task.float_outputs), config, seed)
    for target in task.targets:
        task.pack(target, found[target.name])
    return figures


def run(job: Job, config: Config) -> Result:
    """Quantize the blocks in order on the text of the job; the seed fixes the windows and the noise of every step."""
    step = partial(quantize_block, config=config, seed=job.seed)
    return run_blocks(job, step, with_float_states=True)


METHOD = Method("ptq", "assignments learned by Gumbel softmax, block by block", Config, run)
