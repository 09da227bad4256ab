"""Products of inputs and the weights of experts, which are stacked in one matrix ``[experts * out, in]``.

The rows of an input are sorted by expert, and ``counts`` is the number of rows of each expert; without ``counts`` a
product is that of a plain linear.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Sequence[int] | None = None) -> Tensor:
    """Return ``x weight^T + bias``, or with ``counts`` the rows ``x [rows, in]`` of each expert times its own weight.

    ``weight`` is ``[out, in]``, or ``[experts * out, in]``; then there is no bias.
    """
    if counts is None:
        return F.linear(x, weight, bias)
    assert bias is None, "biases of experts are added by the model"
    by_expert = weight.unflatten(0, (len(counts), -1))
    return by_parts(x, counts, lambda expert, rows: F.linear(rows, by_expert[expert]))


def by_parts(x: Tensor, counts: Sequence[int], multiply: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return the products of the rows ``x [rows, in]`` of each expert; experts without rows are passed over.

    ``multiply(e, rows)`` returns the product of an expert.
    """
    parts = [multiply(expert, rows) for expert, rows in enumerate(x.split(list(counts))) if len(rows)]
    if not parts:  # no token chose any expert
        return multiply(0, x)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def block_product(left: Tensor, right: Tensor, experts: int) -> Tensor:
    """Return ``left_e right_e`` of each expert, stacked: ``[experts * out, r]`` and ``[experts * r, in]``."""
    if experts == 1:
        return left @ right
    return torch.bmm(left.unflatten(0, (experts, -1)), right.unflatten(0, (experts, -1))).flatten(0, 1)


def transposed_product(grad: Tensor, weight: Tensor, counts: Sequence[int] | None) -> Tensor:
    """Return ``grad weight``, the gradient ``[..., in]`` of the input of ``product``; ``grad`` is ``[..., out]``."""
    if counts is None:
        return grad @ weight
    by_expert = weight.unflatten(0, (len(counts), -1))
    parts = zip(grad.split(list(counts)), by_expert, strict=True)
    return torch.cat([rows @ own for rows, own in parts])


def outer_product(grad: Tensor, x: Tensor, counts: Sequence[int] | None) -> Tensor:
    """Return ``grad^T x``, the gradient of the weight of ``product``, of ``grad [rows, out]`` and ``x [rows, in]``."""
    if counts is None:
        return grad.T @ x
    parts = zip(grad.split(list(counts)), x.split(list(counts)), strict=True)
    return torch.cat([own.T @ rows for own, rows in parts])
