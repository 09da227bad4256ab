"""Expanding the weights of published FP8 and MXFP4 models to bfloat16.

FP8: a weight is ``code * scale``. The codes are 8-bit floats (E4M3: 4 significant bits, E5M2: 3), one scale belongs to
a tensor, a row, or a block of rows and columns, and the last block of a row or column may be cut off. MXFP4 (OCP
Microscaling Formats 1.0): two codes a byte, E2M1, the first in the lower half; 32 of them share a scale, a power of two
that is stored as its exponent plus 127. The products are computed in float32 and rounded once to bfloat16. With a scale
that is a power of two they are exact; with a float32 scale they are not exact in float32 either, and what bfloat16
rounds off (at most 2**-9 of a value) is far below the step of the codes (2**-4).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.system.errors import InputError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # values of the codes 0 to 7; 8 to 15 are their negatives
NUMBERS_AT_ONCE = 1 << 22  # number of weights that are expanded together
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def expand_scaled(codes: Tensor, scale: Tensor, block: tuple[int, int] | None, name: str) -> Tensor:
    """Return the weight bfloat16 ``[..., rows, columns]`` of FP8 ``codes`` with the ``scale`` that multiplies them.

    Codes of dtype int8 or uint8 are pairs of E2M1 codes: ``[..., rows, columns / 2]``. ``block`` has the rows and
    columns that share a scale; ``None``, or where the scales do not fit it: the shape of ``scale`` says it. Scales of
    dtype uint8 are exponents plus 127. ``name`` is for messages.

    Raises:
        InputError: the shape of ``scale`` fits no way of sharing scales.
    """
    pairs = codes.dtype in (torch.int8, torch.uint8)
    scale = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
    shape = (*codes.shape[:-1], codes.shape[-1] * (2 if pairs else 1))
    rows, columns = shape[-2:] if len(shape) > 1 else (1, *shape)
    grid, size = scale_grid(shape, scale.shape, block, name)
    scales = scale.float().reshape(-1, *grid)
    weight = torch.empty(math.prod(shape[:-2]), rows, columns, dtype=torch.bfloat16)
    matrices = codes.reshape(len(weight), rows, -1)
    step = max(1, NUMBERS_AT_ONCE // max(1, columns))
    for index, matrix in enumerate(matrices):
        by_row = scales[index % len(scales)].repeat_interleave(size[0], 0)[:rows]
        for start in range(0, rows, step):
            part = slice(start, start + step)
            values = _unpacked(matrix[part]) if pairs else matrix[part].float()
            weight[index, part] = values * by_row[part].repeat_interleave(size[1], 1)[:, :columns]
    return weight.reshape(shape)


def scale_grid(
    shape: Sequence[int], scale: Sequence[int], block: tuple[int, int] | None, name: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rows and columns of scales of each matrix of a weight, and the rows and columns that share one.

    ``shape`` is that of the weight ``[..., rows, columns]``, ``scale`` that of its scales.

    Raises:
        InputError: the shapes fit no way of sharing scales.
    """
    rows, columns = shape[-2:] if len(shape) > 1 else (1, *shape)
    count, number = math.prod(shape[:-2]), math.prod(scale)
    if number in (1, count):  # of the tensor; of each matrix
        return (1, 1), (rows, columns)
    if number == count * rows and (len(scale) == 1 or scale[-1] == 1):
        return (rows, 1), (1, columns)
    if len(scale) >= 2 and math.prod(scale[:-2]) == count and number:
        high, wide = scale[-2:]
        if block is not None and (high, wide) == (-(-rows // block[0]), -(-columns // block[1])):
            return (high, wide), block
        if rows % high == columns % wide == 0:
            return (high, wide), (rows // high, columns // wide)
    shared = "" if block is None else f" for blocks of {block[0]} x {block[1]}"
    raise InputError(
        f"{name} is {rows} x {columns} in FP8, and its scales have the shape {list(scale)}, which does not fit"
        f"{shared}; copy or download the model again"
    )


def _unpacked(pairs: Tensor) -> Tensor:
    """Return the values float32 ``[rows, 2 columns]`` of pairs of E2M1 codes ``[rows, columns]``."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = pairs.view(torch.uint8)
    return values[torch.stack([codes & 15, codes >> 4], -1).long()].flatten(1)


def expand_mxfp4(blocks: Tensor, scales: Tensor, name: str) -> Tensor:
    """Return the weight bfloat16 ``[..., rows, 32 groups]`` of ``blocks`` uint8 ``[..., rows, groups, 16]``.

    ``scales`` uint8 ``[..., rows, groups]`` are exponents plus 127. ``name`` is for messages.

    Raises:
        InputError: the tensors have other shapes or dtypes.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape != (*scales.shape, 16):
        raise InputError(
            f"{name}_blocks is {blocks.dtype} {list(blocks.shape)} and {name}_scales {scales.dtype} "
            f"{list(scales.shape)}; MXFP4 needs uint8 [..., rows, groups, 16] and [..., rows, groups]"
        )
    return expand_scaled(blocks.flatten(-2), scales, (1, 32), name)
