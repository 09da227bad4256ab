"""The tensors of ``MatMulNBits`` and ``GatherBlockQuantized``, the operators of ONNX Runtime that unpack weights.

A weight ``[N, K]`` is cut into blocks of ``B`` inputs, a power of two from 16. ``qweight`` uint8
``[N, K / B, B b / 8]`` holds codes of ``b`` bits, the first in the lowest bits; ``scales`` is float32 ``[N, K / B]``,
and ``qzeros`` uint8 ``[N, ceil(K / B b / 8)]``. A product with a symmetric grid does without ``qzeros``: its zero point
is the middle code.
"""

import numpy as np
import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packing import pack

SMALLEST, LARGEST = 16, 256  # inputs of a block
MATMUL = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of a code in MatMulNBits, by the bits of the grid
GATHER = {2: 4, 3: 4, 4: 4, 8: 8}  # and in GatherBlockQuantized


def block_size(spec: QuantSpec, columns: int) -> int | None:
    """Return the largest block that divides a group of ``spec`` in rows of ``columns``; ``None``: none does."""
    group = columns // spec.num_groups(columns)
    size = min(group & -group, LARGEST)
    return size if size >= SMALLEST else None


def packed(quantized: QuantizedWeight, bits: int, *, zeros: bool) -> dict[str, Tensor]:
    """Return ``qweight``, ``scales`` and ``qzeros`` of a weight in codes of ``bits``, at least those of its grid.

    Codes of a symmetric grid are shifted so that the zero point is the middle code of ``bits``; without ``zeros`` such
    a grid has no ``qzeros``.
    """
    codes, scale, zero_point, spec = quantized
    block = block_size(spec, codes.shape[1])
    assert block is not None
    shift = (1 << (bits - 1)) - spec.middle if spec.symmetric else 0
    repeat = codes.shape[1] // block // scale.shape[1]
    stored = (zero_point.to(torch.int32) + shift).repeat_interleave(repeat, 1)
    parts = {
        "qweight": _bytes(codes.to(torch.int32) + shift, bits).unflatten(1, (-1, block * bits // 8)),
        "scales": scale.float().repeat_interleave(repeat, 1),
    }
    return parts if spec.symmetric and not zeros else parts | {"qzeros": _bytes(stored, bits)}


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """Return ``codes`` ``[rows, n]`` as bytes ``[rows, ceil(n bits / 8)]``."""
    return pack(codes, bits).view(torch.uint8)[:, : -(-codes.shape[1] * bits // 8)].contiguous()


def unpacked(qweight: np.ndarray, scales: np.ndarray, qzeros: np.ndarray | None, bits: int) -> Tensor:
    """Return the weight float32 ``[N, K]`` of the tensors that ``packed`` makes, with no code of the packer."""
    rows, blocks = scales.shape
    codes = torch.from_numpy(_digits(qweight.reshape(rows, -1), bits)).float()
    if qzeros is None:
        zeros = torch.full((rows, blocks), float(2 ** (bits - 1)))
    else:
        zeros = torch.from_numpy(_digits(qzeros.reshape(rows, -1), bits)[:, :blocks].copy()).float()
    steps = codes.unflatten(1, (blocks, -1)) - zeros.unsqueeze(-1)
    weight: Tensor = (steps * torch.from_numpy(scales.copy()).unsqueeze(-1)).flatten(1)
    return weight


def _digits(stream: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes in the bytes ``stream`` ``[rows, n]``: the digits of each byte in base ``2 ** bits``."""
    base, rest, digits = 2**bits, stream.astype(np.int32), []
    for _ in range(8 // bits):
        digits.append(rest % base)
        rest = rest // base
    return np.stack(digits, -1).reshape(len(stream), -1).astype(np.uint8)
