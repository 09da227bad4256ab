"""AWQ: scale up the weights of input channels with large activations, so that rounding changes their products less,
and scale the activations down to match.

For a scale ``s`` per input channel, ``W x = (W diag(s)) (x / s)``. The division is folded into the module that makes
``x``: a norm's weight, or the rows of a linear (v before o, up before down). The scale is ``s = mean|x| ** ratio``,
normalised by ``sqrt(max s * min s)``; the ratio is searched on a grid, from coarse to fine, so that the output of the
surrounding module (attention or MLP) changes least when the scaled weights are quantized (Lin et al., arXiv
2306.00978). Then the range of each group is clipped where that lowers ``sum (x w - x Q(clip w))**2``; queries and keys
are not clipped.

Which modules can take a scale, and how a scale is stored without a change of the function, is in ``blocks/folds.py``.

Where we differ: 9 of 20 ratios are tried; the clip search uses the group's whole second moment and not 512 tokens; the
inputs of a block come from the quantized blocks before it. Where a grid rounds the inputs of its linear, scales and
ranges are judged on rounded inputs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.blocks.driver import run_blocks
from qtool.blocks.folds import Fold, Found, folds_of, out_channels
from qtool.blocks.job import Job, Method, Result
from qtool.blocks.shares import by_rows
from qtool.blocks.task import BlockTask
from qtool.config.sections import MethodConfig
from qtool.models.linears import Target, weight_of
from qtool.quant.activations import round_input
from qtool.quant.affine import (
    QuantizedWeight,
    fake_quantize,
    from_codes,
    grouped,
    minmax_qparams,
    on_grid,
    round_to_codes,
    scale_and_zero_point,
    settled,
    to_grid,
)
from qtool.system import distributed

NOT_CLIPPED = ("*q_proj", "*k_proj", "*query*", "*qkv*", "*Wqkv", "*c_attn")  # linears whose product enters a softmax


class Config(MethodConfig):
    """AWQ: activation-aware scales, then clipping."""

    name: Literal["awq"] = "awq"
    num_ratios: int = Field(
        20, ge=1, description="Number n of exponents that a scale may have: 0, 1/n, ... (n - 1)/n; 1: no scaling."
    )
    search_samples: int = Field(
        16, ge=1, description="Calibration windows on which scales and clipping are searched, in whole batches."
    )
    clip: bool = Field(
        True, description="Search for a smaller range of each group after scaling, except in queries and keys."
    )
    clip_steps: int = Field(
        10, ge=1, description="Number of ranges tried per group: 1, 0.95, 0.9, ... times its largest absolute weight."
    )


def judged_module(block: nn.Module, fold: Fold) -> nn.Module:
    """Return the module whose output a scale is judged on: the smallest that contains all readers (attention, MLP).

    For a fold from one linear into one other, it is the reader itself.
    """
    linears = [reader.linear for reader in fold.readers]
    if len(linears) == 1 and weight_of(fold.source).dim() == 2:
        return linears[0]
    around = [m for m in block.modules() if m not in linears and set(linears) <= set(m.modules())]
    return around[-1]  # modules() yields outer modules first


@torch.no_grad()
def search_scale(task: BlockTask, fold: Fold, mean: Tensor, config: Config, samples: list[Tensor]) -> Tensor:
    """Return the scale ``[channels]`` that changes the judged module's output least; ``mean`` is the mean ``|x|``."""
    module = judged_module(task.block, fold)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    task.observe([module], lambda _, args, kwargs: calls.append((args, kwargs)), samples)
    reference = [_first(module(*args, **kwargs)) for args, kwargs in calls]
    originals = [weight_of(reader.linear).detach().clone() for reader in fold.readers]

    def scale(place: int) -> Tensor:
        s = mean.pow(place / config.num_ratios).clamp(min=1e-4)
        return s / (s.max() * s.min()).sqrt()

    def error(place: int) -> float:
        s = scale(place)
        for reader in fold.readers:
            scaled = reader.weight * s
            rounded = fake_quantize(scaled, *minmax_qparams(scaled, reader.spec), reader.spec) / s
            weight_of(reader.linear).copy_(rounded.T if isinstance(reader.linear, Conv1D) else rounded)
        with _rounding_inputs(fold.readers, s):
            found = sum(
                float((_first(module(*args, **kwargs)) - out).float().square().mean())
                for (args, kwargs), out in zip(calls, reference, strict=True)
            )
        for reader, weight in zip(fold.readers, originals, strict=True):
            weight_of(reader.linear).copy_(weight)
        return found

    return scale(coarse_to_fine(lambda places: distributed.summed(*map(error, places)), config.num_ratios))


def coarse_to_fine(errors_of: Callable[[Sequence[int]], list[float]], count: int) -> int:
    """Return the place in 0, 1, ... ``count - 1`` with the lowest error found; of equal ones the first.

    Every fourth or so is tried first, then the two at half the distance around the best, down to its neighbours: at
    most 9 of 20 places, and the lowest of all where errors fall and then rise. NaN counts as the highest error.
    """
    step = 1 << max(0, count.bit_length() - 3)
    errors: dict[int, float] = {}
    best, places = 0, list(range(0, count, step))
    while places:
        errors.update(zip(places, errors_of(places), strict=True))
        best = min(errors, key=lambda place: (math.isnan(errors[place]), errors[place], place))
        step //= 2
        places = [place for place in (best - step, best + step) if step and 0 <= place < count]
    return best


@contextmanager
def _rounding_inputs(readers: Sequence[Target], s: Tensor) -> Iterator[None]:
    """Round what ``readers`` read as their packed layers will: divided by ``s``, which is multiplied back here."""
    hooks = [
        reader.linear.register_forward_pre_hook(
            lambda _, args, spec=reader.spec: (round_input(args[0] / s, spec) * s, *args[1:])
        )
        for reader in readers
        if reader.spec.activations is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first(out: Any) -> Tensor:
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


@torch.no_grad()
def clipped_qparams(rows: Tensor, target: Target, moment: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Return the grid of each group of ``rows`` of the weight of ``target`` whose range changes the output least.

    ``moment`` ``[groups, g, g]`` is the sum of ``x x^T``.
    """
    spec = target.spec
    tried = spec if spec.blocks is None else spec.free
    weight = grouped(rows, spec)
    largest = weight.abs().amax(-1)
    scale, zero_point = minmax_qparams(rows, spec)
    if not config.clip or any(fnmatchcase(target.name, pattern) for pattern in NOT_CLIPPED):
        return scale, zero_point
    best = torch.full_like(scale, float("inf"))
    for i in range(config.clip_steps):
        bound = largest * (1 - i / 20)
        low, high = torch.maximum(weight.amin(-1), -bound), torch.minimum(weight.amax(-1), bound)
        ranges = [(low.clamp(max=0), high.clamp(min=0))]
        if tried.signed:  # the extra level on either side of zero
            ranges = [(-bound, torch.zeros_like(bound)), (torch.zeros_like(bound), bound)]
        for ends in ranges:
            grid = scale_and_zero_point(*ends, tried)
            codes = round_to_codes(to_grid(rows, *grid, tried), tried)
            change = grouped(from_codes(codes, *grid, tried), tried) - weight
            error = torch.einsum("rgi,gij,rgj->rg", change, moment, change)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero_point = torch.where(better, grid[0], scale), torch.where(better, grid[1], zero_point)
    return (scale, zero_point) if tried is spec else settled(scale, zero_point, spec)


def quantize_block(task: BlockTask, config: Config, storage: torch.dtype, found: Found) -> None:
    """Fold scales, then clip and round; all of it acts on the block's float weights."""
    samples = _first_windows(task, config.search_samples)
    for fold in folds_of(task, task.inputs[0][:1], found):
        leader = fold.readers[0].linear
        sums = torch.zeros(out_channels(fold.source), device=task.inputs[0].device)
        count = 0

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: Any, sums: Tensor = sums) -> None:
            nonlocal count
            x = args[0].float().flatten(0, -2)
            sums.add_(x.abs().sum(0))
            count += x.shape[0]

        task.observe([leader], add, samples)
        distributed.all_reduce_sum(sums)
        mean = sums / distributed.summed(count)[0]
        fold.apply(search_scale(task, fold, mean, config, samples), storage)
    moments: dict[nn.Module, Tensor] = {}

    def add_moment(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        target = leaders[module]
        x = round_input(args[0].float().flatten(0, -2), target.spec)
        x = grouped(x, target.spec).transpose(0, 1)  # [groups, tokens, g]
        moment = x.transpose(1, 2) @ x
        moments[module] = moments[module] + moment if module in moments else moment

    leaders = {target.linear: target for target in task.targets}
    if config.clip:
        task.observe(leaders, add_moment, samples)
    for target in task.targets:
        weight, spec = target.weight, target.spec
        if config.clip:
            if target.linear not in moments:  # this process holds no samples
                groups = spec.num_groups(weight.shape[1])
                size = weight.shape[1] // groups
                moments[target.linear] = weight.new_zeros(groups, size, size)
            distributed.all_reduce_sum(moments[target.linear])
        moment = moments.pop(target.linear, torch.empty(0))

        def solve(rows: Tensor, target: Target = target, moment: Tensor = moment) -> QuantizedWeight:
            return on_grid(rows, clipped_qparams(rows, target, moment, config), target.spec)

        task.pack(target, by_rows(weight, spec, solve))


def _first_windows(task: BlockTask, count: int) -> list[Tensor]:
    """Return those of the first batches of the text, with at least ``count`` windows, that this process holds."""
    share = task.inputs.share
    return [task.inputs[i] for i, number in enumerate(share.numbers) if share.starts[number] < count]


def run(job: Job, config: Config) -> Result:
    """Quantize the blocks in order on the text of the job; the seed is not used."""
    step = partial(quantize_block, config=config, storage=job.loaded.storage_dtype, found={})
    # float32: scaling a half-precision weight in place would round it
    return run_blocks(job, step, compute=torch.float32)


METHOD = Method("ptq", "activation-aware scales folded into norms, then clipping", Config, run)
