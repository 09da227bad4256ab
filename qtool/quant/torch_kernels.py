"""torch's own integer products, and the expanded weight: what they hold, and how near they are to the exact product.

``int8`` is torch's int8 matmul, for 8 bits with one scale for each row. All other integer products use torch's int4
matmul. Both compute in bfloat16 with float32 sums. The weight of the int4 matmul is

    w = (k - 8) * s + m        k in 0 .. 15; s and m bfloat16, for each row and group of 32, 64, 128 or 256 channels.

* 4 bits: ``k`` is the code and ``m = (8 - zero_point) * s``, which is 0 on a symmetric grid.
* 2 and 3 bits: ``code - zero_point`` lies in ``-7 .. 7``, so ``k = code - zero_point + 8`` and ``m = 0``; for a zero
  point between two codes, ``k`` is computed with the nearer one, and ``m`` makes up for the difference.
* 8 bits: each row becomes two, whose products are added: ``k`` is the upper half of a code with scale ``16 s``, and its
  lower half with scale ``s``.

So codes are exact; scales that are not stored in bfloat16 are rounded to bfloat16, and so is ``m`` if it is not 0. Each
output is within ``TOLERANCE * sum_j |x_j s| (|code - zero_point| + |middle - zero_point| + 2**(num_bits - 4))`` of the
exact one: eight roundings of half a bfloat16 step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight

TOLERANCE = 2.0**-6  # largest error of an output, in the unit that the formula above defines
GROUPS = (256, 128, 64, 32)  # group sizes of torch's int4 matmul
CHUNK_NUMBERS = 1 << 24  # number of weights that are expanded to float32 at once


def tolerance(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return the largest allowed error of each output ``[rows, out]``, for ``x [rows, in]``."""
    codes, scale, zero_point, spec = weight
    offset = (spec.middle - zero_point).abs() + 2.0 ** (spec.num_bits - 4)
    steps = (affine.grouped(codes, spec).float() - zero_point.unsqueeze(-1)).abs() + offset.unsqueeze(-1)
    return TOLERANCE * x.abs().float() @ (steps * scale.abs().unsqueeze(-1)).flatten(1).T


# torch's int4 matmul -------------------------------------------------------------------------------------------------


def _group(spec: QuantSpec, in_features: int) -> int | None:
    """Return the largest group of the int4 matmul that divides every group of ``spec``; ``None`` if there is none."""
    size = in_features if spec.group_size == -1 else spec.group_size
    return next((group for group in GROUPS if size % group == 0), None)


def int4_refuses(bits: tuple[int, ...], rows: int, channels: int, spec: QuantSpec, out: int, in_: int) -> str | None:
    """Return the reason why the int4 matmul of ``bits`` cannot hold a weight ``[out, in]``, or ``None``."""
    if spec.num_bits not in bits:
        return f"no kernel for {spec.num_bits} bits"
    if _group(spec, in_) is None:
        size = in_ if spec.group_size == -1 else spec.group_size
        return f"groups of {size} channels are not a multiple of 32"
    if out % rows or in_ % channels:
        return f"a weight of {out} x {in_} is not a multiple of {rows} x {channels}"
    return None


def _int4_grid(weight: QuantizedWeight) -> tuple[Tensor, Tensor, int]:
    """Return codes ``k`` ``[out, in]`` uint8, the pairs ``s, m`` ``[groups, out, 2]`` bfloat16, and the group size."""
    codes, scale, zero_point, spec = weight
    group = _group(spec, codes.shape[1])
    assert group is not None
    s = scale.bfloat16().float()
    if spec.num_bits < 4:
        nearest = zero_point.round().clamp(spec.qmin, spec.qmax)
        codes = (affine.grouped(codes, spec) + (8 - nearest).to(torch.uint8).unsqueeze(-1)).flatten(1)
        m = (nearest - zero_point) * s
    elif spec.num_bits == 4:
        m = (8 - zero_point) * s
    else:
        codes = torch.cat([codes >> 4, codes & 15])
        upper, lower = (spec.middle - zero_point).div(16, rounding_mode="floor"), (-zero_point).remainder(16)
        s, m = torch.cat([16 * s, s]), torch.cat([16 * upper * s, (8 + lower) * s])
    repeats = codes.shape[1] // group // s.shape[1]
    grid = torch.stack([s, m], -1).repeat_interleave(repeats, 1).transpose(0, 1)
    return codes, grid.contiguous().bfloat16(), group


def prepare_int4_cpu(weight: QuantizedWeight) -> tuple[Any, ...]:
    """Return the packed codes, the group size and the grid of the int4 matmul on a processor."""
    codes, grid, group = _int4_grid(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)  # 1: tiles matter on a GPU only
    return packed, group, grid


def prepare_int4_cuda(weight: QuantizedWeight) -> tuple[Any, ...]:
    """Return the packed codes, the group size and the grid of the int4 matmul on a GPU."""
    codes, grid, group = _int4_grid(weight)
    tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), tiles)
    return packed, group, grid


def int4_cpu(x: Tensor, packed: Tensor, group: int, grid: Tensor) -> Tensor:
    """Map ``x [rows, in]`` bfloat16 to ``[rows, out]`` on a processor."""
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, grid)
    return y


def int4_cuda(x: Tensor, packed: Tensor, group: int, grid: Tensor) -> Tensor:
    """Map ``x [rows, in]`` bfloat16 to ``[rows, out]`` on a GPU."""
    y: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, group, grid)
    return y


def halves(product: Callable[..., Tensor], x: Tensor, *state: Any) -> Tensor:
    """Map ``x`` by the upper and the lower halves of codes, and add."""
    upper, lower = product(x, *state).chunk(2, dim=-1)
    return upper + lower


def op_missing(op: str) -> str | None:
    """Return that torch lacks the operation, or ``None``."""
    return None if hasattr(torch.ops.aten, op) else f"torch {torch.__version__} has no {op}"


def int4_cuda_missing() -> str | None:
    """Return the reason why this GPU cannot run the int4 matmul, or ``None``."""
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    return op_missing("_weight_int4pack_mm")


# torch's int8 matmul, one scale for each row -------------------------------------------------------------------------


def int8_refuses(spec: QuantSpec, out: int, in_: int) -> str | None:
    """Return the reason why the int8 matmul cannot hold a weight ``[out, in]`` on this grid, or ``None``."""
    if spec.num_bits != 8:
        return f"no kernel for {spec.num_bits} bits"
    return None if spec.num_groups(in_) == 1 else "no kernel for groups, only one scale per row"


def prepare_int8_cpu(weight: QuantizedWeight) -> tuple[Any, ...]:
    """Return the signed codes, the scales, and the offsets of an asymmetric grid."""
    codes, scale, zero_point, spec = weight
    signed = (codes ^ 128).view(torch.int8)  # code - 128
    offset = None if spec.symmetric else ((spec.middle - zero_point) * scale).flatten()
    return signed, scale.flatten().bfloat16(), offset


def int8_cpu(x: Tensor, signed: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Map ``x [rows, in]`` bfloat16 to ``[rows, out]``."""
    y: Tensor = torch.ops.aten._weight_int8pack_mm(x, signed, scale)
    return y if offset is None else torch.addcmul(y.float(), x.float().sum(-1, keepdim=True), offset)


# the expanded weight -------------------------------------------------------------------------------------------------


def expand(dtype: torch.dtype, weight: QuantizedWeight) -> tuple[Any, ...]:
    """Return the weight ``[out, in]`` in ``dtype``, computed in float32, some rows at a time."""
    expanded = torch.empty(weight.codes.shape, dtype=dtype, device=weight.codes.device)
    rows = max(1, CHUNK_NUMBERS // expanded.shape[1])
    parts = (tensor.split(rows) for tensor in (expanded, *weight[:3]))
    for part, codes, scale, zero_point in zip(*parts, strict=True):
        part.copy_(affine.dequantize(codes, scale, zero_point, weight.spec))
    return (expanded,)


def always(*_: Any) -> None:
    """Return that nothing is missing, and that no grid is refused."""
