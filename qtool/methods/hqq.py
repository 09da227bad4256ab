"""HQQ: half-quadratic quantization without data. The zero point of each group moves so that the weights' rounding
errors ``e`` become sparse: it lowers ``sum |e|**norm`` with a norm below one.

That sum has no useful gradient, so the problem is split (Badri and Shaji, 2023, mobiusml.github.io/hqq_blog): a second
variable ``u`` takes the large errors by shrinkage, ``u = sign(e) relu(|e| - |e|**(norm - 1) / beta)``, and the rest is
least squares with a closed form. With codes ``q`` the zero point is the mean of ``q - (w - u) / scale``; the two steps
alternate while ``beta`` grows. The range at the start is the group's extremes, or it is searched.

The resulting zero point lies between codes. With ``quant.float_zero`` it is stored like that, which only the native
format and the dense export can hold. Otherwise it is rounded to an integer and stays there, and the scale moves by the
same two steps; the scales of symmetric grids move the same way. The run reports the weight error before and after the
zero points are made integers.

Where we differ: errors are measured in quantization steps of their group, or ``beta`` would mean something else in
every layer (at the size of a language model's weights the reference's shrinkage takes nothing at all); a group keeps
the best grid of all iterations, round-to-nearest included, where the reference stops a whole matrix when its mean error
stops falling; and scales move where zero points cannot.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job, Method, Result
from qtool.blocks.shares import by_rows
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantSpec
from qtool.config.sections import MethodConfig
from qtool.quant.affine import (
    QuantizedWeight,
    dequantize,
    grouped,
    minmax_qparams,
    on_grid,
    round_to_codes,
    settled,
    stored_scale,
    stored_zero_point,
    to_grid,
)
from qtool.quant.ranges import search_qparams
from qtool.system import distributed, progress


class Config(MethodConfig):
    """HQQ: zero points optimised for sparse errors, without data."""

    name: Literal["hqq"] = "hqq"
    iterations: int = Field(
        20,
        ge=0,
        description="Number of iterations (one shrinkage and one least-squares step each); 0: keep the grid of the "
        "start.",
    )
    norm: float = Field(
        0.7, gt=0, le=1, description="Exponent of the weight error that is lowered; below 1 favours sparse errors."
    )
    beta: float = Field(
        10.0,
        gt=0,
        description="Weight of the quadratic term in the first iteration, for errors in quantization steps; larger: "
        "less shrinkage.",
    )
    beta_growth: float = Field(1.01, ge=1, description="Factor by which beta grows after each iteration.")
    range: Literal["minmax", "search"] = Field(
        "minmax",
        description="Range of each group at the start. minmax: its extremes; search: the range with the smallest "
        "squared error.",
    )


class Grid(NamedTuple):
    """Scale and zero point ``[out, groups]``."""

    scale: Tensor
    zero_point: Tensor


def objective(weight: Tensor, grid: Grid, spec: QuantSpec, norm: float) -> Tensor:
    """Return ``sum |w - Q(w)|**norm`` of each group, ``[out, groups]``; of a block, if scales are stored by blocks."""
    rounded = dequantize(*on_grid(weight, grid, spec))
    errors: Tensor = grouped(weight - rounded, spec).abs().pow(norm).sum(-1)
    if spec.blocks is None:
        return errors
    by_block: Tensor = errors.unflatten(1, (-1, spec.blocks.groups))
    return by_block.sum(-1, keepdim=True).expand_as(by_block).flatten(1)


def shrink(error: Tensor, norm: float, beta: float) -> Tensor:
    """Return ``u = sign(e) relu(|e| - |e|**(norm - 1) / beta)``, the part of each error that counts as sparse."""
    size = error.abs()
    return error.sign() * (size - size.pow(norm - 1) / beta).relu()  # at 0 the power is infinite, and u is 0


def improve(weight: Tensor, grid: Grid, spec: QuantSpec, norm: float, beta: float) -> Grid:
    """Do one alternation: round and shrink on ``grid``, then return the grid with its least-squares zero point.

    If the zero point is fixed, the scale is fitted instead.
    """
    on_grid = to_grid(weight, *grid, spec)
    codes = round_to_codes(on_grid, spec)
    rest = on_grid - shrink(on_grid - codes, norm, beta)  # (w - u) / scale + zero_point
    if spec.float_zero:
        return Grid(grid.scale, grid.zero_point + (codes - rest).mean(-1))
    codes, rest = codes - grid.zero_point.unsqueeze(-1), rest - grid.zero_point.unsqueeze(-1)
    factor = (codes * rest).sum(-1) / codes.square().sum(-1)
    # the factor is NaN where all codes are 0, and the scale is kept there
    return Grid(torch.where(factor > 0, grid.scale * factor, grid.scale), grid.zero_point)


def better(weight: Tensor, one: Grid, other: Grid, spec: QuantSpec, norm: float) -> Grid:
    """Return for each group the grid with the smaller error, and ``one`` where the errors are equal."""
    wins = objective(weight, other, spec, norm) < objective(weight, one, spec, norm)
    return Grid(*(torch.where(wins, new, old) for new, old in zip(other, one, strict=True)))


def alternate(weight: Tensor, start: Grid, spec: QuantSpec, config: Config) -> Grid:
    """Return the best grid of each group over all iterations, ``start`` included, as it can be stored."""
    best = tried = start
    for iteration in range(config.iterations):
        tried = improve(weight, tried, spec, config.norm, config.beta * config.beta_growth**iteration)
        scale = stored_scale(tried.scale, spec)
        stored = Grid(scale, stored_zero_point(tried.zero_point, scale, spec))
        best = better(weight, best, stored, spec, config.norm)
    return best


def initial(weight: Tensor, spec: QuantSpec, config: Config) -> Grid:
    """Return the grid of round-to-nearest."""
    return Grid(*(minmax_qparams(weight, spec) if config.range == "minmax" else search_qparams(weight, spec, 2.0)))


def optimise(weight: Tensor, spec: QuantSpec, config: Config) -> tuple[QuantizedWeight, Tensor]:
    """Quantize ``weight`` ``[out, in]``, never worse than round-to-nearest under ``objective``.

    Also return the float32 weight ``[out, in]`` on the grid whose zero points may lie between codes.
    """
    if spec.blocks is not None:
        free = spec.free
    else:
        free = spec if spec.symmetric else spec.model_copy(update={"float_zero": True})
    best = alternate(weight, initial(weight, free, config), free, config)
    unsnapped = dequantize(*on_grid(weight, best, free))
    if free != spec:
        snapped = alternate(weight, Grid(*settled(*best, spec)), spec, config)
        best = better(weight, initial(weight, spec, config), snapped, spec, config.norm)
    return on_grid(weight, best, spec), unsnapped


def run(job: Job, config: Config) -> Result:
    """Quantize every target; the text and the seed of the job are not used.

    The series ``weight_error`` has ``|Q(w) - w|**2 / |w|**2`` over the linears of each block; where zero points are
    rounded to integers, ``float_zero_error`` has the error before that.
    """
    specs = {target.spec for target in job.targets}
    snapping = not all(spec.symmetric or spec.float_zero or spec.blocks is not None for spec in specs)

    def quantize_block(task: BlockTask) -> dict[str, float]:
        after = before = total = 0.0
        for target in task.targets:
            weight, spec = target.weight, target.spec
            errors: list[float] = []  # of the rows that this process solves

            def solve(rows: Tensor, spec: QuantSpec = spec, errors: list[float] = errors) -> QuantizedWeight:
                found, unsnapped = optimise(rows, spec, config)
                errors.append(float((unsnapped - rows).square().sum()))
                return found

            found = by_rows(weight, spec, solve)
            after += float((dequantize(*found) - weight).square().sum())
            before += distributed.summed(sum(errors))[0]
            total += float(weight.square().sum())
            task.pack(target, found)
        figures = {"weight_error": after / total if total else 0.0}
        return figures | ({"float_zero_error": before / total if total else 0.0} if snapping else {})

    result = run_blocks(job, quantize_block)
    if snapping:
        before, after = sum(result.values("float_zero_error")), sum(result.values("weight_error"))
        change = 100 * (after / before - 1) if before else 0.0
        progress.note(
            f"hqq: rounding zero points to integers changed the squared weight error by {change:+.1f} %; "
            "quant.float_zero: true keeps them between codes (native format and dense export only)"
        )
    return result


METHOD = Method(
    "ptq",
    "zero points optimised for sparse errors, no data",
    Config,
    run,
    needs_data=lambda config: False,
    round_weight=lambda weight, spec, config: optimise(weight, spec, config)[0],
)
