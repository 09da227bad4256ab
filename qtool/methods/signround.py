"""SignRound: learn for each weight whether it is rounded up or down, so that the block's output changes least.

A weight goes to ``round(w / scale + V)`` with an offset ``V`` of its own, zero at the start, and the ends of each
group's range get factors, one at the start. Both follow only the sign of their gradient, ``p -= lr * sign(dL/dp)``, at
a learning rate that falls linearly to zero: the distance that they can move is known beforehand, whatever the size of
the loss (Cheng et al., arXiv 2309.05516). All linears of a block are trained at once. The loss is the squared
difference between the quantized block on the hidden states of the quantized model and the float block on those of the
float model, so a block also corrects errors of the blocks before it.

From SignRoundV2 (arXiv 2512.04746) come two options: symmetric ranges can be searched first, with each input channel
weighted by its mean square (``range: search``), and below 4 bits the loss can leave out the largest differences
(``outliers``, 0.001 there). Both are off: ranges that start at the extremes and shrink in training gave better results
at every width.

Where we differ: the best of several states is kept, judged on windows that stay the same, where the reference compares
losses of different minibatches, which differ more by their windows than by their state; a step takes 4 windows and not
8; and the search lowers the third power of errors, because squares clip so much that 2 bits get much worse.
docs/benchmarks.md has the figures.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job, Method, Result
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantSpec
from qtool.config.sections import MethodConfig
from qtool.models.linears import Target, linear_bias, replace_linear
from qtool.quant.affine import QuantizedWeight, grouped, minmax_qparams, stored_scale, stored_zero_point
from qtool.quant.expert_product import product
from qtool.quant.ranges import search_qparams
from qtool.quant.trained_linear import QuantLinear
from qtool.system import progress
from qtool.system.seeds import derived_seed

PRESETS: dict[str, dict[str, Any]] = {"light": {"iterations": 50}, "default": {}, "best": {"iterations": 1000}}
BEST_SAMPLES = 512  # calibration windows of the preset best, unless the recipe gives data.num_samples
FACTORS = (0.05, 2.0)  # bounds of the factor of a range
NUM_CHECKS = 8  # number of states that are compared with the start
FEW_BITS = 3  # largest width at which outliers are left out of the loss


class Config(MethodConfig):
    """SignRound: rounding and ranges learned block by block from the signs of gradients."""

    name: Literal["signround"] = "signround"
    preset: Literal["light", "default", "best"] = Field(
        "default",
        description="Defaults of iterations and data.num_samples, where these are not given. light: 50 iterations; "
        f"default: 200; best: 1000, on {BEST_SAMPLES} calibration windows.",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        return {**PRESETS[preset], **values} if isinstance(preset, str) and preset in PRESETS else values

    @property
    def data_defaults(self) -> dict[str, int]:
        """The preset's number of calibration windows."""
        return {"num_samples": BEST_SAMPLES} if self.preset == "best" else {}


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


def minibatches(num_batches: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield the indices of ``size`` batches, without end; every batch is used once before any is used again."""

    def indices() -> Iterator[int]:
        while True:
            yield from torch.randperm(num_batches, generator=generator).tolist()

    every = indices()
    while True:
        yield list(islice(every, size))


class RoundingTraining:
    """The training of one block: its layers, and the distance of its output from the float block's."""

    def __init__(self, task: BlockTask, goal: Sequence[Tensor], layers: list[SignRoundLinear], config: Config) -> None:
        """Train towards ``goal``, the float block's output for each batch of ``task.inputs``."""
        self.task, self.goal, self.layers, self.config = task, goal, layers, config
        few_bits = min(layer.spec.num_bits for layer in layers) <= FEW_BITS
        self.outliers = config.outliers if few_bits else 0.0

    def loss(self, index: int) -> Tensor:
        """Return the summed squared differences of one batch, in float32.

        It is a sum and not a mean, so that half-precision gradients do not underflow.
        """
        difference = self.task.forward(self.task.inputs[index]).float() - self.goal[index].float()
        dropped = round(self.outliers * difference.numel())
        if dropped:
            size = difference.detach().abs()
            difference = difference.masked_fill(size >= size.flatten().topk(dropped).values[-1], 0)
        return difference.square().sum()

    @torch.no_grad()
    def measure(self, indices: list[int]) -> float:
        """Return the summed loss of some batches."""
        for layer in self.layers:
            layer.expanded = layer.quantized_weight().to(self.task.compute)
        return sum(float(self.loss(index)) for index in indices)

    @torch.enable_grad()
    def step(self, indices: list[int], share: float) -> None:
        """Move every parameter by ``share`` of its travel, against the gradient of some batches."""
        # each weight is rounded once for all batches, and differentiated once after them
        weights = [layer.quantized_weight() for layer in self.layers]
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.expanded = weight.detach().to(self.task.compute).requires_grad_()
        for index in indices:
            self.loss(index).backward()
        for layer, weight in zip(self.layers, weights, strict=True):
            if layer.expanded.grad is None:  # its output only chooses, as an indexer's chooses keys: it stays rounded
                continue
            weight.backward(layer.expanded.grad.float())
            layer.move(share * self.config.travel, share * self.config.range_travel)

    def run(self, generator: torch.Generator) -> list[QuantizedWeight]:
        """Train, and return the best state of each layer."""
        num_batches, batch = len(self.task.inputs), self.task.inputs[0].shape[0]
        size = min(num_batches, max(1, round(self.config.batch_size / batch)))
        num_checked = min(num_batches, max(1, round(self.config.check_samples / batch)))
        checked = [i * num_batches // num_checked for i in range(num_checked)]
        best = [layer.quantized for layer in self.layers]
        lowest = self.measure(checked)
        total = self.config.iterations
        marks = {total * (i + 1) // NUM_CHECKS for i in range(NUM_CHECKS)}
        steps = islice(minibatches(num_batches, size, generator), total)
        for done, indices in enumerate(progress.track(steps, "training", total), start=1):
            self.step(indices, 2 * (total - done + 1) / (total * (total + 1)))  # the shares fall linearly and sum to 1
            if done in marks and (found := self.measure(checked)) < lowest:
                lowest, best = found, [layer.quantized for layer in self.layers]
        return best


def quantize_block(task: BlockTask, config: Config, seed: int) -> None:
    """Compute the float outputs, put layers that train in the places of the targets, train, and pack the best state."""
    leaders = {group[0].linear: group for group in task.groups}
    importance = task.pass_floats(leaders)
    assert task.float_outputs is not None
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
    generator = torch.Generator().manual_seed(derived_seed(seed, task.index))
    best = RoundingTraining(task, task.float_outputs, list(layers.values()), config).run(generator)
    for target, quantized in zip(layers, best, strict=True):
        task.pack(target, quantized)


def run(job: Job, config: Config) -> Result:
    """Quantize the blocks in order on the text of the job; the seed and a block's index determine the minibatches."""
    step = partial(quantize_block, config=config, seed=job.seed)
    return run_blocks(job, step, with_float_states=True)


METHOD = Method("ptq", "rounding and ranges learned by signed gradients, block by block", Config, run)
