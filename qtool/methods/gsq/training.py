"""The training of the assignments of one block, from codes that another method found."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from qtool.blocks.job import Figures
from qtool.blocks.task import BlockTask
from qtool.methods.gsq.assignment import AssignmentLinear, Ramp
from qtool.methods.gsq.config import AssignmentConfig
from qtool.models.linears import linear_bias, replace_linear
from qtool.quant.affine import QuantizedWeight
from qtool.system import progress
from qtool.system.seeds import derived_seed
from qtool.training.block_loss import BlockLoss
from qtool.training.block_training import BlockTraining, split_windows, steps_of
from qtool.training.fit import NonFiniteError, ParamGroup, total_factor
from qtool.training.rates import rate, scale_group

# losses of hard codes on validation windows at the start and in the best state, those of soft and of hard codes in the
# last state, and the share of codes that the best state has changed
FIGURES = ("start_loss", "loss", "soft_loss", "hard_loss", "changed")
SOFT_GAP = 1.05  # factor between the losses of hard and of soft codes above which a note is written


class AssignmentTraining(BlockTraining):
    """The training of a block whose linears are ``AssignmentLinear``; it measures hard codes."""

    layers: Sequence[AssignmentLinear]
    soft_loss = math.nan  # of soft codes, on the windows of the last measurement

    def measure(self, indices: list[int]) -> float:
        """Return the mean loss of some windows with hard codes; ``soft_loss`` becomes that with soft ones."""
        for soft in (True, False):
            for layer in self.layers:
                layer.soft = soft
            found = super().measure(indices)
            if soft:
                self.soft_loss = found
        return found


def train_assignments(
    task: BlockTask,
    starts: dict[str, QuantizedWeight],
    distance: BlockLoss,
    config: AssignmentConfig,
    seed: int,
    positions: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, QuantizedWeight], Figures]:
    """Train the codes and scales of the block's targets from ``starts`` to lower ``distance``.

    Return the best state by name, which may be the start, and the figures of the block. After a loss that is not
    finite the start is returned, which the figure ``fallback`` shows. Logits start at the distance of the codes from
    ``positions`` ``[out, in]``, the weights in grid units by name, or if these are not given from the start codes.
    """
    windows, held = split_windows(sum(task.inputs.share.sizes), config.validation_samples)
    num_steps = steps_of(config, len(windows))
    total = total_factor(num_steps, config.optim)
    block_seed = derived_seed(seed, task.index)
    layers: dict[str, AssignmentLinear] = {}
    for index, target in enumerate(task.targets):
        layers[target.name] = AssignmentLinear(
            starts[target.name],
            None if positions is None else positions[target.name],
            linear_bias(target.linear),
            Ramp(*config.strength),
            Ramp(*config.temperature),
            num_steps,
            derived_seed(block_seed, index * num_steps),
        )
        replace_linear(task.block, task.local_name(target), layers[target.name])
    training = AssignmentTraining(task, distance, list(layers.values()), [])
    figures = dict.fromkeys(FIGURES, math.nan) | {"fallback": 0.0}
    if not layers:
        return {}, figures
    try:
        fitted = training.run(
            groups_of(training.layers, total, config),
            num_steps,
            windows,
            held,
            config.batch_size,
            config.optim,
            block_seed,
        )
    except NonFiniteError as error:
        progress.note(f"{task.name}: {error}; the block stays at its start")
        return starts, figures | {"fallback": 1.0}
    start, last = fitted.validation[0], fitted.validation[-1]
    if num_steps and last > SOFT_GAP * training.soft_loss:
        progress.note(
            f"{task.name}: the loss of hard codes, {last:.3g}, is {last / training.soft_loss:.2f} times that of soft "
            "ones at the end; a lower last temperature or a larger last strength brings them together"
        )
    found = {name: layer.quantized for name, layer in layers.items()}
    changed = sum(int((each.codes != starts[name].codes).sum()) for name, each in found.items())
    figures |= {
        "start_loss": start,
        "loss": min((loss for loss in fitted.validation if loss == loss), default=math.nan),
        "soft_loss": training.soft_loss,
        "hard_loss": last,
        "changed": changed / sum(each.codes.numel() for each in found.values()),
    }
    return found, figures


def groups_of(layers: Sequence[AssignmentLinear], total: float, config: AssignmentConfig) -> list[ParamGroup]:
    """Return what trains, with learning rates; ``total`` is the sum of the schedule's factors."""
    groups = []
    for layer in layers:
        groups.append(ParamGroup([layer.logits], rate(config.travel, total, None)))
        groups.append(scale_group(layer.scale, config.scale_share, total))
    return groups
