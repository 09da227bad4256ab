"""Block-AP, the first phase of EfficientQAT: one block's weights, norms, scales and zero points trained at once.

The loss is the squared difference between the quantized block on the quantized stream and the float block on the float
stream, as a share of the latter's mean square. Masters are float32. Each weight goes through its grid once in a step,
whatever the number of parts that the step's windows are worked on in; the parts' gradients are summed where the block
multiplies, in its dtype, and are differentiated through the rounding once.

Rates follow the model and the budget. A step of Adam is about its rate, so a parameter whose gradient keeps its sign
travels the rate times the sum of the schedule's factors; what a recipe gives is that travel, in quantization steps.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.job import Figures
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantSpec
from qtool.config.training import OptimConfig, RoundingConfig, TrainedConfig
from qtool.methods import gptq
from qtool.models.linears import Target, linear_bias
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight, dequantize, grouped, minmax_qparams, quantize
from qtool.quant.hessian import gram
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.ranges import search_qparams
from qtool.quant.rounding import straight_through
from qtool.quant.trained_linear import QuantLinear
from qtool.system import progress
from qtool.system.seeds import derived_seed
from qtool.training.fit import FitResult, NonFiniteError, ParamGroup, fit, total_factor, windows_of_step
from qtool.training.linears import Start, put_linears
from qtool.training.rates import rate

Part = Literal["weights", "norms", "scales", "zero_points"]
PARTS: tuple[Part, ...] = get_args(Part)
HELD_OUT = 8  # at most one window in so many is held out for validation
NUM_CHECKS = 8  # states that are compared with the start
RETRIES = (1.0, 0.25, 0.0625)  # shares of the rates: after a loss that is not finite, the next is tried
SEARCH_NORM = 3.0  # exponent of the error that the range search lowers, as in gptq and signround
RENAMED = {
    "scale_travel": "scale_share, a share of the linear's mean scale (scale_travel of other methods is in quantization "
    "steps)"
}


class BlockConfig(TrainedConfig):
    """The keys of Block-AP."""

    renamed: ClassVar[Mapping[str, str]] = RENAMED

    init: Literal["minmax", "search", "gptq"] = Field(
        "search",
        description="Where a block starts: at the extremes of each group, at a searched range, or at GPTQ's codes.",
    )
    trains: tuple[Part, ...] = Field(PARTS, min_length=1, description="What Block-AP trains.")
    low_rank: int = Field(
        0, ge=0, description="Rank of a term inside the rounding that trains in place of the weights; 0: none, they do."
    )
    epochs: float = Field(2.0, ge=0, description="Passes of Block-AP over the calibration windows; 0: no training.")
    min_steps: int = Field(
        100, ge=0, description="Steps of Block-AP at least: few windows are gone through more often than epochs says."
    )
    batch_size: int = Field(4, ge=1, description="Windows in a step of Block-AP.")
    travel: float = Field(
        0.5, ge=0, description="How far a weight can move in all steps together, in its linear's mean scales."
    )
    scale_share: float = Field(
        0.1,
        ge=0,
        description="Distance that a scale can move over all steps, as a share of the mean scale of its linear; sets "
        "the learning rate of scales.",
    )
    zero_travel: float = Field(0.5, ge=0, description="How far a zero point can move in all steps, in codes.")
    norm_travel: float = Field(
        0.05, ge=0, description="How far a norm's weights can move in all steps, as a share of their mean size."
    )
    weight_lr: float | None = Field(
        None, ge=0, description="Rate of weights and norms in place of their travel; papers: 2e-5 at 2 bits, else 1e-5."
    )
    quant_lr: float | None = Field(
        None, ge=0, description="Rate of scales and zero points in place of their travel; papers: 1e-4."
    )
    validation_samples: int = Field(
        8,
        ge=1,
        description="Windows held out to choose a block's best state on, at most one in eight; of fewer than eight, "
        "none is held out.",
    )
    optim: OptimConfig = Field(OptimConfig(eps=1e-12), description="How Block-AP follows gradients.")


class BlockLinear(QuantLinear):
    """A linear in training; ``forward`` multiplies by ``expanded``, which is set for a whole step."""

    expanded: Tensor  # quantized_weight() in the dtype of computation

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]``."""
        return F.linear(x, self.expanded, self.bias)


class LowRankBlockLinear(BlockLinear):
    """A linear with a frozen weight and a trained low-rank term inside its rounding, the idea of LR-QAT.

    ``round(w / scale + zero_point + up @ down)`` (arXiv 2406.06385): the term is in codes, and zero at the start. It
    is not the layer of ``methods/lrqat.py``, which keeps the weight at its first grid position in few bits: here the
    weight is float32 and follows its scale and zero point, which Block-AP trains as well.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, spec: QuantSpec, rounding: RoundingConfig, rank: int
    ) -> None:
        """A step of ``up`` by ``t`` moves the grid by about ``t``: rows of ``down`` have mean square ``1 / rank``."""
        super().__init__(weight, bias, spec, rounding)
        self.weight.requires_grad_(False)
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(derived_seed(rows, columns))
        down = torch.randn(rank, columns, generator=generator) / math.sqrt(rank)
        self.down = nn.Parameter(down.to(self.weight))
        self.up = nn.Parameter(self.weight.new_zeros(rows, rank))

    def grid_weight(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Weight in grid units plus the term, ``[out, groups, group_size]``."""
        return super().grid_weight(scale, zero_point) + grouped(self.up @ self.down, self.spec)


class Norm(NamedTuple):
    """A norm's weight as the block has it, its float32 master, and the dtype that its file will have."""

    parameter: nn.Parameter
    master: nn.Parameter
    storage: torch.dtype


class Windows(Sequence[Tensor]):
    """The windows of a stream, one by one or some together, ``[b, t, d]``."""

    def __init__(self, stream: HiddenStates) -> None:
        self.stream = stream
        self.places = [(i, j) for i, batch in enumerate(stream) for j in range(batch.shape[0])]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:  # type: ignore[override]
        rows = [self.stream[i][j : j + 1] for i, j in (self.places[index] for index in indices)]
        return torch.cat(rows) if len(rows) > 1 else rows[0]


def split_windows(count: int, num_validation: int) -> tuple[list[int], list[int]]:
    """Windows to train on and windows to choose the best state on, spread evenly.

    With too few to hold any out, the best state is chosen on windows that are trained on as well.
    """
    held = min(num_validation, count // HELD_OUT)
    wanted = held or min(num_validation, count)
    chosen = [i * count // wanted + count // (2 * wanted) for i in range(wanted)]
    out = set(chosen) if held else set()
    return [i for i in range(count) if i not in out], chosen


class BlockTraining:
    """The layers and norms of one block, and how far its output is from the float block's."""

    def __init__(self, task: BlockTask, goal: HiddenStates, layers: list[BlockLinear], norms: list[Norm]) -> None:
        """``goal`` has the float block's output for each batch of ``task.inputs``."""
        self.task, self.layers, self.norms = task, layers, norms
        self.inputs, self.goal = Windows(task.inputs), Windows(goal)
        self.sizes = sorted(task.calls, reverse=True)
        squares = [float(batch.float().square().mean()) for batch in goal]
        self.mean_square = sum(squares) / len(squares) or 1.0

    def parts(self, indices: list[int]) -> Iterator[list[int]]:
        """``indices`` in pieces of which the model's call is known."""
        while indices:
            size = next(size for size in self.sizes if size <= len(indices))
            yield indices[:size]
            indices = indices[size:]

    def part_loss(self, indices: list[int]) -> Tensor:
        """Summed squared differences in float32, as a share of the goal's mean square.

        A sum, so that half-precision gradients stay normal.
        """
        difference = self.task.forward(self.inputs[indices]).float() - self.goal[indices].float()
        return difference.square().sum() / self.mean_square

    def expand(self) -> list[tuple[Tensor, Tensor]]:
        """Set what the block multiplies by; returns each as it was computed and as the leaf that it became."""
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
        """Mean loss of some windows, whose gradient reaches the masters."""
        pairs = [(value, leaf) for value, leaf in self.expand() if leaf.requires_grad]
        total, count = 0.0, 0
        for part in self.parts(indices):
            loss = self.part_loss(part)
            loss.backward()
            total += float(loss.detach())
            count += self.goal[part].numel()
        terms = []
        while pairs:  # each goes as soon as its gradient waits for the masters: all of them are most of the memory
            value, leaf = pairs.pop(0)
            if leaf.grad is not None:
                terms.append((value * (leaf.grad.float() / count)).sum())
                leaf.grad = None
        product = torch.stack(terms).sum()
        return straight_through(product, torch.full_like(product, total / count))

    @torch.no_grad()
    def measure(self, indices: list[int]) -> float:
        """Mean loss of some windows."""
        self.expand()
        parts = list(self.parts(indices))
        return sum(float(self.part_loss(part)) for part in parts) / sum(self.goal[part].numel() for part in parts)

    def run(
        self,
        groups: list[ParamGroup],
        num_steps: int,
        windows: list[int],
        held: list[int],
        config: BlockConfig,
        seed: int,
    ) -> FitResult:
        """Train on ``windows``; the best state on ``held`` is what remains.

        Raises:
            NonFiniteError: a loss or gradient is not finite.
        """
        size = min(config.batch_size, len(windows))

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
                config.optim,
                validate=partial(self.measure, held),
                validate_every=max(1, num_steps // NUM_CHECKS),
            )
            reach(num_steps)
        return found


def starting_points(task: BlockTask, config: BlockConfig, start: Start | None) -> dict[str, QuantizedWeight]:
    """Grid and codes that each linear starts at. Sets the block's float outputs, before anything in it changes."""
    if config.init == "gptq" and start is None:
        return _solved(task)
    searched = [group[0].linear for group in task.groups] if config.init == "search" and start is None else []
    importance = task.pass_floats(searched)
    if start is not None:
        return {t.name: start.source.quantized(t.name)._replace(spec=t.spec) for t in task.targets}
    found = {}
    for group in task.groups if searched else [task.targets]:
        for target in group:
            weight, spec = target.weight, target.spec
            if searched:
                grid = search_qparams(weight, spec, SEARCH_NORM, importance[group[0].linear])
            else:
                grid = minmax_qparams(weight, spec)
            found[target.name] = QuantizedWeight(quantize(weight, *grid, spec), *grid, spec)
    return found


def _solved(task: BlockTask) -> dict[str, QuantizedWeight]:
    """What GPTQ with its defaults makes of the block; the way there gives the float outputs too."""
    solver, found = gptq.Config(), {}
    for stage in task.stages():
        statistics = gptq.Statistics(gram(stage.inputs), None)
        gptq.quantize_group(task, stage.targets, statistics, solver)
        for target in stage.targets:
            layer = task.block.get_submodule(task.local_name(target))
            assert isinstance(layer, PackedLinear)
            found[target.name] = layer.quantized
    task.outputs = None  # those of GPTQ's codes
    return found


def make_layer(target: Target, start: QuantizedWeight, config: BlockConfig) -> BlockLinear:
    """A layer at its starting point, with what is to train of it.

    Codes that were solved for make up for each other's errors, and a start near the edge of a cell would lose them to
    the first steps. So weights start on them, and leave when their gradients keep pulling.
    """
    arguments = target.weight, linear_bias(target.linear), target.spec, config.rounding
    layer = LowRankBlockLinear(*arguments, config.low_rank) if config.low_rank else BlockLinear(*arguments)
    layer.start_from(start)
    if config.init == "gptq" or config.init_from is not None:
        layer.weight.data = dequantize(*start)
    weights = "weights" in config.trains
    if isinstance(layer, LowRankBlockLinear):
        layer.up.requires_grad_(weights)
        layer.down.requires_grad_(weights)
    else:
        layer.weight.requires_grad_(weights)
    layer.scale.requires_grad_("scales" in config.trains)
    layer.zero_point.requires_grad_("zero_points" in config.trains and not target.spec.symmetric)
    return layer


def norms_of(task: BlockTask, loaded: LoadedModel) -> list[Norm]:
    """The weights of the block's norms: what is called a weight and has one dimension."""
    norms = []
    for name, parameter in task.block.named_parameters():
        if name.endswith("weight") and parameter.dim() == 1 and parameter.is_floating_point():
            storage = loaded.file_dtypes.get(f"{task.name}.{name}", loaded.storage_dtype)
            norms.append(Norm(parameter, nn.Parameter(parameter.detach().float().clone()), storage))
    return norms


def groups_of(layers: list[BlockLinear], norms: list[Norm], total: float, config: BlockConfig) -> list[ParamGroup]:
    """What trains, and at which rate; ``total`` is the sum of the schedule's factors."""
    groups = []
    for layer in layers:
        step = float(layer.scale.detach().mean())
        of_weight = rate(config.travel * step, total, config.weight_lr)
        rates = {
            "weight": of_weight,
            "scale": rate(config.scale_share * step, total, config.quant_lr),
            "zero_point": rate(config.zero_travel, total, config.quant_lr),
        }
        if isinstance(layer, LowRankBlockLinear):
            rates |= {"up": of_weight / step, "down": of_weight / step * float(layer.down.detach().abs().mean())}
        for name, lr in rates.items():
            parameter = layer.get_parameter(name)
            if parameter.requires_grad:
                groups.append(ParamGroup([parameter], lr))
    for _, master, _ in norms:
        distance = config.norm_travel * float(master.detach().abs().mean())
        groups.append(ParamGroup([master], rate(distance, total, config.weight_lr)))
    return groups


def quantize_block(
    task: BlockTask, loaded: LoadedModel, config: BlockConfig, start: Start | None, seed: int
) -> Figures:
    """Train the block, and pack its best state.

    A loss that is not finite is answered by another attempt at lower rates; when the last one fails too, the block is
    left where it started, and its figures say so.
    """
    starts = starting_points(task, config, start)
    assert task.float_outputs is not None
    if start is not None:
        start.take_floats(loaded, f"{task.name}.")
    first = [(norm.parameter, norm.parameter.detach().clone()) for norm in norms_of(task, loaded)]
    windows, held = split_windows(sum(batch.shape[0] for batch in task.inputs), config.validation_samples)
    num_steps = max(config.min_steps, round(config.epochs * len(windows) / config.batch_size)) if config.epochs else 0
    total = total_factor(num_steps, config.optim)
    figures: Figures = {}
    for retries, share in enumerate(RETRIES):
        figures = {"start_loss": math.nan, "loss": math.nan, "retries": float(retries), "fallback": 0.0}
        norms = norms_of(task, loaded) if "norms" in config.trains else []
        layers = put_linears(loaded.model, task.targets, lambda target: make_layer(target, starts[target.name], config))
        training = BlockTraining(task, task.float_outputs, list(layers.values()), norms)
        groups = [group._replace(lr=group.lr * share) for group in groups_of(training.layers, norms, total, config)]
        try:
            fitted = training.run(groups, num_steps, windows, held, config, derived_seed(seed, task.index))
        except NonFiniteError as error:
            progress.note(f"{task.name}: {error} at {share:g} times the rates")
            for parameter, value in first:
                parameter.data.copy_(value)
                parameter.requires_grad_(False)
            continue
        training.expand()
        found = {name: layer.quantized for name, layer in layers.items()}
        measured = [loss for loss in fitted.validation if loss == loss]
        figures |= {"start_loss": fitted.validation[0], "loss": min(measured, default=math.nan)}
        break
    else:
        progress.note(f"{task.name}: no attempt was finite; it stays where it started, not trained")
        found = starts
        figures["fallback"] = 1.0
    for target in task.targets:
        task.pack(target, found[target.name])
    return figures
