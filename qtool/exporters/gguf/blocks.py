"""Which GGUF types hold our codes exactly, and their bytes.

A type stores a row in blocks of 32 or 256 weights with float16 scales of its own. Our codes fit one without another
rounding when the scale of a block is our scale, and its integers are our codes less our zero point, or both of them:

    TQ2_0, Q4_0, Q5_0, Q8_0   d * (q - c) with a fixed c: q = code - zero_point + c, if it fits; TQ2_0 with d = -scale,
                              as it holds -1..2 and symmetric codes of 2 bits are -2..1
    Q2_K, Q4_K                d * 1 * q - dmin * m: d = dmin = scale, q = code, m = zero_point
    Q3_K                      d * (33 - 32) * (q - 4): symmetric codes of 3 bits

The 256 of the last two lines have sub-blocks with scales of 4 or 6 bits, all one here: so one of our groups must cover
the block. Layouts are those of ggml's ``block_q4_0`` and so on (github.com/ggml-org/llama.cpp, ggml-common.h).
Q2_0, which would hold 2 bits in 2.25, is unknown to the ``gguf`` package, and Q4_1 rounds the minimum to float16.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant.affine import QuantizedWeight


class Grid(NamedTuple):
    """A weight cut into blocks of one type: ``codes`` int16 ``[rows, blocks, length]``, the others float32 and int16
    ``[rows, blocks]``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


class Block(NamedTuple):
    """A type of GGUF."""

    name: str
    length: int
    """Weights in a block."""
    num_bytes: int
    holds: Callable[[QuantSpec], bool]
    """Whether it holds every code of a grid, where a group of the grid is a multiple of a block."""
    pack: Callable[[Grid], Tensor]
    """The bytes of each block, uint8 ``[rows, blocks, num_bytes]``."""

    @property
    def bits(self) -> float:
        """Bits per weight, scales counted."""
        return 8 * self.num_bytes / self.length


def _float16(values: Tensor) -> Tensor:
    """Bytes uint8 ``[..., 2]`` of ``values`` as float16."""
    return values.to(torch.float16).unsqueeze(-1).view(torch.uint8)


def _centred(grid: Grid, centre: int) -> Tensor:
    """``code - zero_point + centre``."""
    return torch.add(grid.codes - grid.zero_point.unsqueeze(-1), centre)


def _nibbles(values: Tensor) -> Tensor:
    """Values of 4 bits ``[..., 32]`` as ``[..., 16]``: the first 16 in the low halves, the others in the high ones."""
    low, high = values.to(torch.uint8).unflatten(-1, (2, 16)).unbind(-2)
    return torch.bitwise_or(low, high << 4)


def _quarters(values: Tensor) -> Tensor:
    """Values of 2 bits ``[..., 256]`` as ``[..., 64]``: byte m of a half holds its values m, m + 32, m + 64, m + 96."""
    parts = values.unflatten(-1, (2, 4, 32)).unbind(-2)
    return torch.stack([part << 2 * i for i, part in enumerate(parts)]).sum(0).flatten(-2).to(torch.uint8)


def _q4_0(grid: Grid) -> Tensor:
    return torch.cat([_float16(grid.scale), _nibbles(_centred(grid, 8))], -1)


def _q5_0(grid: Grid) -> Tensor:
    values = _centred(grid, 16)
    high = (values >> 4).unflatten(-1, (4, 8))  # one bit of each, in order
    bits = (high << torch.arange(8)).sum(-1).to(torch.uint8)
    return torch.cat([_float16(grid.scale), bits, _nibbles(values & 15)], -1)


def _q8_0(grid: Grid) -> Tensor:
    return torch.cat([_float16(grid.scale), _centred(grid, 0).to(torch.int8).view(torch.uint8)], -1)


def _tq2_0(grid: Grid) -> Tensor:
    return torch.cat([_quarters(2 - _centred(grid, 1)), _float16(-grid.scale)], -1)


def _q2_k(grid: Grid) -> Tensor:
    scales = (1 | grid.zero_point << 4).to(torch.uint8).unsqueeze(-1).expand(*grid.scale.shape, 16)
    return torch.cat([scales, _quarters(grid.codes), _float16(grid.scale), _float16(grid.scale)], -1)


def _q3_k(grid: Grid) -> Tensor:
    high = (grid.codes >> 2).unflatten(-1, (8, 32))
    bits = (high << torch.arange(8).unsqueeze(-1)).sum(-2).to(torch.uint8)  # bit i of byte m: value 32 i + m
    # sixteen times 33, which stands for 1: low halves first, then the upper two bits of each
    scales = torch.tensor([0x11] * 8 + [0xAA] * 4, dtype=torch.uint8).expand(*grid.scale.shape, 12)
    return torch.cat([bits, _quarters(grid.codes & 3), scales, _float16(grid.scale)], -1)


def _q4_k(grid: Grid) -> Tensor:
    zeros = grid.zero_point.to(torch.uint8).unsqueeze(-1).expand(*grid.scale.shape, 4)
    ones = torch.ones_like(zeros)  # eight scales of 1 and eight minima, of which the last four share bytes
    values = grid.codes.unflatten(-1, (4, 2, 32))
    packed = (values[..., 0, :] | values[..., 1, :] << 4).flatten(-2).to(torch.uint8)
    scale = _float16(grid.scale)
    return torch.cat([scale, scale, ones, zeros, ones | zeros << 4, packed], -1)


def _is(bits: int, symmetric: bool) -> Callable[[QuantSpec], bool]:
    return lambda spec: (spec.num_bits, spec.symmetric) == (bits, symmetric)


BLOCKS = (  # the smallest first
    Block("TQ2_0", 256, 66, _is(2, True), _tq2_0),
    Block("Q2_K", 256, 84, _is(2, False), _q2_k),
    Block("Q3_K", 256, 110, _is(3, True), _q3_k),
    Block("Q4_0", 32, 18, lambda spec: spec.num_bits <= (4 if spec.symmetric else 3), _q4_0),
    Block("Q4_K", 256, 144, _is(4, False), _q4_k),
    Block("Q5_0", 32, 22, _is(4, False), _q5_0),
    Block("Q8_0", 32, 34, _is(8, True), _q8_0),
)


def choose(spec: QuantSpec, columns: int) -> Block | None:
    """The smallest type that holds rows of ``columns`` on the grid ``spec`` exactly; ``None`` when none does."""
    group = columns // spec.num_groups(columns)
    return next((block for block in BLOCKS if group % block.length == 0 and block.holds(spec)), None)


def pack(quantized: QuantizedWeight, block: Block) -> Tensor:
    """The rows of a weight in a type that holds them, uint8 ``[out, in / length * num_bytes]``."""
    codes, scale, zero_point, _ = quantized
    repeat = codes.shape[1] // block.length // scale.shape[1]
    grid = Grid(
        codes.to(torch.int16).unflatten(1, (-1, block.length)),
        scale.repeat_interleave(repeat, 1),
        zero_point.to(torch.int16).repeat_interleave(repeat, 1),
    )
    return block.pack(grid).flatten(1)
