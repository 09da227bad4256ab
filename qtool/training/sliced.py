"""The sum of a loss over tokens, computed for a few tokens at a time, so that no tensor has all tokens' logits.

A slice's gradient is computed with its loss, while its logits exist (as Liger-Kernel does for cross entropy, arXiv
2410.10989), so no logits are computed twice; the backward pass multiplies the gradients by that of the sum. Apart from
the order of sums, loss and gradients are those of all tokens at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool.system.tensors import size_for

SLICE_BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}  # largest size of the logits of a slice, of one model in float32
LEAST_TOKENS = 64  # least number of tokens in a slice: products of fewer are bound by reading the weight of the head


def slices_of(count: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Return slices of ``count`` tokens whose logits are within ``SLICE_BYTES``, or of ``LEAST_TOKENS`` tokens."""
    size = max(LEAST_TOKENS, size_for(device, SLICE_BYTES) // (4 * vocabulary))
    return [slice(start, start + size) for start in range(0, count, size)]


def summed(
    loss: Callable[[Tensor, slice], Tensor],
    hidden: Tensor,
    slices: Sequence[slice],
    parameters: Sequence[nn.Parameter] = (),
) -> Tensor:
    """Return the sum of ``loss(hidden[rows], rows)`` over ``slices``, a float32 scalar.

    ``loss`` gives the sum over the tokens ``rows`` from their final hidden states ``[n, d]``. It may depend on
    ``parameters``, which then get gradients, and on nothing else that does.
    """
    if not torch.is_grad_enabled():
        return torch.stack([loss(hidden[rows], rows).float() for rows in slices]).sum()
    total: Tensor = _Summed.apply(loss, slices, hidden, *parameters)  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    """The sum of the losses of slices; it holds gradients of the size of the hidden states and the parameters."""

    @staticmethod
    def forward(
        ctx: Any, loss: Callable[[Tensor, slice], Tensor], slices: Sequence[slice], hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        wanted = [each for each, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[2] else None
        of_wanted: list[Tensor | None] = [None] * len(wanted)
        for rows in slices:
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                x = hidden[rows].detach().requires_grad_(of_hidden is not None)
                part = loss(x, rows).float()
            total += part.detach()
            if not part.requires_grad:
                continue
            inputs = [*([] if of_hidden is None else [x]), *wanted]
            found = list(torch.autograd.grad(part, inputs, allow_unused=True))
            if of_hidden is not None and (gradient := found.pop(0)) is not None:
                of_hidden[rows] = gradient
            of_wanted = [new if old is None else _plus(old, new) for old, new in zip(of_wanted, found, strict=True)]
        ctx.gradients = [of_hidden, *_in_places(of_wanted, ctx.needs_input_grad[3:])]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(None if each is None else each * grad.to(each.dtype) for each in ctx.gradients))


def _plus(total: Tensor, gradient: Tensor | None) -> Tensor:
    """Add ``gradient``, if there is one, in place."""
    return total if gradient is None else total.add_(gradient)


def _in_places(found: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients ``found`` of the inputs that are ``needed``, and ``None`` for the others."""
    rest = iter(found)
    return [next(rest) if each else None for each in needed]
