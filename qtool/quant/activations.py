"""Rounding of what linears read and give: each token has a grid of its own, made from its values as they come.

``scale = (max - min) / (2**num_bits - 1)`` and ``x ~ round((x - min) / scale) * scale + min``, over the channels of a
token or over groups of them. Nothing is clipped and nothing has to be calibrated. As in LR-QAT (arXiv 2406.06385) the
end of the range stays as it is, where an integer zero point would move it, and no gradient passes through the range:
so the gradient passes unchanged. Keys and values are rounded where their linears give them, for each head, before
rotary embedding; what a cache then holds is the same however the tokens came, all at once or one by one.
"""

import torch
from torch import Tensor, nn

from qtool.config.quant import QuantSpec
from qtool.quant.rounding import straight_through


def round_tokens(x: Tensor, num_bits: int, group_size: int | None = None) -> Tensor:
    """``x [..., channels]`` on the grid of each token and group of channels, in its dtype, computed in float32."""
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    groups = values if group_size is None else values.unflatten(-1, (-1, group_size))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (high - low).div_(2**num_bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # all the same: that value, exactly
    rounded = (groups - low).div_(scale).round_().mul_(scale).add_(low)
    return straight_through(x, rounded.reshape(x.shape).to(x.dtype))


def round_input(x: Tensor, spec: QuantSpec) -> Tensor:
    """What a linear on ``spec`` makes of ``x`` before it multiplies."""
    return x if spec.activations is None else round_tokens(x, spec.activations)


def round_output(y: Tensor, spec: QuantSpec) -> Tensor:
    """What a linear on ``spec`` makes of its product, if that is keys or values."""
    return y if spec.kv_cache is None else round_tokens(y, spec.kv_cache, spec.kv_group_size)


class ActivationRounding(nn.Module):
    """A linear that rounds what it reads and gives as its spec says; ``forward`` is the product between."""

    spec: QuantSpec

    def __call__(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]``; here and not in ``forward``, which is replaced here and there."""
        return round_output(super().__call__(round_input(x, self.spec)), self.spec)
