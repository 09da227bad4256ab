"""Training of one block: its linears and norms are masters, the loss is the distance from the float block.

Each weight is rounded once in a step, however many parts the step's windows are processed in; the gradients of the
parts are summed in the weights that the block multiplies by, in its dtype, and are differentiated through the rounding
once. Of several processes each runs those windows of a step that it holds, and ``fit`` averages their gradients.
Methods differ in the linears that they put into the block: all derive from ``BlockLinear``.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qtool.blocks.task import BlockTask
from qtool.config.training import OptimConfig
from qtool.models.loaded import LoadedModel
from qtool.quant.expert_product import product
from qtool.quant.rounding import straight_through
from qtool.quant.trained_linear import QuantLinear
from qtool.system import distributed, progress
from qtool.training.block_loss import BlockLoss, Windows
from qtool.training.fit import FitResult, ParamGroup, fit, windows_of_step

HELD_OUT = 8  # at most one window in this many is held out for validation
NUM_CHECKS = 8  # number of states that are compared with the start


class BlockLinear(QuantLinear):
    """A linear in training; ``forward`` multiplies by ``expanded``, which is set once for a whole step."""

    expanded: Tensor  # quantized_weight() in the dtype of computation

    def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]``."""
        return product(x, self.expanded, self.bias, counts)


class Norm(NamedTuple):
    """A norm's weight in the block, its float32 master, and the dtype in which it is stored."""

    parameter: nn.Parameter
    master: nn.Parameter
    storage: torch.dtype


def norms_of(task: BlockTask, loaded: LoadedModel) -> list[Norm]:
    """Return the weights of the block's norms: parameters called ``weight`` with one dimension."""
    norms = []
    for name, parameter in task.block.named_parameters():
        if name.endswith("weight") and parameter.dim() == 1 and parameter.is_floating_point():
            storage = loaded.file_dtypes.get(task.full_name(name), loaded.storage_dtype)
            norms.append(Norm(parameter, nn.Parameter(parameter.detach().float().clone()), storage))
    return norms


def split_windows(count: int, num_validation: int) -> tuple[list[int], list[int]]:
    """Return the windows to train on, and the windows on which the best state is chosen, spread evenly.

    If there are too few windows to hold any out, the best state is chosen on windows that are trained on as well.
    """
    held = min(num_validation, count // HELD_OUT)
    wanted = held or min(num_validation, count)
    chosen = [i * count // wanted + count // (2 * wanted) for i in range(wanted)]
    out = set(chosen) if held else set()
    return [i for i in range(count) if i not in out], chosen


class Passes(Protocol):
    """The keys that give the number of steps of the training of a block."""

    @property
    def epochs(self) -> float:
        """Passes over the windows."""

    @property
    def min_steps(self) -> int:
        """Minimum number of steps."""

    @property
    def batch_size(self) -> int:
        """Windows per step."""


def steps_of(config: Passes, num_windows: int) -> int:
    """Return the number of steps of a training of a block on ``num_windows`` windows."""
    return max(config.min_steps, round(config.epochs * num_windows / config.batch_size)) if config.epochs else 0


class _Carrier(torch.autograd.Function):
    """A loss that is known already, and whose gradient for each value is known: the ``gradients`` by ``count``."""

    @staticmethod
    def forward(ctx: Any, loss: float, gradients: list[Tensor], count: float, *values: Tensor) -> Tensor:
        ctx.gradients, ctx.count = gradients, count
        return values[0].new_tensor(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = []
        while ctx.gradients:  # each is freed as soon as it is cast
            found.append(ctx.gradients.pop(0).float().div_(ctx.count).mul_(grad))
        return None, None, None, *found


class BlockTraining:
    """The training of one block: its layers and norms, and the distance of its output from the float block's."""

    def __init__(
        self, task: BlockTask, distance: BlockLoss, layers: Sequence[BlockLinear], norms: Sequence[Norm]
    ) -> None:
        """Lower ``distance``, the loss of the block's outputs of ``task.inputs``."""
        self.task, self.distance, self.layers, self.norms = task, distance, layers, norms
        self.inputs = Windows(task.inputs)

    def parts(self, indices: list[int]) -> Iterator[list[int]]:
        """Split those of ``indices`` that this process holds into parts of a size for which a call was recorded."""
        return self.inputs.parts(indices, self.task.calls)

    def part_loss(self, indices: list[int]) -> Tensor:
        """Return the summed loss of some windows, which the block processes at once, in float32."""
        return self.distance.summed(indices, self.task.forward(self.inputs[indices]))

    def expand(self) -> list[tuple[Tensor, Tensor]]:
        """Set the weights of the block; return pairs (weight with its graph, detached leaf that the block uses)."""
        pairs = []
        for layer in self.layers:
            weight = layer.quantized_weight()
            layer.expanded = weight.detach().to(self.task.compute).requires_grad_(weight.requires_grad)
            pairs.append((weight, layer.expanded))
        for parameter, master, storage in self.norms:
            value = straight_through(master, master.detach().to(storage).float())
            parameter.data.copy_(value.detach())
            parameter.requires_grad_(value.requires_grad)
            pairs.append((value, parameter))
        return pairs

    def loss(self, indices: list[int]) -> Tensor:
        """Return the mean loss of some windows, whose gradient reaches the masters.

        Of several processes each returns its share; the mean of all shares is the mean loss.
        """
        pairs = [(value, leaf) for value, leaf in self.expand() if leaf.requires_grad]
        total, count = 0.0, 0
        for part in self.parts(indices):
            loss = self.part_loss(part)
            loss.backward()
            total += float(loss.detach())
            count += self.distance.count(part)
        processes = distributed.place()[1]
        share = distributed.summed(count)[0] / processes  # the mean of the shares divided by it is the mean loss
        reached = [(value, leaf) for value, leaf in pairs if leaf.grad is not None or processes > 1]
        # other processes may have windows in this step
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for _, leaf in reached]
        for _, leaf in reached:
            leaf.grad = None
        values = [value for value, _ in reached]
        found: Tensor = _Carrier.apply(total / share, gradients, share, *values)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def measure(self, indices: list[int]) -> float:
        """Return the mean loss of some windows."""
        self.expand()
        parts = list(self.parts(indices))
        loss, count = sum(float(self.part_loss(part)) for part in parts), sum(map(self.distance.count, parts))
        total, number = distributed.summed(loss, count)
        return total / number

    def run(
        self,
        groups: list[ParamGroup],
        num_steps: int,
        windows: list[int],
        held: list[int],
        batch_size: int,
        optim: OptimConfig,
        seed: int,
    ) -> FitResult:
        """Train on ``windows``, and leave the parameters in their best state on ``held``.

        Raises:
            NonFiniteError: A loss or gradient is not finite.
        """
        size = min(batch_size, len(windows))

        def loss_of_step(step: int) -> Tensor:
            reach(step)
            for layer in self.layers:
                layer.set_progress(step / num_steps)
            return self.loss([windows[i] for i in windows_of_step(step, size, len(windows), seed)])

        with progress.counted(f"training on {len(windows)} windows", num_steps) as reach:
            found = fit(
                groups,
                num_steps,
                loss_of_step,
                optim,
                validate=partial(self.measure, held),
                validate_every=max(1, num_steps // NUM_CHECKS),
            )
            reach(num_steps)
        return found
