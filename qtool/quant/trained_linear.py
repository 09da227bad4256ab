"""A linear in training: a float weight rounded to its grid in every forward."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.config.quant import QuantSpec
from qtool.config.training import RoundingConfig
from qtool.quant import affine
from qtool.quant.activations import ActivationRounding
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.rounding import PLAIN, scaled_gradient
from qtool.system.errors import InputError

HALF_CODE = 0.499  # how far from its code a weight may start: what float32 can tell from half a code at 8 bits


class QuantLinear(ActivationRounding):
    """A linear whose weight passes through its grid in every forward; weight, scale and zero point can train.

    ``grid_weight`` is the seam for methods that add something inside the rounding; ``qparams`` for those that
    move the range. ``rounding`` decides about gradients only: what is packed is the same under all.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, spec: QuantSpec, rounding: RoundingConfig = PLAIN) -> None:
        """Start from round-to-nearest: ``weight`` ``[out, in]``, ``bias`` ``[out]``, min-max range."""
        super().__init__()
        self.spec, self.rounding, self.num_weights = spec, rounding, weight.numel()
        self.set_progress(0.0)
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        scale, zero_point = affine.minmax_qparams(self.weight.detach(), spec)
        self.scale = nn.Parameter(scale)
        # zero gradient where nothing clips, and none at all when symmetric: there it is no parameter to train
        self.zero_point = nn.Parameter(zero_point, requires_grad=not spec.symmetric)

    def set_progress(self, share: float) -> None:
        """Move the temperature along its ramp; ``share`` of the training is done, 0 .. 1."""
        assert 0 <= share <= 1, share
        self.surrogate = self.rounding.at(share)

    @torch.no_grad()
    def start_from(self, quantized: QuantizedWeight) -> None:
        """Take the grid of ``quantized`` and start at exactly its codes.

        A weight within one code of its own is moved into the code's cell; one that is further off, onto the code.

        Raises:
            InputError: another grid.
        """
        codes, scale, zero_point, spec = quantized
        ours = self.spec.weights_only
        differs = [key for key, value in spec.weights_only if value != getattr(ours, key)]
        if differs:
            found, asked = (", ".join(f"{key} {getattr(s, key)}" for key in differs) for s in (spec, self.spec))
            raise InputError(f"the weights to start from have {found}; this run asks for {asked}: make them the same")
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        target = affine.grouped(codes, spec).to(scale.dtype)
        grid = affine.to_grid(self.weight, scale, zero_point, spec)
        inside = grid.clamp(target - HALF_CODE, target + HALF_CODE)
        self.weight.copy_(affine.from_codes(torch.where((grid - target).abs() <= 1, inside, target), scale, zero_point))

    @property
    def scale_gradient_factor(self) -> float:
        """LSQ's: ``1 / sqrt(n Qp)`` for ``n`` weights that share a scale, and the highest level ``Qp`` above zero."""
        highest = self.spec.middle - 1 if self.spec.symmetric else self.spec.qmax
        return 1 / math.sqrt(self.num_weights / self.scale.numel() * highest)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as stored, ``[out, groups]``; straight-through gradients."""
        return affine.stored_scale(self.scale, self.spec), affine.stored_zero_point(self.zero_point, self.spec)

    def grid_weight(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Weight in grid units before rounding, ``[out, groups, group_size]``."""
        return affine.to_grid(self.weight, scale, zero_point, self.spec)

    def quantized_weight(self) -> Tensor:
        """Float32 weight ``[out, in]`` on the grid, with gradients."""
        scale, zero_point = self.qparams()
        if self.rounding.scale_gradient == "lsq":
            scale = scaled_gradient(scale, self.scale_gradient_factor)
        codes = affine.round_to_codes(self.grid_weight(scale, zero_point), self.spec, self.surrogate)
        return affine.from_codes(codes, scale, zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]`` in the dtype of ``x``."""
        return F.linear(x, self.quantized_weight().to(x.dtype), self.bias)

    @property
    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """What ``freeze`` packs: exact codes, whatever the rounding of the training."""
        scale, zero_point = self.qparams()
        codes = affine.round_to_codes(self.grid_weight(scale, zero_point), self.spec)
        return QuantizedWeight(codes.to(torch.uint8).flatten(1), scale, zero_point, self.spec)

    def freeze(self) -> "PackedLinear":
        """The packed layer with the same output, bit for bit."""
        return PackedLinear.from_quantized(self.quantized, self.bias)
