"""The uniform affine grid: ``w ~ (code - zero_point) * scale`` with codes ``0 .. 2**num_bits - 1``.

Symmetric means that the zero point is held at the middle code ``2**(num_bits - 1)``; nothing else differs.
A weight ``[out, in]`` is cut into groups of ``group_size`` consecutive input channels, each with one scale and one
zero point ``[out, groups]``, an integer on the grid unless ``float_zero`` lets it lie between codes. All arithmetic is
in the dtype of the scales, which is float32, and every scale and zero point is rounded to what is stored *before* it is
used, so that the weight in training, on disk and in an engine are the same bits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.config.training import RoundingConfig
from qtool.quant.rounding import PLAIN, round_and_clamp, straight_through
from qtool.system.errors import InputError

CHUNK_NUMBERS = 1 << 22  # weights compared at once


class QuantizedWeight(NamedTuple):
    """What every method produces for a linear, and all that packing, saving, loading and exporting need."""

    codes: Tensor  # [out, in] uint8
    scale: Tensor  # [out, groups] float32, holding values of spec.scale_dtype
    zero_point: Tensor  # [out, groups] float32, holding integers 0 .. qmax, or with float_zero values of scale_dtype
    spec: QuantSpec


def grouped(weight: Tensor, spec: QuantSpec) -> Tensor:
    """View of ``[out, in]`` as ``[out, groups, group_size]``."""
    out_features, in_features = weight.shape
    return weight.reshape(out_features, spec.num_groups(in_features), -1)


def _working(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for a tensor that is in it."""
    return torch.promote_types(tensor.dtype, torch.float32)


def stored_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """``scale`` with values of ``spec.scale_dtype`` only, in float32; the gradient passes unchanged.

    Scales below the smallest positive number of the stored dtype become that number: a stored zero would lose the
    whole group.
    """
    dtype = getattr(torch, spec.scale_dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rounded = scale.detach().to(dtype).to(_working(scale)).clamp(min=smallest)
    return straight_through(scale, rounded)


def stored_zero_point(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """``zero_point`` as float32 holding what is stored: the nearest code, or, with ``float_zero``, the nearest value of
    ``spec.scale_dtype``; the gradient passes unchanged.
    """
    if spec.float_zero:
        rounded = zero_point.detach().to(getattr(torch, spec.scale_dtype)).to(_working(zero_point))
    else:
        rounded = zero_point.detach().round().clamp(spec.qmin, spec.qmax)
    return straight_through(zero_point, rounded)


def scale_and_zero_point(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Grid that covers ``[low, high]`` per group, each ``[out, groups]``, with ``low <= 0 <= high``.

    Asymmetric: ``scale = (high - low) / qmax``, ``zero_point = -low / scale``, to the nearest that can be stored.
    Symmetric: ``scale = max(-low, high) * 2 / qmax``, ``zero_point = 2**(num_bits - 1)``.
    An empty range (an all-zero group) is taken as ``[-1, 1]``, so that zero is held exactly.
    """
    empty = (low == 0) & (high == 0)
    low = torch.where(empty, -1.0, low.float())
    high = torch.where(empty, 1.0, high.float())
    if spec.symmetric:
        scale = stored_scale(torch.maximum(-low, high) * (2 / spec.qmax), spec)
        return scale, torch.full_like(scale, spec.middle)
    scale = stored_scale(high / spec.qmax - low / spec.qmax, spec)  # divided first: no overflow
    return scale, stored_zero_point(-low / scale, spec)


def minmax_qparams(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[out, groups]`` that cover the range of each group of ``weight`` ``[out, in]``.

    The range always includes zero.
    """
    groups = grouped(weight, spec)
    return scale_and_zero_point(groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0), spec)


def to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """``weight`` in grid units before rounding, ``[out, groups, group_size]``."""
    return grouped(weight.to(scale.dtype), spec) / scale.unsqueeze(-1) + zero_point.unsqueeze(-1)


def round_to_codes(grid: Tensor, spec: QuantSpec, rounding: RoundingConfig = PLAIN) -> Tensor:
    """Nearest code of each grid value, half to even, as a float.

    The gradient is that of ``rounding``; by default one inside the grid and zero outside.
    """
    return round_and_clamp(grid, spec.qmin, spec.qmax, rounding)


def from_codes(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Weight ``[out, in]`` of float codes ``[out, groups, group_size]``; differentiable in all arguments."""
    return ((codes - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Codes ``[out, in]`` uint8 of ``weight`` on the grid given by ``scale`` and ``zero_point`` ``[out, groups]``."""
    return round_to_codes(to_grid(weight, scale, zero_point, spec), spec).to(torch.uint8).flatten(1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Weight ``[out, in]`` of ``codes``, float32 as ``scale`` is; differentiable in ``scale`` and ``zero_point``."""
    return from_codes(grouped(codes, spec).to(scale.dtype), scale, zero_point)


def fake_quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """``dequantize(quantize(weight))``, the same bits, with gradients to ``weight``, ``scale`` and ``zero_point``."""
    return from_codes(round_to_codes(to_grid(weight, scale, zero_point, spec), spec), scale, zero_point)


@torch.no_grad()
def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """``|Q(w) - w|**2 / |w|**2`` of ``weight`` ``[out, in]`` in any dtype; a few rows at a time, so no copy is made.

    Zero where both are zero, infinite where only the weight is.
    """
    codes, scale, zero_point, spec = quantized
    size = max(1, CHUNK_NUMBERS // weight.shape[1])
    change = total = 0.0
    for start in range(0, weight.shape[0], size):
        rows = slice(start, start + size)
        part = weight[rows].to(scale.dtype)
        change += float((dequantize(codes[rows], scale[rows], zero_point[rows], spec) - part).square().sum())
        total += float(part.square().sum())
    return change / total if total else math.inf if change else 0.0


def check_weight(weight: Tensor, spec: QuantSpec, name: str, extremes: tuple[float, float] | None = None) -> None:
    """Refuse what the grid cannot hold, naming the tensor; ``extremes`` are its lowest and highest value, if known.

    Raises:
        InputError: NaN or infinite values, a group size that does not divide, or a scale above its stored dtype.
    """
    in_features = weight.shape[1]
    if spec.group_size != -1 and in_features % spec.group_size:
        raise InputError(
            f"{name} has {in_features} input channels, and group_size {spec.group_size} does not divide that; "
            f"choose a divisor or add an override for it (quant.overrides)"
        )
    if extremes is None:
        low, high = (float(end) for end in weight.detach().aminmax())  # needs no memory, and keeps NaN
    else:
        low, high = extremes
    largest = max(-low, high) if low == low else low
    if not largest < float("inf"):  # also true for NaN
        found = int((~torch.isfinite(weight)).sum())
        raise InputError(f"{name} holds {found} NaN or infinite value(s) of {weight.numel()}; repair the checkpoint")
    limit = torch.finfo(getattr(torch, spec.scale_dtype)).max
    if 2 * largest / spec.qmax > limit:
        raise InputError(
            f"{name} has weights up to {largest:.3g}, and their scale is above the largest {spec.scale_dtype}"
            f" ({limit:.3g}); set quant.scale_dtype: float32 (or an override for it)"
        )
