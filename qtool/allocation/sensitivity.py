"""Sensitivity of a model to few bits: the cost of each unit at each width that it may have.

Costs of units are added, as if the rounding of one unit did not change the effect of another's. A tied table is one
unit, whose cost is that of both of its uses.

The cost of a width depends on the rounding: by round-to-nearest, a unit with correlated inputs looks far worse than it
is after a method that uses the correlations. So estimators that measure outputs use weights that GPTQ has rounded.
Estimators that measure single weights use round-to-nearest, because GPTQ lets single errors grow where they cancel.
Embeddings are always rounded to nearest, as runs round them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.allocation.rounded import Changes, Weights, compensated, nearest, rounded_unit
from qtool.allocation.tables import head_hessian, row_weights
from qtool.allocation.units import Unit
from qtool.blocks.driver import walk
from qtool.blocks.job import Job
from qtool.blocks.state_errors import Sizes, relative_squares
from qtool.blocks.states import BlockStates, windows_per_batch
from qtool.config.budget import BudgetConfig
from qtool.config.sections import IGNORED
from qtool.models.experts import num_experts
from qtool.models.linears import Target, weight_of
from qtool.models.loaded import LoadedModel
from qtool.system import memory, progress
from qtool.training.losses import kl, text_loss

LOGIT_ROWS = 512  # number of tokens whose logits are compared at once
Costs = list[dict[int, float]]  # costs of each unit, by width


class Energy(NamedTuple):
    """The factors on squared errors of weights in the mean squared error of outputs per token.

    A table that both embedding and head read has both.
    """

    channels: dict[str, Tensor]  # mean square [in] of the input channels of a linear: half the diagonal of its Hessian
    rows: dict[str, Tensor]  # weights [rows] of the rows of an embedding

    def of(self, target: Target, squares: Tensor) -> Tensor:
        """Return the energy of outputs, of squares ``[out, in]`` in a weight; all channels count as their mean."""
        parts = []
        if target.name in self.channels:
            parts.append(squares.sum() * self.channels[target.name].mean())
        if target.name in self.rows:
            parts.append(self.rows[target.name].to(squares) @ squares.sum(1))
        return sum(parts[1:], parts[0])


@torch.no_grad()
def input_energy(job: Job, units: Sequence[Unit]) -> Energy:
    """Return the energy of the inputs of all units."""
    found: dict[str, Tensor] = {}
    states = BlockStates(job, job.loaded.dtype, with_float_states=False)
    rows = _rows_of(states, units)
    for task in walk(job, states):
        names = {target.linear: target.name for target in task.targets}

        # Any: the arguments of whatever linear it is
        def visit(linear: nn.Module, args: Any, kwargs: Any, names: dict[nn.Module, str] = names) -> None:
            count = job.text.numel() * num_experts(linear)  # each of several experts reads a part of the tokens
            squares = args[0].flatten(0, -2).float().square().sum(0) / count
            found[names[linear]] = found.get(names[linear], 0) + squares

        task.outputs = task.inputs.like()
        for hidden in task.inputs:
            task.outputs.append(task.observe(names, visit, [hidden])[0])
    for unit in units:
        if unit.makes_logits:
            found[unit.targets[0].name] = head_hessian(states).diagonal() / 2
    return Energy(found, rows)


def _rows_of(states: BlockStates, units: Sequence[Unit]) -> dict[str, Tensor]:
    """Return the weights of the rows of all embeddings; ``states`` are those before any block."""
    embeddings = [target for unit in units if unit.table == "embedding" for target in unit.targets]
    return row_weights(states, embeddings) if embeddings else {}


def variance(job: Job, units: Sequence[Unit], weights: Weights) -> Costs:
    """Return ``n alpha sigma**2 4**-b`` of each unit, from the weights' variance and their inputs' mean energy.

    Nothing is rounded. This is the classical model of rate and distortion, with the two quantities by which arXiv
    2411.06084 chooses bits. Its optimum in real numbers is ``b = log2(alpha sigma**2) / 2`` plus a constant for all
    units. The variance of an embedding is that of the rows that are read.
    """
    channels, rows = input_energy(job, units)
    costs: Costs = []
    for unit in units:
        spread = sum(
            float(channels[t.name].mean() * t.weight.var(correction=0)) * t.weight.numel()
            for t in unit.targets
            if t.name in channels
        )
        spread += sum(_spread(t.weight, rows[t.name]) for t in unit.targets if t.name in rows)
        costs.append({bits: spread * 4.0**-bits for bits in unit.choices})
    return costs


def _spread(weight: Tensor, rows: Tensor) -> float:
    """Return ``sum r |w - m|**2`` over the rows ``w`` of ``weight`` with their weights ``r``, and ``m`` their mean."""
    rows = rows.to(weight)
    mean = float(rows @ weight.mean(1) / rows.sum())
    return float(rows @ (weight - mean).square().sum(1))


def hessian(job: Job, units: Sequence[Unit], weights: Weights) -> Costs:
    """Return ``tr(H) / in * |Q(W) - W|**2``, the squared output error if all input channels had the same energy.

    Of an embedding, whose Hessian is diagonal, it is the squared output error itself.
    """
    energy = input_energy(job, units)
    return _of_errors(job.loaded, units, weights, lambda t, error: energy.of(t, error.square()))


@torch.no_grad()
def block(job: Job, units: Sequence[Unit], weights: Weights) -> Costs:
    """Return the squared error ``f(x; Q(W)) - f(x; W)``, with ``f`` the unit's block, residual stream included.

    It is relative to the sizes of tokens and channels of the block's whole output (``blocks/state_errors.py``), and
    therefore comparable between units. Of embeddings it is the change of their outputs, of a head that of the logits,
    and of a tied table the sum of both.
    """
    costs: Costs = [{} for _ in units]
    states = BlockStates(job, job.loaded.dtype, with_float_states=False)
    rows = _rows_of(states, units)
    for task in walk(job, states):
        task.outputs = task.through(task.inputs)
        count = sum(out.numel() for out in task.outputs)
        sizes = Sizes.of(task.outputs)
        mine = [index for index, unit in enumerate(units) if unit.targets[0].block == task.index]
        jobs = [(index, bits) for index in mine for bits in units[index].choices]
        for index, bits in progress.track(jobs, "rounding units", len(jobs)):
            with rounded_unit(job.loaded, units[index], bits, weights):
                found = zip(map(task.forward, task.inputs), task.outputs, strict=True)
                costs[index][bits] = sum(float(relative_squares(a, b, sizes).sum()) for a, b in found) / count
    for unit, cost in zip(units, costs, strict=True):
        if unit.table == "embedding":
            cost |= _relative(job, unit, weights, lambda t, x: rows[t.name].to(x) @ x.square().sum(1))
        if unit.makes_logits:
            first = unit._replace(targets=unit.targets[:1])
            logits = _relative(job, first, weights, partial(_output_energy, head_hessian(states)))
            cost |= {bits: cost.get(bits, 0) + value for bits, value in logits.items()}
    return costs


def _output_energy(hessian: Tensor, target: Target, weight: Tensor) -> Tensor:
    """Return ``tr(w H w^T)`` of a weight ``w [out, in]``: the energy of its outputs, up to a factor."""
    return ((weight @ hessian) * weight).sum()


def _relative(job: Job, unit: Unit, weights: Weights, energy: Callable[[Target, Tensor], Tensor]) -> dict[int, float]:
    """Return the energy of outputs made by the errors of a unit's weights, relative to that made by the weights."""
    whole = sum(float(energy(t, t.weight.to(job.loaded.device))) for t in unit.targets)
    (errors,) = _of_errors(job.loaded, [unit], weights, energy)
    return {bits: error / whole for bits, error in errors.items()}


def fisher(job: Job, units: Sequence[Unit], weights: Weights) -> Costs:
    """Return ``t / 2 sum E[g**2] (Q(W) - W)**2`` with ``g`` the gradient of a window's mean loss over its ``t`` tokens.

    It is the second-order growth of the loss in nats per token, with the diagonal of the empirical Fisher information
    as curvature. Gradients of tokens are taken as independent, so the squared gradient of their mean is ``t`` times
    smaller.
    """
    targets = [target for unit in units for target in unit.targets]
    squares = {t.name: torch.zeros(t.weight_shape, device=job.loaded.device) for t in targets}
    scale = job.text.shape[1] / 2 / len(job.text)
    with _gradients(job.loaded, targets, lambda name, grad: squares[name].add_(grad.float().square(), alpha=scale)):
        for tokens, labels in progress.track(list(_batches(job, 1)), "gradients", len(job.text)):
            (_nll(job.loaded, tokens, labels) / _learned(labels).sum()).backward()
    return _of_errors(job.loaded, units, weights, lambda t, error: (squares[t.name] * error.square()).sum())


def loss(job: Job, units: Sequence[Unit], weights: Weights) -> Costs:
    """Return the KL divergence from the float model, in nats per token, with one unit alone rounded."""

    def divergence(tokens: Tensor, labels: Tensor, teacher: Tensor, change: Changes) -> float:
        with torch.no_grad():
            student = _logits(job.loaded, tokens)
        learned = _learned(labels).to(job.loaded.device)
        rows = zip(teacher[learned].split(LOGIT_ROWS), student[learned].split(LOGIT_ROWS), strict=True)
        return sum(float(kl(*pair).sum()) for pair in rows)

    return _one_at_a_time(job, units, weights, divergence)


def delta_loss(job: Job, units: Sequence[Unit], weights: Weights) -> Costs:
    """Return ``sum |g (Q(W) - W)|`` with ``g`` the gradient of the mean loss with the unit alone rounded (AutoRound).

    It is a first-order estimate in which no two errors cancel.
    """

    def first_order(tokens: Tensor, labels: Tensor, teacher: Tensor, change: Changes) -> float:
        found: list[float] = []
        targets = list(change)
        by_name = {target.name: target for target in targets}
        with _gradients(
            job.loaded, targets, lambda name, g: found.append(float((g * change[by_name[name]]).abs().sum()))
        ):
            _nll(job.loaded, tokens, labels).backward()
        return sum(found)

    return _one_at_a_time(job, units, weights, first_order)


def _of_errors(
    loaded: LoadedModel, units: Sequence[Unit], weights: Weights, cost: Callable[[Target, Tensor], Tensor]
) -> Costs:
    """Return the sum of ``cost`` over the linears of each unit; ``cost`` gets the error of a weight at each width."""
    costs: Costs = []

    def at(target: Target, bits: int) -> float:
        return float(cost(target, (weights(target, bits) - target.weight).to(loaded.device)))

    for unit in progress.track(units, "rounding weights", len(units)):
        costs.append({bits: sum(at(target, bits) for target in unit.targets) for bits in unit.choices})
        if loaded.streaming:
            memory.Pages().drop(*(weight_of(target.linear) for target in unit.targets))
    return costs


Measure = Callable[[Tensor, Tensor, Tensor, Changes], float]


def _one_at_a_time(job: Job, units: Sequence[Unit], weights: Weights, measure: Measure) -> Costs:
    """Return the mean over tokens of ``measure``, with one unit at a time at each width and the rest in floating point.

    ``measure`` gets tokens, labels, the float model's logits that predict the next token, and the changes of the
    weights; it returns a sum over tokens.
    """
    costs: Costs = [dict.fromkeys(unit.choices, 0.0) for unit in units]
    jobs = [(index, bits) for index, unit in enumerate(units) for bits in unit.choices]
    loaded = job.loaded
    batches = list(_batches(job, windows_per_batch(job)))
    count = sum(int(_learned(labels).sum()) for _, labels in batches)
    for number, (tokens, labels) in enumerate(batches):
        with torch.no_grad():
            teacher = _logits(loaded, tokens)
        for index, bits in progress.track(jobs, f"rounding units, text {number + 1} of {len(batches)}", len(jobs)):
            with rounded_unit(loaded, units[index], bits, weights) as change:
                costs[index][bits] += measure(tokens, labels, teacher, change) / count
    return costs


@contextmanager
def _gradients(
    loaded: LoadedModel, targets: Sequence[Target], visit: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """Call ``visit`` with the name and the gradient ``[out, in]`` of each weight of ``targets``, then free it."""
    handles = []
    parameters = []
    for target in targets:
        module = loaded.model.get_submodule(target.name)
        flipped = isinstance(module, Conv1D)

        def take(parameter: Tensor, name: str = target.name, flipped: bool = flipped) -> None:
            assert parameter.grad is not None
            visit(name, parameter.grad.T if flipped else parameter.grad)
            parameter.grad = None

        parameters.append(weight_of(module).requires_grad_(True))
        handles.append(parameters[-1].register_post_accumulate_grad_hook(take))
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, handle in zip(parameters, handles, strict=True):
            handle.remove()
            parameter.requires_grad_(False)


def _batches(job: Job, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of windows and their labels, ``size`` windows at a time."""
    labels = job.text if job.labels is None else job.labels
    return zip(job.text.split(size), labels.split(size), strict=True)


def _learned(labels: Tensor) -> Tensor:
    """Return a mask ``[b, t - 1]`` of the predictions whose token is learned."""
    return labels[:, 1:] != IGNORED


def _logits(loaded: LoadedModel, tokens: Tensor) -> Tensor:
    """Return the logits ``[b, t - 1, vocabulary]`` that predict the tokens after the first."""
    logits: Tensor = loaded.model(tokens.to(loaded.device), use_cache=False).logits[:, :-1]
    return logits


def _nll(loaded: LoadedModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of the learned tokens."""
    return text_loss(_logits(loaded, tokens).flatten(0, 1), labels[:, 1:].flatten().to(loaded.device))


class CostEstimator(NamedTuple):
    """A way to measure costs, and its needs."""

    measure: Callable[[Job, Sequence[Unit], Weights], Costs]
    whole: bool  # True if the whole model must be in memory
    outputs: bool  # True if it measures outputs, in which errors of weights can cancel
    unit: str  # quantity and unit of the costs


COST_ESTIMATORS = {
    "variance": CostEstimator(variance, whole=False, outputs=False, unit="squared error of outputs, modelled"),
    "hessian": CostEstimator(hessian, whole=False, outputs=False, unit="squared error of outputs, estimated"),
    "block": CostEstimator(block, whole=False, outputs=True, unit="squared error, share of the block's output"),
    "fisher": CostEstimator(fisher, whole=True, outputs=False, unit="growth of the loss, nats per token"),
    "loss": CostEstimator(loss, whole=True, outputs=True, unit="KL divergence, nats per token"),
    "delta-loss": CostEstimator(delta_loss, whole=True, outputs=False, unit="growth of the loss, nats per token"),
}


def measure_costs(job: Job, units: Sequence[Unit], config: BudgetConfig) -> Costs:
    """Measure costs on the text of the job by the estimator of ``config``; ``units`` may belong to another copy."""
    estimator = COST_ESTIMATORS[config.estimator]
    model = job.loaded.model
    units = [unit._replace(targets=tuple(target.within(model) for target in unit.targets)) for unit in units]
    job = replace(job, targets=tuple(target for unit in units if not unit.table for target in unit.targets))
    by_gptq = estimator.outputs and config.rounding == "gptq"
    return estimator.measure(job, units, compensated(job, units) if by_gptq else nearest)
