"""Scales and minima as the types of GGUF store them: by blocks, as multiples of float16 numbers.

The scale of a group is ``d * k`` with a float16 number ``d`` of the block and an integer ``k`` of the group; a minimum
is stored in the same way (``config/grids.py`` lists the types). Both products are exact in float32: 11 significant bits
times at most 8. A method works with a scale and a zero point in codes, as on any grid. The zero point is ``minimum /
scale``, and ``minimum`` gives back the stored number, bit for bit: it has at most 19 significant bits, and the product
of the rounded quotient and the scale differs from it by less than 2**-22 of itself.

A number that is stored already is stored again without a change: each number ``d`` is at most the largest value over
the largest integer that is tried, so that the integer of the largest value is among those tried the next time.
"""

import torch
from torch import Tensor

from qtool.config.grids import BlockGrid
from qtool.quant.rounding import straight_through

SMALLEST, LARGEST = 2.0**-24, 65504.0  # positive float16 numbers
KEPT_BITS = 20  # significant bits of a minimum that are kept; a stored one has fewer


def _float16_below(values: Tensor) -> Tensor:
    """Return the largest float16 numbers that are at most ``values``, which are positive, and at least ``SMALLEST``."""
    near = values.clamp(SMALLEST, LARGEST).to(torch.float16)
    below = (near.view(torch.int16) - 1).view(torch.float16)  # the next number towards 0
    return torch.where(near.to(values.dtype) > values, below, near).to(values.dtype).clamp(min=SMALLEST)


def split(values: Tensor, grid: BlockGrid, least: int) -> tuple[Tensor, Tensor]:
    """Return the numbers ``d >= 0`` ``[..., blocks]`` and the integers ``k`` ``[..., groups]`` for ``values``.

    ``values`` is ``[..., groups]``, and both results have its dtype. An integer has the sign of its value, and its size
    is at least ``least``. Of several ``d`` for each block, the one with the smallest squared error is taken.
    """
    signed = values
    values = values.abs().unflatten(-1, (-1, grid.groups))
    largest = values.amax(-1, keepdim=True)
    found = torch.full_like(largest, torch.inf)
    number, integers = torch.full_like(largest, SMALLEST), torch.zeros_like(values)
    for top in range(grid.largest, grid.largest - grid.largest // 8 - 1, -1):
        tried = _float16_below(largest / top)
        counts = (values / tried).round_().clamp_(least, grid.largest)
        error = (counts * tried - values).square_().sum(-1, keepdim=True)
        better = error < found
        found, number = torch.where(better, error, found), torch.where(better, tried, number)
        integers = torch.where(better, counts, integers)
    return number.squeeze(-1), torch.copysign(integers.flatten(-2), signed)


def joined(number: Tensor, integers: Tensor, grid: BlockGrid) -> Tensor:
    """Return the products ``d k`` ``[..., groups]``."""
    return number.repeat_interleave(grid.groups, -1) * integers


def nearest(values: Tensor, grid: BlockGrid, least: int) -> Tensor:
    """Return ``values`` ``[..., groups]`` as they are stored, in their dtype; those below 0 become the smallest."""
    values = values.clamp(min=0)
    return joined(*split(values, grid, least), grid)


def stored_minimum(values: Tensor, grid: BlockGrid) -> Tensor:
    """Return minima ``[..., groups]`` as they are stored; those below 0 become 0."""
    values = _shortened(values).clamp(min=0)
    return nearest(values, grid, 0) if grid.integer_bits else values.clamp(max=LARGEST).to(torch.float16).to(values)


def minimum(scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the stored minimum of a group; the gradient is that of ``scale * zero_point``."""
    product = scale * zero_point
    return straight_through(product, _shortened(product.detach()))


def _shortened(values: Tensor) -> Tensor:
    """Round to ``KEPT_BITS`` significant bits."""
    dropped = 24 - KEPT_BITS
    bits = values.to(torch.float32).view(torch.int32)
    return (bits + (1 << dropped - 1) & -(1 << dropped)).view(torch.float32).to(values.dtype)
