"""SignRound: learn for each weight whether it is rounded up or down, so that the block's output changes least.

A weight goes to ``round(w / scale + V)`` with an offset ``V`` of its own, zero at the start, and the ends of each
group's range get factors, one at the start. Both follow only the sign of their gradient, ``p -= lr * sign(dL/dp)``, at
a learning rate that falls linearly to zero: the distance that they can move is known beforehand, whatever the size of
the loss (Cheng et al., arXiv 2309.05516). All linears of a block are trained at once. The loss is the squared
difference between the quantized block on the hidden states of the quantized model and the float block on those of the
float model, so a block also corrects errors of the blocks before it; tokens and channels count by their errors relative
to their own sizes (``training/block_loss.py``).

From SignRoundV2 (arXiv 2512.04746) come two options: symmetric ranges can be searched first, with each input channel
weighted by its mean square (``range: search``), and below 4 bits the loss can leave out the largest differences
(``outliers``, 0.001 there). Both are off: ranges that start at the extremes and shrink in training gave better results
at every width.

Where we differ: the best of several states is kept, judged on windows that stay the same, where the reference compares
losses of different minibatches, which differ more by their windows than by their state; a step takes 4 windows and not
8; errors are relative to tokens and channels; and the search lowers the third power of errors, because squares clip so
much that 2 bits get much worse. docs/benchmarks.md has the figures.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job, Method, Result
from qtool.blocks.task import BlockTask
from qtool.config.guided import GuidedConfig
from qtool.config.quant import QuantSpec
from qtool.config.training import LastBlockConfig, Preset, PresetConfig, Presets, preset_field
from qtool.models.linears import Target, linear_bias, replace_linear
from qtool.quant.affine import QuantizedWeight, grouped, minmax_qparams, stored_scale, stored_zero_point
from qtool.quant.expert_product import product
from qtool.quant.ranges import search_qparams
from qtool.quant.trained_linear import QuantLinear
from qtool.system import distributed, progress
from qtool.system.seeds import derived_seed
from qtool.training.block_loss import BlockLoss, Windows, loss_of
from qtool.training.fit import windows_of_step
from qtool.training.guided import EndLoss, block_weights, end_loss

# light: half the travel in a quarter of the steps, so a step is twice one of default
PRESETS: Presets = {
    "light": {"iterations": 50, "travel": 0.25, "range_travel": 0.25},
    "best": {"iterations": 1000, "data": {"num_samples": 512}},
}
FACTORS = (0.05, 2.0)  # bounds of the factor of a range
NUM_CHECKS = 8  # largest number of states that are compared with the start
CHECK_STEPS = 12  # fewest steps from one of them to the next
FEW_BITS = 3  # largest width at which outliers are left out of the loss


class Config(LastBlockConfig, PresetConfig):
    """SignRound: rounding and ranges learned block by block from the signs of gradients."""

    presets: ClassVar[Presets] = PRESETS

    name: Literal["signround"] = "signround"
    preset: Preset = preset_field(PRESETS)
    iterations: int = Field(200, ge=0, description="Steps of signed gradient descent per block.")
    batch_size: int = Field(4, ge=1, description="Calibration windows per step.")
    travel: float = Field(
        0.5, ge=0, description="Distance that a rounding offset can move over all steps, in quantization steps."
    )
    range_travel: float = Field(
        0.5,
        ge=0,
        description="Distance that the factor of a range can move over all steps; a factor is 1 at the start and stays "
        f"within {FACTORS[0]:g} and {FACTORS[1]:g}.",
    )
    range: Literal["minmax", "search"] = Field(
        "minmax",
        description="Range of each group at the start. minmax: its extremes; search, on symmetric grids: the range "
        "with the smallest error of its weights, each input channel weighted by its mean square.",
    )
    norm: float = Field(3.0, gt=0, description="Exponent of the weight error that the range search lowers.")
    outliers: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the output differences, the largest ones, that the loss leaves out in blocks with 2-bit "
        "or 3-bit linears; 0: none.",
    )
    check_samples: int = Field(16, ge=1, description="Calibration windows on which the best state is chosen.")
    guided: GuidedConfig = Field(
        GuidedConfig(),
        description="End-loss weights of tokens and channels in the loss; the last block with last_block_loss: kl has "
        "none.",
    )


class SignRoundLinear(QuantLinear):
    """A linear of which only the rounding offsets and the range factors train.

    ``forward`` multiplies by ``expanded``, which the caller sets once for many calls.
    """

    expanded: Tensor  # quantized_weight() in the dtype of computation

    def __init__(self, weight: Tensor, bias: Tensor | None, spec: QuantSpec, grid: tuple[Tensor, Tensor]) -> None:
        """Start on ``grid``: scale and zero point ``[out, groups]``."""
        super().__init__(weight, bias, spec)
        self.requires_grad_(False)
        self.scale.data, self.zero_point.data = grid
        self.offset = nn.Parameter(torch.zeros_like(grouped(self.weight, spec)))
        # [1, out, groups]; asymmetric [2, out, groups]: of the lower and the upper end
        self.factors = nn.Parameter(self.scale.new_ones(1 if spec.symmetric else 2, *self.scale.shape))

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return the grid with its range multiplied by the factors, as it is stored; factors of one change no bit."""
        if self.spec.symmetric:
            return stored_scale(self.scale * self.factors[0], self.spec), self.zero_point
        below, above = self.factors[0] * self.zero_point, self.factors[1] * (self.spec.qmax - self.zero_point)
        scale = stored_scale(self.scale * ((below + above) / self.spec.qmax), self.spec)
        return scale, stored_zero_point(below * self.scale / scale, scale, self.spec)

    def grid_weight(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return the weight in grid units plus its offset, ``[out, groups, group_size]``."""
        return super().grid_weight(scale, zero_point) + self.offset

    def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]``."""
        return product(x, self.expanded, self.bias, counts)

    @torch.no_grad()
    def move(self, by: float, factors_by: float) -> None:
        """Move offsets by ``by`` and factors by ``factors_by`` against the signs of their gradients; clear these."""
        for parameter, rate in ((self.offset, by), (self.factors, factors_by)):
            assert parameter.grad is not None
            parameter.sub_(parameter.grad.sign_(), alpha=rate)
            parameter.grad = None
        self.factors.clamp_(*FACTORS)


class RoundingTraining:
    """The training of one block: its layers, and the distance of its output from the float block's."""

    def __init__(self, task: BlockTask, distance: BlockLoss, layers: list[SignRoundLinear], config: Config) -> None:
        """Lower ``distance``, the loss of the block's outputs of ``task.inputs``."""
        self.task, self.distance, self.layers, self.config = task, distance, layers, config
        self.inputs = Windows(task.inputs)

    def losses(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield the summed losses, in float32, of parts of some windows; a call was recorded for a part's size."""
        for part in self.inputs.parts(indices, self.task.calls):
            yield self.distance.summed(part, self.task.forward(self.inputs[part]))

    @torch.no_grad()
    def measure(self, indices: Sequence[int]) -> float:
        """Return the summed loss of some windows."""
        for layer in self.layers:
            layer.expanded = layer.quantized_weight().to(self.task.compute)
        return distributed.summed(sum(map(float, self.losses(indices))))[0]

    @torch.enable_grad()
    def step(self, indices: Sequence[int], share: float) -> None:
        """Move every parameter by ``share`` of its travel, against the gradient of some windows."""
        # each weight is rounded once for all parts, and differentiated once after them
        weights = [layer.quantized_weight() for layer in self.layers]
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.expanded = weight.detach().to(self.task.compute).requires_grad_()
        for loss in self.losses(indices):
            loss.backward()
        for layer, weight, gradient in zip(self.layers, weights, self._gradients(), strict=True):
            if gradient is None:  # its output only chooses, as an indexer's chooses keys: it stays rounded
                continue
            weight.backward(gradient)
            layer.move(share * self.config.travel, share * self.config.range_travel)

    def _gradients(self) -> list[Tensor | None]:
        """Return the gradient of each expanded weight in float32, summed over all processes before a sign is taken."""
        found = [layer.expanded.grad for layer in self.layers]
        if not distributed.active():
            return [None if gradient is None else gradient.float() for gradient in found]
        # a process without windows in this step adds zeros
        sums = [
            torch.zeros_like(layer.expanded, dtype=torch.float32) if gradient is None else gradient.float()
            for layer, gradient in zip(self.layers, found, strict=True)
        ]
        distributed.sum_all(sums)
        return list(sums)

    def run(self, seed: int) -> list[QuantizedWeight]:
        """Train, and return the best state of each layer; the seed determines the windows of each step."""
        num_windows, total = self.inputs.num_windows, self.config.iterations
        size, num_checked = min(num_windows, self.config.batch_size), min(num_windows, self.config.check_samples)
        checked = [i * num_windows // num_checked for i in range(num_checked)]
        best = [layer.quantized for layer in self.layers]
        lowest = self.measure(checked)
        marks = checked_after(total)
        for done in progress.track(range(1, total + 1), "training", total):
            # the shares fall linearly and sum to 1
            share = 2 * (total - done + 1) / (total * (total + 1))
            self.step(windows_of_step(done - 1, size, num_windows, seed), share)
            if done in marks and (found := self.measure(checked)) < lowest:
                lowest, best = found, [layer.quantized for layer in self.layers]
        return best


def checked_after(iterations: int) -> set[int]:
    """Return the numbers of steps after which the state is compared with the best one; the last state always is."""
    count = max(1, min(NUM_CHECKS, iterations // CHECK_STEPS))
    return {iterations * (i + 1) // count for i in range(count)}


def outliers_of(layers: Iterable[SignRoundLinear], config: Config) -> float:
    """Return the share of the output differences of a block of ``layers`` that the loss leaves out."""
    return config.outliers if min(layer.spec.num_bits for layer in layers) <= FEW_BITS else 0.0


def quantize_block(task: BlockTask, config: Config, seed: int, guide: EndLoss | None = None) -> None:
    """Compute the float outputs, put layers that train in the places of the targets, train, and pack the best state."""
    leaders = {group[0].linear: group for group in task.groups}
    importance = task.pass_floats(leaders)
    layers: dict[Target, SignRoundLinear] = {}
    for leader, group in leaders.items():
        for target in group:
            weight, spec = target.weight, target.spec
            if config.range == "search" and spec.symmetric:
                grid = search_qparams(weight, spec, config.norm, importance[leader])
            else:
                grid = minmax_qparams(weight, spec)
            layers[target] = SignRoundLinear(weight, linear_bias(target.linear), spec, grid)
            replace_linear(task.block, task.local_name(target), layers[target])
    if not layers:  # every linear of the block is skipped
        return
    outliers = outliers_of(layers.values(), config)
    distance = loss_of(task, config.last_block_loss, outliers, block_weights(guide, task))
    best = RoundingTraining(task, distance, list(layers.values()), config).run(derived_seed(seed, task.index))
    for target, quantized in zip(layers, best, strict=True):
        task.pack(target, quantized)


def run(job: Job, config: Config) -> Result:
    """Quantize the blocks in order on the text of the job; the seed and a block's index draw the windows of steps."""
    step = partial(quantize_block, config=config, seed=job.seed, guide=end_loss(job, config.guided))
    return run_blocks(job, step, with_float_states=True)


METHOD = Method("ptq", "rounding and ranges learned by signed gradients, block by block", Config, run)
