"""Block-AP, the first phase of EfficientQAT: one block's weights, norms, scales and zero points trained at once.

The loss is the squared difference between the quantized block on the hidden states of the quantized model and the float
block on those of the float model, as a share of the latter's mean square. Masters are float32. Each weight is rounded
once in a step, however many parts the step's windows are processed in; the gradients of the parts are summed in the
weights that the block multiplies by, in its dtype, and are differentiated through the rounding once.

Learning rates follow from the model and the number of steps (``training/rates.py``): a recipe gives the distances that
parameters can move, each in the unit that the description of its key states.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qtool.blocks.hidden_states import HiddenStates, joined
from qtool.blocks.job import Figures
from qtool.blocks.stages import stages
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantSpec
from qtool.config.training import RoundingConfig
from qtool.methods import gptq
from qtool.methods.efficientqat.config import BlockConfig
from qtool.models.experts import num_experts
from qtool.models.linears import Target, linear_bias, replace_linear
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight, dequantize, grouped, minmax_qparams, quantize
from qtool.quant.expert_product import block_product, product
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.ranges import search_qparams
from qtool.quant.rounding import straight_through
from qtool.quant.trained_linear import QuantLinear
from qtool.system import progress
from qtool.system.seeds import derived_seed
from qtool.training.fit import FitResult, NonFiniteError, ParamGroup, fit, total_factor, windows_of_step
from qtool.training.linears import Start
from qtool.training.rates import rate

HELD_OUT = 8  # at most one window in this many is held out for validation
NUM_CHECKS = 8  # number of states that are compared with the start
RETRIES = (1.0, 0.25, 0.0625)  # factors of the learning rates, each tried after a loss that is not finite
SEARCH_NORM = 3.0  # exponent of the error that the range search lowers, as in gptq and signround


class BlockLinear(QuantLinear):
    """A linear in training; ``forward`` multiplies by ``expanded``, which is set once for a whole step."""

    expanded: Tensor  # quantized_weight() in the dtype of computation

    def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]``."""
        return product(x, self.expanded, self.bias, counts)


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


class Norm(NamedTuple):
    """A norm's weight in the block, its float32 master, and the dtype in which it is stored."""

    parameter: nn.Parameter
    master: nn.Parameter
    storage: torch.dtype


class Windows(Sequence[Tensor]):
    """The windows of hidden states: ``windows[indices]`` is ``[b, t, d]``."""

    def __init__(self, hidden: HiddenStates) -> None:
        self.hidden = hidden
        self.places = [(i, j) for i, batch in enumerate(hidden) for j in range(batch.shape[0])]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:  # type: ignore[override]
        rows = [self.hidden[i][j : j + 1] for i, j in (self.places[index] for index in indices)]
        return joined(rows)


def split_windows(count: int, num_validation: int) -> tuple[list[int], list[int]]:
    """Return the windows to train on, and the windows on which the best state is chosen, spread evenly.

    If there are too few windows to hold any out, the best state is chosen on windows that are trained on as well.
    """
    held = min(num_validation, count // HELD_OUT)
    wanted = held or min(num_validation, count)
    chosen = [i * count // wanted + count // (2 * wanted) for i in range(wanted)]
    out = set(chosen) if held else set()
    return [i for i in range(count) if i not in out], chosen


class BlockTraining:
    """The training of one block: its layers and norms, and the distance of its output from the float block's."""

    def __init__(self, task: BlockTask, goal: HiddenStates, layers: list[BlockLinear], norms: list[Norm]) -> None:
        """Train towards ``goal``, the float block's output for each batch of ``task.inputs``."""
        self.task, self.layers, self.norms = task, layers, norms
        self.inputs, self.goal = Windows(task.inputs), Windows(goal)
        self.sizes = sorted(task.calls, reverse=True)
        squares = [float(batch.float().square().mean()) for batch in goal]
        self.mean_square = sum(squares) / len(squares) or 1.0

    def parts(self, indices: list[int]) -> Iterator[list[int]]:
        """Split ``indices`` into parts of a size for which the call of the block was recorded."""
        while indices:
            size = next(size for size in self.sizes if size <= len(indices))
            yield indices[:size]
            indices = indices[size:]

    def part_loss(self, indices: list[int]) -> Tensor:
        """Return the summed squared differences in float32, as a share of the goal's mean square.

        It is a sum and not a mean, so that half-precision gradients do not underflow.
        """
        difference = self.task.forward(self.inputs[indices]).float() - self.goal[indices].float()
        return difference.square().sum() / self.mean_square

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
        """Return the mean loss of some windows, whose gradient reaches the masters."""
        pairs = [(value, leaf) for value, leaf in self.expand() if leaf.requires_grad]
        total, count = 0.0, 0
        for part in self.parts(indices):
            loss = self.part_loss(part)
            loss.backward()
            total += float(loss.detach())
            count += self.goal[part].numel()
        terms = []
        while pairs:  # each pair is freed as soon as its term is made: all of them together are most of the memory
            value, leaf = pairs.pop(0)
            if leaf.grad is not None:
                terms.append((value * (leaf.grad.float() / count)).sum())
                leaf.grad = None
        product = torch.stack(terms).sum()
        return straight_through(product, torch.full_like(product, total / count))

    @torch.no_grad()
    def measure(self, indices: list[int]) -> float:
        """Return the mean loss of some windows."""
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
        """Train on ``windows``, and leave the parameters in their best state on ``held``.

        Raises:
            NonFiniteError: A loss or gradient is not finite.
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
    """Return grid and codes that each linear starts at, and compute the float outputs while the block is unchanged."""
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
    """Quantize the block by GPTQ with its defaults, and return the result; this sets the float outputs as well."""
    solver, found = gptq.Config(), {}
    for stage in stages(task):
        gptq.quantize_stage(task, stage, solver)
        for target in stage.targets:
            layer = task.block.get_submodule(task.local_name(target))
            assert isinstance(layer, PackedLinear)
            found[target.name] = layer.quantized
    task.outputs = None  # these were made by GPTQ's codes, which training changes
    return found


def make_layer(target: Target, start: QuantizedWeight, config: BlockConfig) -> BlockLinear:
    """Make a layer at its starting point, and mark its parameters that train.

    GPTQ's codes correct each other's errors. Weights near the edge of a cell would change them in the first steps, so
    the weights start in the middle of their cells, and leave only if their gradients keep their sign.
    """
    arguments = target.weight, linear_bias(target.linear), target.spec, config.rounding
    layer = BlockLinear(*arguments)
    if config.low_rank:
        layer = LowRankBlockLinear(*arguments, config.low_rank, num_experts(target.linear))
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
    """Return the weights of the block's norms: parameters called ``weight`` with one dimension."""
    norms = []
    for name, parameter in task.block.named_parameters():
        if name.endswith("weight") and parameter.dim() == 1 and parameter.is_floating_point():
            storage = loaded.file_dtypes.get(task.full_name(name), loaded.storage_dtype)
            norms.append(Norm(parameter, nn.Parameter(parameter.detach().float().clone()), storage))
    return norms


def groups_of(layers: list[BlockLinear], norms: list[Norm], total: float, config: BlockConfig) -> list[ParamGroup]:
    """Return the parameters that train, with learning rates; ``total`` is the sum of the schedule's factors."""
    groups = []
    for layer in layers:
        step = float(layer.scale.detach().abs().mean())
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

    After a loss that is not finite, the training starts again at lower learning rates; if the last attempt fails too,
    the block stays at its starting point, which its figure ``fallback`` shows.
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
        layers = {target.name: make_layer(target, starts[target.name], config) for target in task.targets}
        for target in task.targets:
            replace_linear(task.block, task.local_name(target), layers[target.name])
        training = BlockTraining(task, task.float_outputs, list(layers.values()), norms)
        groups = [group._replace(lr=group.lr * share) for group in groups_of(training.layers, norms, total, config)]
        try:
            fitted = training.run(groups, num_steps, windows, held, config, derived_seed(seed, task.index))
        except NonFiniteError as error:
            progress.note(f"{task.name}: {error} at {share:g} times the learning rates")
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
        progress.note(f"{task.name}: no attempt had a finite loss; the block stays at its start, untrained")
        found = starts
        figures["fallback"] = 1.0
    for target in task.targets:
        task.pack(target, found[target.name])
    return figures
