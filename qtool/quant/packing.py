"""One packer: a dense bit stream, least significant bit first, in 32-bit words.

Code ``i`` of a row occupies bits ``i * b .. i * b + b - 1`` of the row's stream; bit ``t`` of the stream is bit
``t % 32`` of word ``t // 32``. GPTQ (transposed), compressed-tensors >= 0.18 and MLX use this stream; the 32 codes in 3
words of 3-bit GPTQ are the same stream.
"""

import sys
from math import gcd

import torch
from torch import Tensor

WORD = 32  # bits of a word
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtypes by their size in bytes


def _period(num_bits: int, unit: int) -> tuple[int, int]:
    """Return the least number of codes that fill whole units of ``unit`` bits, and the number of those units."""
    num_codes = unit // gcd(unit, num_bits)
    return num_codes, num_codes * num_bits // unit


def num_words(num_codes: int, num_bits: int) -> int:
    """Return how many 32-bit words hold ``num_codes`` codes."""
    return -(-num_codes * num_bits // WORD)


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Pack codes ``[rows, n]`` (integers ``0 .. 2**num_bits - 1``) to int32 words ``[rows, ceil(n b / 32)]``."""
    rows, n = codes.shape
    per_period, words_per_period = _period(num_bits, WORD)
    periods = -(-n // per_period)
    padded = torch.nn.functional.pad(codes, (0, periods * per_period - n)).view(rows, periods, per_period)
    words = torch.zeros(rows, periods, words_per_period, dtype=torch.int32, device=codes.device)
    for i in range(per_period):
        word, shift = divmod(i * num_bits, WORD)
        code = padded[..., i].to(torch.int32)
        words[..., word] |= code << shift  # an overflow into the sign keeps the bits
        if shift + num_bits > WORD:
            words[..., word + 1] |= code >> (WORD - shift)
    return words.flatten(1)[:, : num_words(n, num_bits)].contiguous()


def unpack(words: Tensor, num_bits: int, num_codes: int) -> Tensor:
    """Return the first ``num_codes`` codes of each row of ``words`` int32 ``[rows, w]``: uint8 ``[rows, num_codes]``.

    A period of 8, 4 or 2 codes lies in one integer of as many bytes. It is split in halves until each code has a byte.
    """
    assert sys.byteorder == "little", "the bytes of a word are read in the order of the stream"
    per_period, bytes_per_period = _period(num_bits, 8)
    periods = -(-num_codes // per_period)
    stream = words.flatten().view(torch.uint8).view(words.shape[0], -1)
    stream = torch.nn.functional.pad(stream, (0, periods * bytes_per_period - stream.shape[1]))  # a negative pad cuts
    octets = stream.view(-1, periods, bytes_per_period).to(INTEGERS[per_period]).unbind(-1)
    lanes = octets[0]
    for i, octet in enumerate(octets[1:], 1):
        lanes = lanes | octet << 8 * i
    step = per_period
    while step > 1:
        step //= 2
        half, shift = 2 ** (step * num_bits) - 1, step * (8 - num_bits)
        low = sum(half << 8 * i for i in range(0, per_period, 2 * step))
        if num_bits > 4:  # the halves overlap their new places
            lanes = lanes & low | lanes << shift & low << 8 * step
        else:
            lanes = (lanes | lanes << shift) & (low | low << 8 * step)
    return lanes.contiguous().view(torch.uint8)[:, :num_codes].contiguous()


def unpack_at(words: Tensor, num_bits: int, index: Tensor) -> Tensor:
    """Return the codes at ``index`` ``[n]`` of the stream down each column of ``words`` int32 ``[w, c]``.

    The result is ``[n, c]``, uint8. A code may lie in two words.
    """
    first, shift = index * num_bits // WORD, (index * num_bits % WORD).unsqueeze(1)
    low = words[first].long() & 0xFFFFFFFF
    high = words[(first + 1).clamp(max=len(words) - 1)].long() & 0xFFFFFFFF
    both = low | high << WORD  # the sign of 64 bits is reached by no code: shift + num_bits is below 40
    codes: Tensor = both >> shift & 2**num_bits - 1
    return codes.to(torch.uint8)
