"""The steps from a weight to its rounded weight, and their gradients, a few rows at a time.

Written out as tensor operations, rounding reads and writes memory about 35 times for each weight and training step.
Here a few rows stay in the cache until all operations on them are done, and a result is written once. Every number is
made by the same operations as in ``affine.to_grid`` and ``affine.from_codes``, in the same order. They serve the
straight-through estimator with a hard clamp; other estimators are in ``rounding.py``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtool.config.training import RoundingConfig
from qtool.system.tensors import size_for

CHUNK_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 26}  # number of weights in the cache at once; a CPU's caches hold 2**16


def serves(config: RoundingConfig) -> bool:
    """Return whether ``rounded`` has the gradient that ``config`` asks for."""
    return config.estimator == "ste" and config.clamp == "hard"


def _rows(grouped: Tensor) -> Iterator[slice]:
    """Cut the rows of ``grouped`` ``[out, groups, group_size]`` into those that are handled together."""
    size = max(1, size_for(grouped.device, CHUNK_NUMBERS) // max(1, grouped[:1].numel()))
    return (slice(start, start + size) for start in range(0, len(grouped), size))


class _ToGrid(torch.autograd.Function):
    """``weight / scale + zero_point``, of groups."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        grid = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for rows in _rows(weight):
            torch.div(weight[rows], scale[rows].unsqueeze(-1), out=grid[rows]).add_(zero_point[rows].unsqueeze(-1))
        return grid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        of_weight, of_scale, of_zero_point = (
            torch.empty_like(like, memory_format=torch.contiguous_format) if needed else None
            for like, needed in zip((weight, scale, scale), ctx.needs_input_grad, strict=True)
        )
        for rows in _rows(weight):
            incoming, steps = grad[rows], scale[rows].unsqueeze(-1)
            if of_weight is not None:
                torch.div(incoming, steps, out=of_weight[rows])
            if of_scale is not None:
                slopes = (weight[rows] / steps).div_(steps).mul_(incoming).neg_()
                torch.sum(slopes, -1, out=of_scale[rows])
            if of_zero_point is not None:
                torch.sum(incoming, -1, out=of_zero_point[rows])
        return of_weight, of_scale, of_zero_point


class _Rounded(torch.autograd.Function):
    """``(clamp(round(grid)) - zero_point) * scale``, of groups; the gradient of rounding is 1, beyond the ends 0."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        ctx.ends = low, high
        ctx.save_for_backward(grid, scale, zero_point)
        weight = torch.empty_like(grid, memory_format=torch.contiguous_format)
        for rows in _rows(grid):
            codes = torch.round(grid[rows], out=weight[rows]).clamp_(low, high)
            codes.sub_(zero_point[rows].unsqueeze(-1)).mul_(scale[rows].unsqueeze(-1))
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grid, scale, zero_point = ctx.saved_tensors
        of_grid, of_scale, of_zero_point = (
            torch.empty_like(like, memory_format=torch.contiguous_format) if needed else None
            for like, needed in zip((grid, scale, scale), ctx.needs_input_grad[:3], strict=True)
        )
        for rows in _rows(grid):
            incoming = grad[rows]
            rounded = grid[rows].round()
            codes = rounded.clamp(*ctx.ends)
            of_codes = incoming * scale[rows].unsqueeze(-1)
            if of_grid is not None:
                of_grid[rows] = torch.where(codes != rounded, 0.0, of_codes)
            if of_scale is not None:
                torch.sum(codes.sub_(zero_point[rows].unsqueeze(-1)).mul_(incoming), -1, out=of_scale[rows])
            if of_zero_point is not None:
                torch.sum(of_codes, -1, out=of_zero_point[rows]).neg_()
        return of_grid, of_scale, of_zero_point, None, None


def to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return groups of weights in grid units; ``weight`` ``[out, groups, group_size]`` in the dtype of ``scale``."""
    result: Tensor = _ToGrid.apply(weight, scale, zero_point)  # type: ignore[no-untyped-call]
    return result


def rounded(grid: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Return the rounded weights ``[out, groups, group_size]`` of positions ``grid`` with codes ``low .. high``."""
    result: Tensor = _Rounded.apply(grid, scale, zero_point, low, high)  # type: ignore[no-untyped-call]
    return result
