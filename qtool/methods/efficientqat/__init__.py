"""EfficientQAT: train all parameters of one block at a time, then only the scales, end to end.

Block-AP (``block_ap.py``) trains all weights, norms, scales and zero points of a block, so that the quantized block on
the hidden states of the quantized model gives the output of the float block on those of the float model: weights
correct the rounding errors of other weights, and a block corrects the blocks before it. E2E-QP (``e2e_qp.py``) keeps
the codes and trains the scales on a loss of the whole model (Chen et al., arXiv 2407.11062). E2E-QP alone, from
weights rounded to nearest (``init: minmax``, ``epochs: 0``), is PEQA (arXiv 2305.14152); from another checkpoint
(``init_from``, ``epochs: 0``) it is a second phase on a text of its own.

Where we differ: learning rates follow from the model and the number of steps (the paper's belong to models of 7B and
4096 windows of 2048 tokens; ``weight_lr``, ``quant_lr`` and ``e2e.lr`` take them); zero points are clamped where they
are used and where they are packed; windows are shuffled; a block ends in its best state on windows that are held out;
after a loss that is not finite a block is trained again at lower learning rates, and at last left at its start; and
E2E-QP follows the float model's distribution rather than the text, of which there may be little. The start of a block
is decisive: from searched ranges Block-AP helps, from GPTQ's codes it lowers each block's error and raises the model's.
``init: minmax`` is the paper's.
docs/benchmarks.md has the figures.
"""

from functools import partial
from typing import Literal

from pydantic import Field

from qtool.blocks.driver import gather, run_blocks
from qtool.blocks.job import Job, Method, Result
from qtool.blocks.states import PROBED_WINDOWS
from qtool.methods.efficientqat.block_ap import place_block, quantize_block, reads_text
from qtool.methods.efficientqat.config import BlockConfig, ScaleConfig
from qtool.methods.efficientqat.e2e_qp import train_scales
from qtool.system import distributed
from qtool.training.guided import end_loss
from qtool.training.linears import Start


class Config(BlockConfig):
    """EfficientQAT: Block-AP, then E2E-QP."""

    name: Literal["efficientqat"] = "efficientqat"
    e2e: ScaleConfig = Field(ScaleConfig(), description="The second phase, E2E-QP: end-to-end training of the scales.")


def run(job: Job, config: Config) -> Result:
    """Run both phases on the text of the job, the second on its labels; the seed determines the windows of a step."""
    start = None if config.init_from is None else Start(config.init_from, job)
    errors = {} if start is None else start.take_embeddings(job)
    if reads_text(config):
        guide = end_loss(job, config.guided)
        step = partial(quantize_block, loaded=job.loaded, config=config, start=start, seed=job.seed, guide=guide)
        result = run_blocks(job, step, with_float_states=True)
    else:  # hidden states for the figures alone: those of the whole text of a second phase may be terabytes
        few = job.first(PROBED_WINDOWS)
        with distributed.alone():  # they may be fewer windows than processes
            result = run_blocks(few, partial(place_block, loaded=job.loaded, start=start))
        distributed.barrier()
    if not trains_scales(config):
        return result._replace(weight_errors={**errors, **result.weight_errors})
    gather(job, on_device=config.e2e.sharding == "none")
    return Result(result.series + train_scales(job, config.e2e), {})


def trains_scales(config: Config) -> bool:
    """Return whether there is a second phase."""
    return config.e2e.steps != 0


METHOD = Method(
    "efficientqat",
    "all parameters of a block trained at once, then the scales end to end",
    Config,
    run,
    end_to_end=trains_scales,
)
