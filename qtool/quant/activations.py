"""Quantization of activations and of the KV cache: each token has a grid of its own, made from its values at run time.

An asymmetric grid has ``scale = (max - min) / (2**num_bits - 1)`` and ``x ~ round((x - min) / scale) * scale + min``,
over the channels of a token or over groups of them. As in LR-QAT (arXiv 2406.06385) the lower end of the range is kept
exactly, where an integer zero point would move it. No engine computes products of such inputs.

A symmetric grid has ``scale = max |x| / (2**(num_bits - 1) - 1)`` and ``x ~ round(x / scale) * scale``: the grid of
int8 kernels, such as vLLM's, with codes -127 to 127 at 8 bits. It keeps 0 and both signs alike.

Halves go to the even code. Nothing is clipped and nothing has to be calibrated, and no gradient passes through the
range, so the gradient of ``x`` passes unchanged. Keys and values are rounded at the output of their linears, for each
head, before rotary embedding: a cache then holds the same numbers whether tokens came all at once or one by one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtool.config.quant import QuantSpec
from qtool.quant.rounding import straight_through


def round_tokens(x: Tensor, num_bits: int, group_size: int | None = None) -> Tensor:
    """Round ``x [..., channels]`` to the grid of each token and group; computed in float32, returned in its dtype."""
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    groups = values if group_size is None else values.unflatten(-1, (-1, group_size))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (high - low).div_(2**num_bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # equal values give a scale of 0: then the result is that value, exactly
    rounded = (groups - low).div_(scale).round_().mul_(scale).add_(low)
    return straight_through(x, rounded.reshape(x.shape).to(x.dtype))


def round_symmetric(x: Tensor, num_bits: int) -> Tensor:
    """Round ``x [..., channels]`` to the symmetric grid of each token; dtypes as in ``round_tokens``."""
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    scale = values.abs().amax(dim=-1, keepdim=True).div_(2 ** (num_bits - 1) - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # a token of zeros stays zeros
    return straight_through(x, (values / scale).round_().mul_(scale).to(x.dtype))


def round_input(x: Tensor, spec: QuantSpec) -> Tensor:
    """Round the input ``x`` of a linear as ``spec.activations`` asks."""
    if (grid := spec.activations) is None:
        return x
    return round_symmetric(x, grid.num_bits) if grid.symmetric else round_tokens(x, grid.num_bits)


def round_output(y: Tensor, spec: QuantSpec) -> Tensor:
    """Round the output ``y`` of a linear that makes keys or values, as ``spec.kv_cache`` asks."""
    return y if spec.kv_cache is None else round_tokens(y, spec.kv_cache, spec.kv_group_size)


class ActivationRounding(nn.Module):
    """The base of linears whose input and output are rounded as ``spec`` asks; ``forward`` is the product between."""

    spec: QuantSpec

    def __call__(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]``. Rounding is not in ``forward``, which callers replace on instances.

        A linear of experts gets the number of rows of each expert in ``counts``.
        """
        rows = () if counts is None else (counts,)
        return round_output(super().__call__(round_input(x, self.spec), *rows), self.spec)
