"""Block-AP, the first phase of EfficientQAT: one block's weights, norms, scales and zero points trained at once.

The loss is the squared difference between the quantized block on the hidden states of the quantized model and the float
block on those of the float model (``training/block_loss.py``). Masters are float32 (``training/block_training.py``).

Learning rates follow from the model and the number of steps (``training/rates.py``): a recipe gives the distances that
parameters can move, each in the unit that the description of its key states.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtool.blocks.job import Figures
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantSpec
from qtool.config.training import RoundingConfig
from qtool.methods._starts import PLAIN, starting_points
from qtool.methods.efficientqat.config import BlockConfig
from qtool.methods.gsq.training import train_assignments
from qtool.methods.rtn import round_to_nearest
from qtool.models.experts import num_experts
from qtool.models.linears import Target, linear_bias, replace_linear
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight, grouped
from qtool.quant.expert_product import block_product
from qtool.system import progress
from qtool.system.seeds import derived_seed
from qtool.training.block_loss import loss_of
from qtool.training.block_training import BlockLinear, BlockTraining, Norm, norms_of, split_windows, steps_of
from qtool.training.fit import NonFiniteError, ParamGroup, total_factor
from qtool.training.guided import EndLoss, block_weights
from qtool.training.linears import Start
from qtool.training.rates import rate, scale_group

MIDDLE = 0.5  # distance of a code from the edges of its cell, in codes
RETRIES = (1.0, 0.25, 0.0625)  # factors of the learning rates, each tried after a loss that is not finite


class LowRankBlockLinear(BlockLinear):
    """A linear with a frozen weight and a trained low-rank term inside its rounding, the idea of LR-QAT.

    ``round(w / scale + zero_point + up @ down)`` (arXiv 2406.06385): the term is in codes, and zero at the start. It
    is not the layer of ``methods/lrqat.py``, which keeps the weight at its first grid position in few bits: here the
    weight is float32 and follows its scale and zero point, which Block-AP trains as well.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        rounding: RoundingConfig,
        rank: int,
        experts: int = 1,
    ) -> None:
        """Draw ``down`` with mean square ``1 / rank``: a step of ``up`` by ``t`` moves weights by about ``t`` codes.

        Each of the ``experts`` whose weights are stacked has a term of its own.
        """
        super().__init__(weight, bias, spec, rounding)
        self.weight.requires_grad_(False)
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(derived_seed(rows, columns))
        self.experts = experts
        down = torch.randn(experts * rank, columns, generator=generator) / math.sqrt(rank)
        self.down = nn.Parameter(down.to(self.weight))
        self.up = nn.Parameter(self.weight.new_zeros(rows, rank))

    def grid_weight(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return the weight in grid units plus the low-rank term, ``[out, groups, group_size]``."""
        term = block_product(self.up, self.down, self.experts)
        return super().grid_weight(scale, zero_point) + grouped(term, self.spec)


def starts_of(task: BlockTask, config: BlockConfig, start: Start | None) -> dict[str, QuantizedWeight]:
    """Return grid and codes that each linear starts at, and compute the float outputs while the block is unchanged."""
    if start is None:
        return starting_points(task, config.init)
    task.pass_floats()
    return {target.name: untrained(target, start) for target in task.targets}


def untrained(target: Target, start: Start | None) -> QuantizedWeight:
    """Return the codes of ``start``, or the weight of ``target`` rounded to nearest."""
    if start is None:
        return round_to_nearest(target.weight, target.spec, PLAIN)
    return start.source.quantized(target.name)._replace(spec=target.spec)


def reads_text(config: BlockConfig) -> bool:
    """Return whether blocks are trained, or start from ranges or codes that are found on text."""
    return bool(config.epochs or config.gsq.epochs) or (config.init_from is None and config.init != "minmax")


def place_block(task: BlockTask, loaded: LoadedModel, start: Start | None) -> None:
    """Pack the starting point of a block that is not trained: the codes of ``start``, or the weights, rounded."""
    if start is not None:
        start.take_floats(loaded, f"{task.name}.")
    for target in task.targets:
        task.pack(target, untrained(target, start))


def make_layer(target: Target, start: QuantizedWeight, config: BlockConfig) -> BlockLinear:
    """Make a layer at its starting point, and mark its parameters that train.

    GPTQ's codes correct each other's errors. Weights near the edge of a cell would change them in the first steps, so
    the weights start in the middle of their cells, and leave only if their gradients keep their sign.
    """
    arguments = target.weight, linear_bias(target.linear), target.spec, config.rounding
    layer = BlockLinear(*arguments)
    if config.low_rank:
        layer = LowRankBlockLinear(*arguments, config.low_rank, num_experts(target.linear))
    layer.start_from(start, MIDDLE if config.init == "gptq" or config.init_from is not None else 0.0)
    weights = "weights" in config.trains
    if isinstance(layer, LowRankBlockLinear):
        layer.up.requires_grad_(weights)
        layer.down.requires_grad_(weights)
    else:
        layer.weight.requires_grad_(weights)
    layer.scale.requires_grad_("scales" in config.trains)
    layer.zero_point.requires_grad_("zero_points" in config.trains and not target.spec.symmetric)
    return layer


def groups_of(
    layers: Sequence[BlockLinear], norms: Sequence[Norm], total: float, config: BlockConfig
) -> list[ParamGroup]:
    """Return the parameters that train, with learning rates; ``total`` is the sum of the schedule's factors."""
    groups = []
    for layer in layers:
        step = float(layer.scale.detach().abs().mean())
        of_weight = rate(config.travel * step, total, config.weight_lr)
        found = [
            ParamGroup([layer.weight], of_weight),
            scale_group(layer.scale, config.scale_share, total, config.quant_lr),
            ParamGroup([layer.zero_point], rate(config.zero_travel, total, config.quant_lr)),
        ]
        if isinstance(layer, LowRankBlockLinear):
            found.append(ParamGroup([layer.up], of_weight / step))
            found.append(ParamGroup([layer.down], of_weight / step * float(layer.down.detach().abs().mean())))
        groups += [group for group in found if group.parameters[0].requires_grad]
    for _, master, _ in norms:
        distance = config.norm_travel * float(master.detach().abs().mean())
        groups.append(ParamGroup([master], rate(distance, total, config.weight_lr)))
    return groups


def quantize_block(
    task: BlockTask,
    loaded: LoadedModel,
    config: BlockConfig,
    start: Start | None,
    seed: int,
    guide: EndLoss | None = None,
) -> Figures:
    """Train the block, then its assignments if the recipe asks for that, and pack the best state.

    After a loss that is not finite, the training starts again at lower learning rates; if the last attempt fails too,
    the block stays at its starting point, which its figure ``fallback`` shows.
    """
    starts = starts_of(task, config, start)
    loss = loss_of(task, config.last_block_loss, weights=block_weights(guide, task))
    if start is not None:
        start.take_floats(loaded, f"{task.name}.")
    first = [(norm.parameter, norm.parameter.detach().clone()) for norm in norms_of(task, loaded)]
    windows, held = split_windows(sum(task.inputs.share.sizes), config.validation_samples)
    num_steps = steps_of(config, len(windows))
    total = total_factor(num_steps, config.optim)
    figures: Figures = {}
    for retries, share in enumerate(RETRIES):
        figures = {"start_loss": math.nan, "loss": math.nan, "retries": float(retries), "fallback": 0.0}
        norms = norms_of(task, loaded) if "norms" in config.trains else []
        layers = {target.name: make_layer(target, starts[target.name], config) for target in task.targets}
        for target in task.targets:
            replace_linear(task.block, task.local_name(target), layers[target.name])
        training = BlockTraining(task, loss, list(layers.values()), norms)
        groups = [group._replace(lr=group.lr * share) for group in groups_of(training.layers, norms, total, config)]
        try:
            fitted = training.run(
                groups, num_steps, windows, held, config.batch_size, config.optim, derived_seed(seed, task.index)
            )
        except NonFiniteError as error:
            left = RETRIES[retries + 1 :]
            again = f"; the block is trained again, at {left[0]:g} of its learning rates" if left else ""
            progress.note(f"{task.name}: {error}{again}")
            for parameter, value in first:
                parameter.data.copy_(value)
                parameter.requires_grad_(False)
            continue
        training.expand()
        found = {name: layer.quantized for name, layer in layers.items()}
        measured = [each for each in fitted.validation if each == each]
        figures |= {"start_loss": fitted.validation[0], "loss": min(measured, default=math.nan)}
        break
    else:
        progress.note(f"{task.name}: no attempt had a finite loss; the block keeps the codes that it started with")
        found = starts
        figures["fallback"] = 1.0
    if config.gsq.epochs:
        for norm in norms:
            norm.parameter.requires_grad_(False)
        found, more = train_assignments(task, found, loss, config.gsq, seed)
        figures |= {f"gsq_{name}": value for name, value in more.items()}
    for target in task.targets:
        task.pack(target, found[target.name])
    return figures
