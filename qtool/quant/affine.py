"""The uniform affine grid: ``w ~ (code - zero_point) * scale`` with codes ``0 .. 2**num_bits - 1``.

Symmetric means that the zero point is held at the middle code ``2**(num_bits - 1)``; nothing else differs.
A weight ``[out, in]`` is cut into groups of ``group_size`` consecutive input channels. Each group has one scale and one
zero point, ``[out, groups]``; the zero point is an integer on the grid unless ``float_zero`` lets it lie between codes.
GGUF's types store scales by blocks, and minima in the place of zero points (``block_scales.py``).
All arithmetic is in the dtype of the scales, which is float32. Every scale and zero point is rounded to its stored
dtype *before* it is used, so that the weight in training, on disk and in an engine has the same bits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.config.training import RoundingConfig
from qtool.quant import block_scales
from qtool.quant.rounding import PLAIN, round_and_clamp, straight_through
from qtool.system.errors import InputError

CHUNK_NUMBERS = 1 << 22  # number of weights compared at once


class QuantizedWeight(NamedTuple):
    """The result of every method for one linear; packing, saving, loading and exporting need nothing else."""

    codes: Tensor  # [out, in] uint8
    scale: Tensor  # [out, groups] float32, holding values of spec.scale_dtype
    zero_point: Tensor  # [out, groups] float32: integers 0 .. qmax; float_zero: values of scale_dtype; or minimum/scale
    spec: QuantSpec


def grouped(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return ``weight`` ``[out, in]`` as a view ``[out, groups, group_size]``."""
    out_features, in_features = weight.shape
    return weight.reshape(out_features, spec.num_groups(in_features), -1)


def _working(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for a float64 ``tensor``, float32 for any other."""
    return torch.promote_types(tensor.dtype, torch.float32)


def stored_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Round ``scale`` to values of ``spec.scale_dtype``, kept in float32; the gradient passes unchanged.

    Scales nearer to zero than the smallest positive number of the stored dtype become that number: a stored zero would
    lose the whole group. So do negative ones, unless ``spec`` allows these: they keep their sign.
    """
    size = scale.detach().abs() if spec.signed else scale.detach()
    if spec.blocks is not None and spec.blocks.integer_bits:
        size = block_scales.nearest(size, spec.blocks, 1)
    else:
        dtype = getattr(torch, spec.scale_dtype)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        size = size.to(dtype).to(_working(scale)).clamp(min=smallest)
    return straight_through(scale, torch.copysign(size, scale.detach()) if spec.signed else size)


def stored_zero_point(zero_point: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Round ``zero_point`` to what is stored beside ``scale``, kept in float32; the gradient passes unchanged.

    That is the nearest code or, with ``float_zero``, the nearest value of ``spec.scale_dtype``. GGUF's types store the
    minimum ``scale * zero_point`` instead.
    """
    if spec.blocks is not None and not spec.symmetric:
        rounded = block_scales.stored_minimum(zero_point.detach() * scale.detach(), spec.blocks) / scale.detach()
    elif spec.float_zero:
        rounded = zero_point.detach().to(getattr(torch, spec.scale_dtype)).to(_working(zero_point))
    else:
        rounded = zero_point.detach().round().clamp(spec.qmin, spec.qmax)
    return straight_through(zero_point, rounded)


def scale_and_zero_point(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the grid that covers ``low <= 0 <= high`` per group, each ``[out, groups]``.

    Asymmetric: ``scale = (high - low) / qmax``, ``zero_point = -low / scale``, to the nearest that can be stored.
    Symmetric: ``scale = max(-low, high) * 2 / qmax``, ``zero_point = 2**(num_bits - 1)``. If scales may be negative,
    ``scale = -end / 2**(num_bits - 1)`` for the larger end, which is then the lowest code exactly.
    An empty range (a group of zeros) is replaced by ``[-1, 1]``, so that the grid holds zero exactly.
    """
    empty = (low == 0) & (high == 0)
    low = torch.where(empty, -1.0, low.float())
    high = torch.where(empty, 1.0, high.float())
    if spec.symmetric:
        if spec.signed:
            scale = stored_scale(torch.where(-low >= high, -low, -high) / spec.middle, spec)
        else:
            scale = stored_scale(torch.maximum(-low, high) * (2 / spec.qmax), spec)
        return scale, torch.full_like(scale, spec.middle)
    scale = stored_scale(high / spec.qmax - low / spec.qmax, spec)  # divided first: no overflow
    return scale, stored_zero_point(-low / scale, scale, spec)


def settled(scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return ``scale`` and ``zero_point`` ``[out, groups]`` of ``spec.free`` as ``spec`` stores them.

    The scale is rounded first. Types of GGUF then keep the end of the range, ``scale * zero_point``.
    """
    stored = stored_scale(scale, spec)
    if spec.blocks is not None and not spec.symmetric:
        zero_point = zero_point * scale / stored
    return stored, stored_zero_point(zero_point, stored, spec)


def minmax_qparams(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return scale and zero point ``[out, groups]`` that cover the range of each group of ``weight`` ``[out, in]``.

    The range always includes zero.
    """
    groups = grouped(weight, spec)
    return scale_and_zero_point(groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0), spec)


def to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return ``weight`` ``[out, in]`` in grid units, before rounding: ``[out, groups, group_size]``."""
    return grouped(weight.to(scale.dtype), spec) / scale.unsqueeze(-1) + zero_point.unsqueeze(-1)


def round_to_codes(grid: Tensor, spec: QuantSpec, rounding: RoundingConfig = PLAIN) -> Tensor:
    """Return the nearest code of each value of ``grid``, half to even, as a float.

    ``rounding`` defines the gradient: by default it is one inside the grid and zero outside.
    """
    return round_and_clamp(grid, spec.qmin, spec.qmax, rounding)


def from_codes(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the weight ``[out, in]`` of float codes ``[out, groups, group_size]``; differentiable in the tensors."""
    if spec.blocks is not None and not spec.symmetric:
        minimum = block_scales.minimum(scale, zero_point)
        return (codes * scale.unsqueeze(-1) - minimum.unsqueeze(-1)).flatten(1)  # as engines compute it
    return ((codes - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return codes ``[out, in]`` uint8 of ``weight`` on the grid of ``scale`` and ``zero_point`` ``[out, groups]``."""
    return round_to_codes(to_grid(weight, scale, zero_point, spec), spec).to(torch.uint8).flatten(1)


def on_grid(weight: Tensor, grid: tuple[Tensor, Tensor], spec: QuantSpec) -> QuantizedWeight:
    """Return ``weight`` ``[out, in]`` rounded to nearest; ``grid`` is its scale and zero point ``[out, groups]``."""
    return QuantizedWeight(quantize(weight, *grid, spec), *grid, spec)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the weight ``[out, in]`` of ``codes``, float32 like ``scale``, with gradients to scale and zero point."""
    return from_codes(grouped(codes, spec).to(scale.dtype), scale, zero_point, spec)


def fake_quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return ``dequantize(quantize(weight))``, bit for bit, with gradients to the first three arguments."""
    return from_codes(round_to_codes(to_grid(weight, scale, zero_point, spec), spec), scale, zero_point, spec)


@torch.no_grad()
def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Return ``|Q(w) - w|**2 / |w|**2`` of ``weight`` ``[out, in]`` in any dtype, computed a few rows at a time.

    The result is zero if both norms are zero, and infinite if only that of the weight is.
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


def divisors(channels: int) -> list[int]:
    """Return the group sizes that divide ``channels``: the multiples of 16 among them, or all if there are none."""
    every = [size for size in range(2, channels + 1) if channels % size == 0]
    return [size for size in every if size % 16 == 0] or every


def check_weight(
    weight: Tensor, spec: QuantSpec, name: str, extremes: tuple[float, float] | None = None, *, overrides: bool = True
) -> None:
    """Refuse a ``weight`` ``[out, in]`` that a grid of ``spec`` cannot hold; ``name`` is for the message.

    ``extremes`` are its lowest and its highest value, where they are known; then the weight is not read. ``overrides``
    says that overrides of a recipe can give it a grid of its own.

    Raises:
        InputError: NaN or infinite values, a group size that does not divide, or a scale above its stored dtype.
    """
    in_features, other = weight.shape[1], ", or give this linear another one in quant.overrides" if overrides else ""
    if spec.blocks is not None and in_features % spec.blocks.block:
        raise InputError(
            f"{name} has {in_features} input channels, and blocks of {spec.grid} have {spec.blocks.block}; choose a "
            f"grid of smaller blocks, such as q5_1 or grid: affine with group_size: 32{other}"
        )
    if spec.group_size != -1 and in_features % spec.group_size:
        raise InputError(
            f"{name} has {in_features} input channels, and group_size {spec.group_size} does not divide that number; "
            f"choose one that does: {', '.join(map(str, divisors(in_features)))}, or -1 for one group per row{other}"
        )
    if extremes is None:
        low, high = (float(end) for end in weight.detach().aminmax())  # takes no memory, and NaN passes through
    else:
        low, high = extremes
    largest = low if math.isnan(low) else max(-low, high)
    if not largest < float("inf"):  # also true for NaN
        found = int((~torch.isfinite(weight)).sum())
        raise InputError(f"{name} holds {found} NaN or infinite value(s) of {weight.numel()}; repair the checkpoint")
    limit = torch.finfo(getattr(torch, spec.scale_dtype)).max
    if 2 * largest / spec.qmax > limit:
        raise InputError(
            f"{name} has weights up to {largest:.3g}: their scale is above the largest {spec.scale_dtype} number "
            f"({limit:.3g}); set quant.scale_dtype: float32"
            + (", for all linears or for this one in quant.overrides" if overrides else "")
        )
