"""Sums of ``x^T x`` over calibration inputs ``x`` ``[tokens, in]``, for GPTQ's Hessian and for principal directions.

The matrix ``[in, in]`` is the largest tensor of a run. So only its lower triangle is summed, inputs are cast to float32
a few rows at a time, and the upper triangle is filled in place.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.system.matmul import exact_products

MIN_ROWS, MAX_ELEMENTS = 512, 2**22  # inputs are cast to float32 in chunks of max(MIN_ROWS, MAX_ELEMENTS // in) rows
PART = 256  # number of columns handled at once when a matrix is changed in place


def even_scale(x: Tensor) -> Tensor:
    """Return the power of two ``[tokens, 1]``, in the dtype of ``x``, that brings each token's mean square to [0.5, 2).

    A product with it is exact. Tokens then count alike in a sum of squares, where plain squares may see little but the
    few tokens whose inputs are a hundred times as large ("massive activations", arXiv 2402.17762). A token of zeros
    keeps its zeros. In float16 the scale is at most 2**15, less than tokens below 2**-15 would need.
    """
    exponent = torch.frexp(x.float().square().mean(-1, keepdim=True)).exponent
    power = exponent.div(2, rounding_mode="floor").neg().clamp(max=int(math.log2(torch.finfo(x.dtype).max)))
    return torch.ldexp(torch.ones_like(power, dtype=x.dtype), power)


def gram(inputs: Iterable[Tensor]) -> Tensor:
    """Return ``2/n sum x^T x``, float32 ``[in, in]``, of batches ``[tokens, in]`` with ``n`` tokens in all."""
    ((total, _),) = grams([batch] for batch in inputs)
    return total


def grams(batches: Iterable[Sequence[Tensor]]) -> list[tuple[Tensor, int]]:
    """Return ``gram`` and the number of tokens of several inputs; each batch has one tensor ``[tokens, in]`` of each.

    The matrix of an input without tokens is zero.
    """
    totals: list[Tensor] = []
    counts: list[int] = []
    for parts_of_batch in batches:
        if not totals:
            size = parts_of_batch[0].shape[1]
            totals = [part.new_zeros(size, size, dtype=torch.float32) for part in parts_of_batch]
            counts = [0] * len(totals)
        for index, (total, part) in enumerate(zip(totals, parts_of_batch, strict=True)):
            counts[index] += len(part)
            for rows in row_chunks(part):
                with exact_products(part.dtype):
                    add_gram(total, part[rows].float())
    assert totals, "a Gram matrix needs a batch"
    for total, count in zip(totals, counts, strict=True):
        mirror(total.mul_(2 / max(count, 1)))
    return list(zip(totals, counts, strict=True))


def row_chunks(batch: Tensor) -> Iterator[slice]:
    """Cut the rows of ``batch`` ``[tokens, in]`` into those that are cast to float32 together."""
    return parts(len(batch), max(MIN_ROWS, MAX_ELEMENTS // batch.shape[1]))


def parts(size: int, width: int) -> Iterator[slice]:
    """Cut ``0 .. size`` into slices of ``width``; the last may be shorter."""
    return (slice(start, min(start + width, size)) for start in range(0, size, width))


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add the lower triangle of ``x^T x`` to ``total`` ``[in, in]``; numbers above the diagonal have no meaning."""
    for part in parts(len(total), max(len(total) // 4, 128)):
        total[part, : part.stop].addmm_(x[:, part].T, x[:, : part.stop])


def mirror(matrix: Tensor) -> None:
    """Copy the lower triangle of ``matrix`` to the upper one, without a second matrix."""
    for part in parts(len(matrix), PART):
        matrix[: part.start, part] = matrix[part, : part.start].T
        lower = matrix[part, part].tril()
        matrix[part, part] = lower + lower.tril(-1).T


def invert_lower(matrix: Tensor) -> None:
    """Replace the lower triangular ``matrix`` ``[n, n]`` by its inverse, without a second matrix."""
    for part in parts(len(matrix), PART):
        left = matrix[part, : part.start]
        for column in parts(part.start, PART):  # each is made from itself and the columns to its right, still unchanged
            left[:, column] = left[:, column.start :] @ matrix[column.start : part.start, column]
        identity = torch.eye(part.stop - part.start, dtype=matrix.dtype, device=matrix.device)
        own = torch.linalg.solve_triangular(matrix[part, part], identity, upper=False)
        left.copy_(own.neg() @ left)
        matrix[part, part] = own


def reverse(matrix: Tensor) -> None:
    """Reverse the order of rows and of columns of the contiguous ``matrix``, without a second matrix."""
    flat = matrix.view(-1)
    for part in parts(len(flat) // 2, PART * PART):
        opposite = slice(len(flat) - part.stop, len(flat) - part.start)
        first = flat[part].flip(0)
        flat[part] = flat[opposite].flip(0)
        flat[opposite] = first


def column_order(diagonal: Tensor, spec: QuantSpec, kind: str) -> Tensor:
    """Return the order ``[in]`` in which columns are quantized; groups stay whole unless ``kind`` is ``full``.

    So do the blocks of GGUF's types.
    """
    if kind == "off":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    if kind == "full":
        return torch.argsort(diagonal, descending=True, stable=True)
    size = spec.columns_together(diagonal.numel())
    by_group = diagonal.view(-1, size)
    groups = torch.argsort(by_group.amax(1), descending=True, stable=True)
    inside = torch.argsort(by_group, dim=1, descending=True, stable=True)
    return (groups.unsqueeze(1) * size + inside[groups]).flatten()
