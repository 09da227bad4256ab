"""The types of GGUF that hold codes, scales and zero points of a checkpoint exactly, and their bytes.

A type stores a row in blocks of 32 or 256 weights with a float16 number for each block. A weight on a grid of GGUF
(``quant.grid: q4_k`` and so on) is stored in the type of that name. An affine grid fits without another rounding if the
block's number is the group's scale ``scale``, and the block's integers are either ``code - zero_point``, or ``code``
and ``zero_point``:

    TQ2_0, Q4_0, Q5_0, Q8_0   d * (q - c) with a fixed c: q = code - zero_point + c, if it fits; TQ2_0 with d = -scale,
                              as it holds -1..2 and symmetric codes of 2 bits are -2..1
    Q2_K, Q4_K                d * 1 * q - dmin * m: d = dmin = scale, q = code, m = zero_point
    Q3_K                      d * (33 - 32) * (q - 4): symmetric codes of 3 bits

The types of the last two lines have blocks of 256 with sub-blocks, whose scales of 4 or 6 bits are all set to 1: so one
group must cover the block. Layouts are those of ggml's ``block_q4_0`` and so on (github.com/ggml-org/llama.cpp,
ggml-common.h). Q2_0, which would hold 2 bits in 2.25, is unknown to the ``gguf`` package, and for an affine grid Q4_1
would round the minimum to float16.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant import block_scales
from qtool.quant.affine import QuantizedWeight


class Grid(NamedTuple):
    """A weight divided into blocks of one type."""

    codes: Tensor  # [rows, blocks, length] int16
    scale: Tensor  # [rows, blocks] float32, the block's number for scales
    integers: Tensor  # [rows, blocks, groups] int16, factors of it; ones on an affine grid
    minimum: Tensor  # [rows, blocks] float32, the block's number for minima; on an affine grid, the scale
    minimum_integers: Tensor  # [rows, blocks, groups] int16; on an affine grid, the zero point of the block


class Block(NamedTuple):
    """A type of GGUF."""

    name: str
    length: int
    """Number of weights in a block."""
    num_bytes: int
    holds: Callable[[QuantSpec], bool]
    """Returns whether the type holds every code of a grid whose groups are a multiple of the block."""
    pack: Callable[[Grid], Tensor]
    """Returns the bytes of each block, uint8 ``[rows, blocks, num_bytes]``."""

    @property
    def bits(self) -> float:
        """Bits per weight, scales counted."""
        return 8 * self.num_bytes / self.length


def _float16(values: Tensor) -> Tensor:
    """Return the bytes, uint8 ``[..., 2]``, of ``values`` as float16."""
    return values.to(torch.float16).unsqueeze(-1).view(torch.uint8)


def _centred(grid: Grid, centre: int) -> Tensor:
    """Return ``code - zero_point + centre`` on an affine grid."""
    return torch.add(grid.codes - grid.minimum_integers[..., :1], centre)


def _nibbles(values: Tensor) -> Tensor:
    """Pack values of 4 bits ``[..., 32]`` to ``[..., 16]``: the first 16 in low halves, the rest in high ones."""
    low, high = values.to(torch.uint8).unflatten(-1, (2, 16)).unbind(-2)
    return torch.bitwise_or(low, high << 4)


def _quarters(values: Tensor) -> Tensor:
    """Pack values of 2 bits ``[..., 256]`` to ``[..., 64]``: byte m of a half has values m, m + 32, m + 64, m + 96."""
    parts = values.unflatten(-1, (2, 4, 32)).unbind(-2)
    return torch.stack([part << 2 * i for i, part in enumerate(parts)]).sum(0).flatten(-2).to(torch.uint8)


def _q4_0(grid: Grid) -> Tensor:
    return torch.cat([_float16(grid.scale), _nibbles(_centred(grid, 8))], -1)


def _fifth_bits(values: Tensor) -> Tensor:
    """Pack the fifth bit of each of 32 values, in order: uint8 ``[..., 4]``."""
    high = torch.bitwise_right_shift(values, 4).unflatten(-1, (4, 8))
    return torch.bitwise_left_shift(high, torch.arange(8)).sum(-1).to(torch.uint8)


def _q5_0(grid: Grid) -> Tensor:
    values = _centred(grid, 16)
    return torch.cat([_float16(grid.scale), _fifth_bits(values), _nibbles(values & 15)], -1)


def _q4_1(grid: Grid) -> Tensor:
    return torch.cat([_float16(grid.scale), _float16(-grid.minimum), _nibbles(grid.codes)], -1)


def _q5_1(grid: Grid) -> Tensor:
    ends = _float16(grid.scale), _float16(-grid.minimum)
    return torch.cat([*ends, _fifth_bits(grid.codes), _nibbles(grid.codes & 15)], -1)


def _q8_0(grid: Grid) -> Tensor:
    return torch.cat([_float16(grid.scale), _centred(grid, 0).to(torch.int8).view(torch.uint8)], -1)


def _tq2_0(grid: Grid) -> Tensor:
    return torch.cat([_quarters(2 - _centred(grid, 1)), _float16(-grid.scale)], -1)


def _q2_k(grid: Grid) -> Tensor:
    scales = (grid.integers | grid.minimum_integers << 4).to(torch.uint8)
    return torch.cat([scales, _quarters(grid.codes), _float16(grid.scale), _float16(grid.minimum)], -1)


def _bits_by_byte(values: Tensor) -> Tensor:
    """Pack bits ``[..., 256]`` to ``[..., 32]``: bit i of byte m is value 32 i + m."""
    placed = torch.bitwise_left_shift(values.unflatten(-1, (8, 32)), torch.arange(8).unsqueeze(-1))
    return placed.sum(-2).to(torch.uint8)


def _q3_k(grid: Grid) -> Tensor:
    integers = (grid.integers + 32).unflatten(-1, (4, 4))  # stored with the offset 32: 16 numbers of 6 bits
    low = (integers & 15).flatten(-2)
    upper = (integers >> 4 << 2 * torch.arange(4).unsqueeze(-1)).sum(-2)
    scales = torch.cat([low[..., :8] | low[..., 8:] << 4, upper], -1).to(torch.uint8)
    return torch.cat([_bits_by_byte(grid.codes >> 2), _quarters(grid.codes & 3), scales, _float16(grid.scale)], -1)


def _six_bits(grid: Grid) -> Tensor:
    """Pack eight scales and eight minima of 6 bits each: uint8 ``[..., 12]``."""
    scales, minima = grid.integers.unflatten(-1, (2, 4)), grid.minimum_integers.unflatten(-1, (2, 4))
    (first, last), (first_minimum, last_minimum) = scales.unbind(-2), minima.unbind(-2)
    parts = [first | last >> 4 << 6, first_minimum | last_minimum >> 4 << 6, last & 15 | (last_minimum & 15) << 4]
    return torch.cat(parts, -1).to(torch.uint8)


def _pairs(values: Tensor) -> Tensor:
    """Pack values of 4 bits ``[..., 256]`` to ``[..., 128]``: of each 64, the first 32 in low halves."""
    low, high = values.to(torch.uint8).unflatten(-1, (4, 2, 32)).unbind(-2)
    return torch.bitwise_or(low, high << 4).flatten(-2)


def _q4_k(grid: Grid) -> Tensor:
    return torch.cat([_float16(grid.scale), _float16(grid.minimum), _six_bits(grid), _pairs(grid.codes)], -1)


def _q5_k(grid: Grid) -> Tensor:
    codes = _bits_by_byte(grid.codes >> 4), _pairs(grid.codes & 15)
    return torch.cat([_float16(grid.scale), _float16(grid.minimum), _six_bits(grid), *codes], -1)


def _q6_k(grid: Grid) -> Tensor:
    quarters = grid.codes.unflatten(-1, (2, 4, 32))  # of each half of a block
    low = (quarters[..., :2, :] & 15 | (quarters[..., 2:, :] & 15) << 4).flatten(-3)
    upper = (quarters >> 4 << 2 * torch.arange(4).unsqueeze(-1)).sum(-2).flatten(-2)
    scales = grid.integers.to(torch.int8).view(torch.uint8)
    return torch.cat([low.to(torch.uint8), upper.to(torch.uint8), scales, _float16(grid.scale)], -1)


def _is(bits: int, symmetric: bool) -> Callable[[QuantSpec], bool]:
    return lambda spec: spec.blocks is None and (spec.num_bits, spec.symmetric) == (bits, symmetric)


def _on(grid: str) -> Callable[[QuantSpec], bool]:
    return lambda spec: spec.grid == grid


def _either(one: Callable[[QuantSpec], bool], other: Callable[[QuantSpec], bool]) -> Callable[[QuantSpec], bool]:
    return lambda spec: one(spec) or other(spec)


def _few_bits(spec: QuantSpec) -> bool:
    return spec.blocks is None and spec.num_bits <= (4 if spec.symmetric else 3)


BLOCKS = (  # all types that qtool writes, from the smallest up
    Block("TQ2_0", 256, 66, _is(2, True), _tq2_0),
    Block("Q2_K", 256, 84, _either(_is(2, False), _on("q2_k")), _q2_k),
    Block("Q3_K", 256, 110, _either(_is(3, True), _on("q3_k")), _q3_k),
    Block("Q4_0", 32, 18, _few_bits, _q4_0),
    Block("Q4_K", 256, 144, _either(_is(4, False), _on("q4_k")), _q4_k),
    Block("Q4_1", 32, 20, _on("q4_1"), _q4_1),
    Block("Q5_0", 32, 22, _is(4, False), _q5_0),
    Block("Q5_K", 256, 176, _on("q5_k"), _q5_k),
    Block("Q5_1", 32, 24, _on("q5_1"), _q5_1),
    Block("Q6_K", 256, 210, _on("q6_k"), _q6_k),
    Block("Q8_0", 32, 34, _is(8, True), _q8_0),
)
GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 8}  # number of groups in a block, of the types that also hold affine grids


def choose(spec: QuantSpec, columns: int) -> Block | None:
    """Return the smallest type that holds rows of ``columns`` on the grid ``spec`` exactly; ``None`` if none does."""
    together = spec.columns_together(columns)
    return next((block for block in BLOCKS if together % block.length == 0 and block.holds(spec)), None)


def pack(quantized: QuantizedWeight, block: Block) -> Tensor:
    """Return the rows of a weight in the type ``block``, which holds them: uint8 ``[out, in / length * num_bytes]``."""
    codes = quantized.codes.to(torch.int16).unflatten(1, (-1, block.length))
    parts = _affine_parts if quantized.spec.blocks is None else _block_parts
    return block.pack(Grid(codes, *parts(quantized, block))).flatten(1)


def _affine_parts(quantized: QuantizedWeight, block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scale, zero_point, _ = quantized
    repeat = codes.shape[1] // block.length // scale.shape[1]
    scale, zero_point = (side.repeat_interleave(repeat, 1) for side in (scale, zero_point))
    zeros = zero_point.to(torch.int16).unsqueeze(-1).expand(-1, -1, GROUPS.get(block.name, 1))
    return scale, torch.ones_like(zeros), scale, zeros


def _block_parts(quantized: QuantizedWeight, block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, scale, zero_point, spec = quantized
    assert spec.blocks is not None
    minimum = torch.zeros_like(scale) if spec.symmetric else block_scales.minimum(scale, zero_point)
    if not spec.blocks.integer_bits:
        ones = torch.ones_like(scale, dtype=torch.int16).unsqueeze(-1)
        return scale, ones, minimum, ones
    (number, integers), (lowest, multiples) = (
        block_scales.split(values, spec.blocks, least) for values, least in ((scale, 1), (minimum, 0))
    )
    by_block = (each.to(torch.int16).unflatten(1, (-1, spec.blocks.groups)) for each in (integers, multiples))
    return number, next(by_block), lowest, next(by_block)
