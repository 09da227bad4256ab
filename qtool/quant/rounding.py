"""Rounding estimators: the forward is always exact rounding (half to even); the backward is the estimator's choice."""

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, exactly, with the gradient passed to ``x`` unchanged.

    A Function and not ``x + (value - x).detach()``: the sum need not return ``value`` once magnitudes differ.
    """
    result: Tensor = _StraightThrough.apply(x, value.detach())  # type: ignore[no-untyped-call]
    return result


def ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing happened (straight-through estimator)."""
    return straight_through(x, x.detach().round())
