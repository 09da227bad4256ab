"""Sensitivity of a model to few bits: the cost of each unit at each width that it may have.

A unit is a set of linears that engines fuse into one matrix, which therefore need one width: linears that read the same
tensor (q, k, v; gate, up), and all experts of a mixture. Costs of units are added, as if the rounding of one unit did
not change the effect of another's.

The cost of a width depends on the rounding: by round-to-nearest, a unit with correlated inputs looks far worse than it
is after a method that uses the correlations. So estimators that measure outputs use weights that GPTQ has rounded.
Estimators that measure single weights use round-to-nearest, because GPTQ lets single errors grow where they cancel.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.blocks.driver import TOKENS_PER_BATCH, group_inputs, walk
from qtool.blocks.job import Job
from qtool.config.budget import BudgetConfig
from qtool.config.sections import IGNORED
from qtool.methods import gptq
from qtool.models.experts import num_experts
from qtool.models.linears import Target, weight_of
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight, dequantize, quantize
from qtool.quant.hessian import gram
from qtool.quant.ranges import search_qparams
from qtool.system import memory, progress
from qtool.training.losses import kl

LOGIT_ROWS = 512  # number of tokens whose logits are compared at once
EXPERTS = re.compile(r"(.*\.experts)\.")


class Unit(NamedTuple):
    """Linears that get the same width, in the order they run, and the widths that are possible."""

    targets: tuple[Target, ...]
    choices: tuple[int, ...]

    @property
    def name(self) -> str:
        """The common prefix and the linears, such as ``model.layers.0.self_attn: q_proj, k_proj, v_proj``."""
        names = [target.name for target in self.targets]
        columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
        shared = ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
        return f"{shared}: {', '.join(name.removeprefix(f'{shared}.') for name in names)}"

    @property
    def num_weights(self) -> int:
        """The number of weights in all linears of the unit."""
        return sum(math.prod(target.weight_shape) for target in self.targets)


Costs = list[dict[int, float]]  # costs of each unit, by width
Weights = Callable[[Target, int], Tensor]  # returns the weight of a linear rounded to a width, float32 [out, in]


def fused(loaded: LoadedModel, targets: Sequence[Target]) -> list[list[Target]]:
    """Return the targets by unit, in the order they run, found by one forward of each block."""
    window = torch.zeros(1, 2, dtype=torch.int64)
    job = Job(loaded, tuple(targets), window)
    return merged([group for task in walk(job) if task.targets for group in task.groups])


def merged(groups: Sequence[Sequence[Target]]) -> list[list[Target]]:
    """Merge the groups of a layer's experts into one; ``groups`` are linears that read the same tensor."""
    units: dict[str, list[Target]] = {}
    for group in groups:
        expert = EXPERTS.match(group[0].name)
        units.setdefault(expert[1] if expert else group[0].name, []).extend(group)
    return list(units.values())


def nearest(target: Target, num_bits: int) -> Tensor:
    """Return the weight ``[out, in]`` of ``target`` at another width, rounded to nearest in a searched range."""
    spec = target.spec.model_copy(update={"num_bits": num_bits})
    weight = target.weight
    grid = search_qparams(weight, spec)
    return dequantize(quantize(weight, *grid, spec), *grid, spec)


def compensated(job: Job, units: Sequence[Unit]) -> Weights:
    """Return the weights of each width, rounded by GPTQ on the float model's inputs; it keeps all codes in memory."""
    found: dict[tuple[str, int], QuantizedWeight] = {}
    choices = {target.name: unit.choices for unit in units for target in unit.targets}
    config = gptq.Config()
    for task in walk(job):
        for group, inputs in group_inputs(task):
            statistics = gptq.Statistics(gram(rows.x for rows in inputs), None)
            for target in group:
                specs = [target.spec.model_copy(update={"num_bits": bits}) for bits in choices[target.name]]
                if num_experts(target.linear) > 1:
                    solved = gptq.solve_experts(target, inputs, specs, config)
                else:
                    factor = gptq.factorise(statistics, target.spec, config, target.name)
                    solved = [gptq.solve(target.weight, factor, spec, config) for spec in specs]
                for codes, scale, zero_point, spec in solved:
                    weight = QuantizedWeight(codes.cpu(), scale.cpu(), zero_point.cpu(), spec)
                    found[target.name, spec.num_bits] = weight
    return lambda target, num_bits: dequantize(*found[target.name, num_bits])


def input_energy(job: Job) -> dict[str, Tensor]:
    """Return the mean square ``[in]`` of each linear's input channels: half the diagonal of GPTQ's Hessian."""
    found: dict[str, Tensor] = {}
    for task in walk(job):
        names = {target.linear: target.name for target in task.targets}

        # Any: the arguments of whatever linear it is
        def visit(linear: nn.Module, args: Any, kwargs: Any, names: dict[nn.Module, str] = names) -> None:
            count = job.text.numel() * num_experts(linear)  # each of several experts reads a part of the tokens
            squares = args[0].flatten(0, -2).float().square().sum(0) / count
            found[names[linear]] = found.get(names[linear], 0) + squares

        task.outputs = task.inputs.like()
        for hidden in task.inputs:
            task.outputs.append(task.observe(names, visit, [hidden])[0])
    return found


def variance(job: Job, units: Sequence[Unit], weights: Weights) -> Costs:
    """Return ``n alpha sigma**2 4**-b`` of each unit, from the weights' variance and their inputs' mean energy.

    Nothing is rounded. This is the classical model of rate and distortion, with the two quantities by which arXiv
    2411.06084 chooses bits. Its optimum in real numbers is ``b = log2(alpha sigma**2) / 2`` plus a constant for all
    units.
    """
    energy = input_energy(job)
    costs: Costs = []
    for unit in units:
        spread = sum(float(energy[t.name].mean() * t.weight.var(correction=0)) * t.weight.numel() for t in unit.targets)
        costs.append({bits: spread * 4.0**-bits for bits in unit.choices})
    return costs


def hessian(job: Job, units: Sequence[Unit], weights: Weights) -> Costs:
    """Return ``tr(H) / in * |Q(W) - W|**2``, the squared output error if all input channels had the same energy."""
    energy = input_energy(job)
    return _of_errors(job.loaded, units, weights, lambda t, error: error.square().sum() * energy[t.name].mean())


def block(job: Job, units: Sequence[Unit], weights: Weights) -> Costs:
    """Return ``|f(x; Q(W)) - f(x; W)|**2 / |f(x; W)|**2`` with ``f`` the unit's block, residual stream included.

    It is relative to the block's whole output, and therefore comparable between units.
    """
    costs: Costs = [{} for _ in units]
    for task in walk(job):
        task.outputs = task.through(task.inputs)
        energy = sum(float(out.float().square().sum()) for out in task.outputs)
        mine = [index for index, unit in enumerate(units) if unit.targets[0].block == task.index]
        jobs = [(index, bits) for index in mine for bits in units[index].choices]
        for index, bits in progress.track(jobs, "rounding units", len(jobs)):
            with rounded_unit(job.loaded, units[index], bits, weights):
                found = zip(map(task.forward, task.inputs), task.outputs, strict=True)
                costs[index][bits] = sum(float((a.float() - b.float()).square().sum()) for a, b in found) / energy
    return costs


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
    for unit in progress.track(units, "rounding weights", len(units)):
        errors = {
            bits: [(t, (weights(t, bits) - t.weight).to(loaded.device)) for t in unit.targets] for bits in unit.choices
        }
        costs.append({bits: sum(float(cost(*each)) for each in pairs) for bits, pairs in errors.items()})
        if loaded.streaming:
            memory.Pages().drop(*(weight_of(target.linear) for target in unit.targets))
    return costs


Changes = dict[Target, Tensor]  # rounded minus float weight of each linear, float32 [out, in]
Measure = Callable[[Tensor, Tensor, Tensor, Changes], float]


def _one_at_a_time(job: Job, units: Sequence[Unit], weights: Weights, measure: Measure) -> Costs:
    """Return the mean over tokens of ``measure``, with one unit at a time at each width and the rest in floating point.

    ``measure`` gets tokens, labels, the float model's logits that predict the next token, and the changes of the
    weights; it returns a sum over tokens.
    """
    costs: Costs = [dict.fromkeys(unit.choices, 0.0) for unit in units]
    jobs = [(index, bits) for index, unit in enumerate(units) for bits in unit.choices]
    loaded = job.loaded
    batches = list(_batches(job, max(1, TOKENS_PER_BATCH // job.text.shape[1])))
    count = sum(int(_learned(labels).sum()) for _, labels in batches)
    for number, (tokens, labels) in enumerate(batches):
        with torch.no_grad():
            teacher = _logits(loaded, tokens)
        for index, bits in progress.track(jobs, f"rounding units, text {number + 1} of {len(batches)}", len(jobs)):
            with rounded_unit(loaded, units[index], bits, weights) as change:
                costs[index][bits] += measure(tokens, labels, teacher, change) / count
    return costs


@contextmanager
def rounded_unit(loaded: LoadedModel, unit: Unit, num_bits: int, weights: Weights = nearest) -> Iterator[Changes]:
    """Round the linears of ``unit`` while the context lasts; yields the changes of their weights."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    changes: Changes = {}
    try:
        for target in unit.targets:
            module = loaded.model.get_submodule(target.name)
            parameter = weight_of(module)
            weight = weights(target, num_bits).to(loaded.device)
            changes[target] = weight - target.weight.to(loaded.device)
            kept.append((parameter, parameter.data))
            parameter.data = (weight.T if isinstance(module, Conv1D) else weight).to(parameter.dtype)
        yield changes
    finally:
        for parameter, data in kept:
            parameter.data = data


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
    logits = _logits(loaded, tokens).flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten().to(loaded.device), reduction="sum", ignore_index=IGNORED)


class CostEstimator(NamedTuple):
    """A way to measure costs, and its needs."""

    measure: Callable[[Job, Sequence[Unit], Weights], Costs]
    whole: bool  # True if the whole model must be in memory
    outputs: bool  # True if it measures outputs, in which errors of weights can cancel


COST_ESTIMATORS = {
    "variance": CostEstimator(variance, whole=False, outputs=False),
    "hessian": CostEstimator(hessian, whole=False, outputs=False),
    "block": CostEstimator(block, whole=False, outputs=True),
    "fisher": CostEstimator(fisher, whole=True, outputs=False),
    "loss": CostEstimator(loss, whole=True, outputs=True),
    "delta-loss": CostEstimator(delta_loss, whole=True, outputs=False),
}


def measure_costs(job: Job, units: Sequence[Unit], config: BudgetConfig) -> Costs:
    """Measure costs on the text of the job by the estimator of ``config``; ``units`` may belong to another copy."""
    estimator = COST_ESTIMATORS[config.estimator]
    units = [Unit(tuple(t.within(job.loaded.model) for t in unit.targets), unit.choices) for unit in units]
    job = replace(job, targets=tuple(target for unit in units for target in unit.targets))
    by_gptq = estimator.outputs and config.rounding == "gptq"
    return estimator.measure(job, units, compensated(job, units) if by_gptq else nearest)
