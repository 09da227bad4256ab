"""The types of GGUF that hold codes, scales and zero points of a checkpoint exactly, and their bytes.

A type stores a row in blocks of 32 or 256 weights with a float16 scale for each block. A group fits without another
rounding if the block's scale is the group's scale ``scale``, and the block's integers are either ``code - zero_point``,
or ``code`` and ``zero_point``:

    TQ2_0, Q4_0, Q5_0, Q8_0   d * (q - c) with a fixed c: q = code - zero_point + c, if it fits; TQ2_0 with d = -scale,
                              as it holds -1..2 and symmetric codes of 2 bits are -2..1
    Q2_K, Q4_K                d * 1 * q - dmin * m: d = dmin = scale, q = code, m = zero_point
    Q3_K                      d * (33 - 32) * (q - 4): symmetric codes of 3 bits

The types of the last two lines have blocks of 256 with sub-blocks, whose scales of 4 or 6 bits are all set to 1: so one
group must cover the block. Layouts are those of ggml's ``block_q4_0`` and so on (github.com/ggml-org/llama.cpp,
ggml-common.h). Q2_0, which would hold 2 bits in 2.25, is unknown to the ``gguf`` package, and Q4_1 rounds the minimum
to float16.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant.affine import QuantizedWeight


class Grid(NamedTuple):
    """A weight cut into blocks of one type."""

    codes: Tensor  # [rows, blocks, length] int16
    scale: Tensor  # [rows, blocks] float32
    zero_point: Tensor  # [rows, blocks] int16


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
    """Return ``code - zero_point + centre``."""
    return torch.add(grid.codes - grid.zero_point.unsqueeze(-1), centre)


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


def _q5_0(grid: Grid) -> Tensor:
    values = _centred(grid, 16)
    high = (values >> 4).unflatten(-1, (4, 8))  # the fifth bit of each value, in order
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
    # all 16 sub-block scales are 1, stored with offset 32 as 33: low 4 bits first, then the upper 2
    scales = torch.tensor([0x11] * 8 + [0xAA] * 4, dtype=torch.uint8).expand(*grid.scale.shape, 12)
    return torch.cat([bits, _quarters(grid.codes & 3), scales, _float16(grid.scale)], -1)


def _q4_k(grid: Grid) -> Tensor:
    zeros = grid.zero_point.to(torch.uint8).unsqueeze(-1).expand(*grid.scale.shape, 4)
    ones = torch.ones_like(zeros)  # eight scales of 1 and eight minima; the last four of both share bytes
    values = grid.codes.unflatten(-1, (4, 2, 32))
    packed = (values[..., 0, :] | values[..., 1, :] << 4).flatten(-2).to(torch.uint8)
    scale = _float16(grid.scale)
    return torch.cat([scale, scale, ones, zeros, ones | zeros << 4, packed], -1)


def _is(bits: int, symmetric: bool) -> Callable[[QuantSpec], bool]:
    return lambda spec: (spec.num_bits, spec.symmetric) == (bits, symmetric)


BLOCKS = (  # all types that qtool writes, from the smallest up
    Block("TQ2_0", 256, 66, _is(2, True), _tq2_0),
    Block("Q2_K", 256, 84, _is(2, False), _q2_k),
    Block("Q3_K", 256, 110, _is(3, True), _q3_k),
    Block("Q4_0", 32, 18, lambda spec: spec.num_bits <= (4 if spec.symmetric else 3), _q4_0),
    Block("Q4_K", 256, 144, _is(4, False), _q4_k),
    Block("Q5_0", 32, 22, _is(4, False), _q5_0),
    Block("Q8_0", 32, 34, _is(8, True), _q8_0),
)


def choose(spec: QuantSpec, columns: int) -> Block | None:
    """Return the smallest type that holds rows of ``columns`` on the grid ``spec`` exactly; ``None`` if none does."""
    group = columns // spec.num_groups(columns)
    return next((block for block in BLOCKS if group % block.length == 0 and block.holds(spec)), None)


def pack(quantized: QuantizedWeight, block: Block) -> Tensor:
    """Return the rows of a weight in the type ``block``, which holds them: uint8 ``[out, in / length * num_bytes]``."""
    codes, scale, zero_point, _ = quantized
    repeat = codes.shape[1] // block.length // scale.shape[1]
    grid = Grid(
        codes.to(torch.int16).unflatten(1, (-1, block.length)),
        scale.repeat_interleave(repeat, 1),
        zero_point.to(torch.int16).repeat_interleave(repeat, 1),
    )
    return block.pack(grid).flatten(1)
