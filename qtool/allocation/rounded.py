"""Weights of the float model, rounded to each width, for measuring what that costs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.allocation.tables import head_hessian
from qtool.allocation.units import Unit
from qtool.blocks import tables
from qtool.blocks.driver import group_inputs, walk
from qtool.blocks.job import Job
from qtool.blocks.moments import Statistics, collect
from qtool.blocks.stages import Stage
from qtool.blocks.states import BlockStates
from qtool.methods import gptq
from qtool.models.experts import num_experts
from qtool.models.linears import Target, weight_of
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight, dequantize, quantize
from qtool.quant.ranges import search_qparams

Weights = Callable[[Target, int], Tensor]  # returns a weight rounded to a width, float32 [out, in]
Changes = dict[Target, Tensor]  # rounded minus float weight of each linear, float32 [out, in]


def nearest(target: Target, num_bits: int) -> Tensor:
    """Return the weight ``[out, in]`` of ``target`` at another width, rounded to nearest in a searched range."""
    target = at_width(target, num_bits)
    stored = target.stored_weight
    if stored.is_contiguous():
        return dequantize(*tables.nearest(target, stored.device))
    grid = search_qparams(target.weight, target.spec)  # transposed: whole, as sums of its errors depend on its strides
    return dequantize(quantize(target.weight, *grid, target.spec), *grid, target.spec)


def at_width(target: Target, num_bits: int) -> Target:
    """Return ``target`` with another width in its grid."""
    return replace(target, spec=target.spec.model_copy(update={"num_bits": num_bits}))


@torch.no_grad()
def compensated(job: Job, units: Sequence[Unit]) -> Weights:
    """Return the weights of each width, rounded by GPTQ on the float model's inputs; it keeps all codes in memory.

    Embeddings, whose rows are read alone, are rounded to nearest.
    """
    found: dict[tuple[str, int], QuantizedWeight] = {}
    choices = {target.name: unit.choices for unit in units for target in unit.targets}
    config = gptq.Config()

    def keep(target: Target, solved: Iterable[QuantizedWeight]) -> None:
        for codes, scale, zero_point, spec in solved:
            weight = QuantizedWeight(codes.cpu(), scale.cpu(), zero_point.cpu(), spec)
            found[target.name, spec.num_bits] = weight

    states = BlockStates(job, job.loaded.dtype, with_float_states=False)
    for task in walk(job, states):
        for group, inputs in group_inputs(task):
            statistics = collect(Stage(group, inputs, None), config.token_weights)
            for target in group:
                specs = [at_width(target, bits).spec for bits in choices[target.name]]
                if num_experts(target.linear) > 1:
                    keep(target, gptq.solve_experts(target, inputs, specs, config))
                else:
                    factor = gptq.factorise(statistics, target.spec, config, target.name)
                    keep(target, [gptq.solve(target.weight, factor, spec, config) for spec in specs])
    device = job.loaded.device
    for unit in units:
        for target in unit.targets if unit.table else ():
            copies = [at_width(target, bits) for bits in unit.choices]
            if unit.table == "embedding":
                keep(target, (tables.nearest(copy, device) for copy in copies))
            else:
                statistics = Statistics(head_hessian(states), None)
                factor = gptq.factorise(statistics, target.spec, config, target.name)
                weight = target.weight.to(device)
                keep(target, (gptq.solve(weight, factor, copy.spec, config) for copy in copies))
    return lambda target, num_bits: dequantize(*found[target.name, num_bits])


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
