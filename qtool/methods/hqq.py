"""HQQ: half-quadratic quantization. No data: the zero point of each group is moved so that the weights' rounding
errors ``e`` become sparse, which a norm below one asks for: ``sum |e|**norm``.

That sum has no gradient worth following, so it is split (Badri and Shaji, 2023, mobiusml.github.io/hqq_blog): a second
variable ``u`` takes the large errors by shrinkage, ``u = sign(e) relu(|e| - |e|**(norm - 1) / beta)``, and what is left
is least squares with a closed form. With codes ``q`` the zero point is the mean of ``q - (w - u) / scale``; ``beta``
grows and the two alternate. The range is the group's extremes, or searched.

A zero point found so lies between codes. With ``quant.float_zero`` it is stored like that, which only the native format
and the dense export hold. Else it goes to the nearest integer and stays there while the scale moves by the same two
steps; so do the scales of symmetric grids. The weight error before is told beside the error after it.

Where we differ: errors are measured in steps of their group, or ``beta`` would mean something else in every layer (at
the size of a language model's weights the reference's shrinkage takes nothing at all); a group keeps the best grid it
met, round-to-nearest among them, where the reference stops a whole matrix when its mean error stops falling; and scales
move where zero points cannot.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job, Method, Result
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantSpec
from qtool.config.sections import MethodConfig
from qtool.quant.affine import (
    QuantizedWeight,
    dequantize,
    grouped,
    minmax_qparams,
    quantize,
    round_to_codes,
    stored_scale,
    stored_zero_point,
    to_grid,
)
from qtool.quant.ranges import search_qparams
from qtool.system import progress


class Config(MethodConfig):
    """HQQ: zero points optimised for sparse errors, without data."""

    name: Literal["hqq"] = "hqq"
    iterations: int = Field(20, ge=0, description="Alternations of the two steps.")
    norm: float = Field(0.7, gt=0, le=1, description="Exponent of the error; below 1 asks for sparse errors.")
    beta: float = Field(10.0, gt=0, description="Weight of the quadratic half at first, errors in steps of the grid.")
    beta_growth: float = Field(1.01, ge=1, description="Factor of beta after each iteration.")
    range: Literal["minmax", "search"] = Field(
        "minmax", description="How a group's range is chosen: its extremes, or a search for the smallest squared error."
    )


class Grid(NamedTuple):
    """Scale and zero point ``[out, groups]``."""

    scale: Tensor
    zero_point: Tensor


def objective(weight: Tensor, grid: Grid, spec: QuantSpec, norm: float) -> Tensor:
    """``sum |w - Q(w)|**norm`` of each group, ``[out, groups]``."""
    rounded = dequantize(quantize(weight, *grid, spec), *grid, spec)
    return grouped(weight - rounded, spec).abs().pow(norm).sum(-1)


def shrink(error: Tensor, norm: float, beta: float) -> Tensor:
    """``sign(e) relu(|e| - |e|**(norm - 1) / beta)``: what the second variable takes of each error."""
    size = error.abs()
    return error.sign() * (size - size.pow(norm - 1) / beta).relu()  # at 0 the power is infinite, and nothing is taken


def improve(weight: Tensor, grid: Grid, spec: QuantSpec, norm: float, beta: float) -> Grid:
    """One alternation: round and shrink on ``grid``, then its least-squares zero point, or scale if that is fixed."""
    on_grid = to_grid(weight, *grid, spec)
    codes = round_to_codes(on_grid, spec)
    rest = on_grid - shrink(on_grid - codes, norm, beta)  # (w - u) / scale + zero_point
    if spec.float_zero:
        return Grid(grid.scale, grid.zero_point + (codes - rest).mean(-1))
    codes, rest = codes - grid.zero_point.unsqueeze(-1), rest - grid.zero_point.unsqueeze(-1)
    factor = (codes * rest).sum(-1) / codes.square().sum(-1)
    return Grid(torch.where(factor > 0, grid.scale * factor, grid.scale), grid.zero_point)  # not where all codes are 0


def better(weight: Tensor, one: Grid, other: Grid, spec: QuantSpec, norm: float) -> Grid:
    """For each group the grid with the smaller error, ``one`` where they are equal."""
    wins = objective(weight, other, spec, norm) < objective(weight, one, spec, norm)
    return Grid(*(torch.where(wins, new, old) for new, old in zip(other, one, strict=True)))


def alternate(weight: Tensor, start: Grid, spec: QuantSpec, config: Config) -> Grid:
    """The best grid that each group meets, as it can be stored, ``start`` among them."""
    best = tried = start
    for iteration in range(config.iterations):
        tried = improve(weight, tried, spec, config.norm, config.beta * config.beta_growth**iteration)
        stored = Grid(stored_scale(tried.scale, spec), stored_zero_point(tried.zero_point, spec))
        best = better(weight, best, stored, spec, config.norm)
    return best


def initial(weight: Tensor, spec: QuantSpec, config: Config) -> Grid:
    """The grid that round-to-nearest would take."""
    return Grid(*(minmax_qparams(weight, spec) if config.range == "minmax" else search_qparams(weight, spec, 2.0)))


def optimise(weight: Tensor, spec: QuantSpec, config: Config) -> tuple[QuantizedWeight, Tensor]:
    """``weight`` ``[out, in]`` quantized, never worse than round-to-nearest under ``objective``.

    Also returns the float32 weight ``[out, in]`` that it would be if its zero points could lie between codes.
    """
    free = spec if spec.symmetric else spec.model_copy(update={"float_zero": True})
    best = alternate(weight, initial(weight, free, config), free, config)
    unsnapped = dequantize(quantize(weight, *best, free), *best, free)
    if free != spec:
        snapped = alternate(weight, Grid(best.scale, stored_zero_point(best.zero_point, spec)), spec, config)
        best = better(weight, initial(weight, spec, config), snapped, spec, config.norm)
    return QuantizedWeight(quantize(weight, *best, spec), *best, spec), unsnapped


def run(job: Job, config: Config) -> Result:
    """Quantize every target; text and seed are not used.

    The series ``weight_error`` has ``|Q(w) - w|**2 / |w|**2`` over the linears of each block; where zero points are
    made integers, ``float_zero_error`` has the error before that.
    """
    snapping = not all(target.spec.symmetric or target.spec.float_zero for target in job.targets)

    def quantize_block(task: BlockTask) -> dict[str, float]:
        after = before = total = 0.0
        for target in task.targets:
            weight = target.weight
            found, unsnapped = optimise(weight, target.spec, config)
            after += float((dequantize(*found) - weight).square().sum())
            before += float((unsnapped - weight).square().sum())
            total += float(weight.square().sum())
            task.pack(target, found)
        errors = {"weight_error": after / total if total else 0.0}
        return errors | ({"float_zero_error": before / total if total else 0.0} if snapping else {})

    result = run_blocks(job, quantize_block)
    if snapping:
        before, after = sum(result.values("float_zero_error")), sum(result.values("weight_error"))
        change = 100 * (after / before - 1) if before else 0.0
        progress.note(
            f"hqq: making zero points integers changed the squared weight error by {change:+.1f} %; quant.float_zero: "
            "true leaves them between codes (native format and dense export only)"
        )
    return result


METHOD = Method("ptq", "zero points optimised for sparse errors, no data", Config, run, needs_data=lambda config: False)
