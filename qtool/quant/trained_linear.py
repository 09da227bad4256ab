"""The linear layer that methods train: a float weight that is rounded to its grid in every forward.

``freeze`` turns it into the packed layer without changing a bit of its weight: training sees what is shipped. Only a
soft forward (``rounding.py``) shows training something else. Input and output are rounded too where the grid asks for
it (``activations.py``).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtool.config.quant import QuantSpec
from qtool.config.training import RoundingConfig
from qtool.quant import affine, fused_rounding
from qtool.quant.activations import ActivationRounding
from qtool.quant.affine import QuantizedWeight
from qtool.quant.expert_product import product
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.rounding import PLAIN, scaled_gradient
from qtool.system.errors import InputError

POSITIVE = (  # the end of the refusal of negative scales
    "and this run has positive ones (by default where inputs are rounded); set quant.negative_scales: true, or make "
    "the weights to start from anew with false"
)
HALF_CODE = 0.499  # start_from puts no weight further from its code; float32 cannot round it to the next code


class QuantLinear(ActivationRounding):
    """A linear whose weight is rounded to its grid in every forward; weight, scale and zero point can train.

    Subclasses override ``grid_weight`` to add a term before rounding, and ``qparams`` to move the range. ``rounding``
    changes gradients only (and a soft forward): the codes that are packed are the same.
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
        # its gradient is zero where nothing clips; the zero point of a symmetric grid is constant
        self.zero_point = nn.Parameter(zero_point, requires_grad=not spec.symmetric)

    def set_progress(self, share: float) -> None:
        """Move the temperature of ``rounding`` along its ramp; ``share``, 0 .. 1, of the training is done."""
        assert 0 <= share <= 1, share
        self.surrogate = self.rounding.at(share)

    @torch.no_grad()
    def start_from(self, quantized: QuantizedWeight, margin: float = 0.0) -> None:
        """Take the grid of ``quantized``, and move each weight so that it rounds to its code there.

        A weight beyond the edge of its code's cell is mirrored at that edge, or put on its code if it is a code away or
        further; beyond the last code there is no edge, and a weight is clamped there. Then all are drawn towards their
        codes until none is nearer to an edge than ``margin``, 0 .. 0.5, in codes. GPTQ's codes correct each other's
        errors, and many are not the nearest: with these weights at the edges, the first step of a training takes many
        of them back.

        Raises:
            InputError: ``quantized`` has other settings than this layer: another width, group size or zero point, or
                negative scales where this grid has none.
        """
        codes, scale, zero_point, spec = quantized
        ours = self.spec.any_sign
        differs = [key for key, value in spec.any_sign if value != getattr(ours, key)]
        if differs:
            found, asked = (", ".join(f"{key} {getattr(s, key)}" for key in differs) for s in (spec, self.spec))
            raise InputError(f"the weights to start from have {found}; this run asks for {asked}: make the two equal")
        if not self.spec.signed and bool((scale < 0).any()):
            raise InputError(f"the weights to start from have negative scales, {POSITIVE}")
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        target = affine.grouped(codes, spec).to(scale.dtype)
        away = affine.to_grid(self.weight, scale, zero_point, spec) - target
        distance, last = away.abs(), target == torch.where(away > 0, spec.qmax, spec.qmin)
        inside = torch.where(last, distance, torch.minimum(distance, 1 - distance)).where(distance <= 1, 0)
        place = target + away.sign() * ((1 - 2 * margin) * inside).clamp(max=HALF_CODE)
        self.weight.copy_(affine.from_codes(place, scale, zero_point, spec))

    @property
    def scale_gradient_factor(self) -> float:
        """LSQ's factor on the scale's gradient: ``1 / sqrt(n Qp)``, ``n`` weights per scale, highest level ``Qp``."""
        highest = self.spec.middle - 1 if self.spec.symmetric else self.spec.qmax
        return 1 / math.sqrt(self.num_weights / self.scale.numel() * highest)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point as they are stored, ``[out, groups]``, with straight-through gradients."""
        scale = affine.stored_scale(self.scale, self.spec)
        return scale, affine.stored_zero_point(self.zero_point, scale, self.spec)

    def grid_weight(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return the weight in grid units, before rounding: ``[out, groups, group_size]``."""
        return fused_rounding.to_grid(affine.grouped(self.weight.to(scale.dtype), self.spec), scale, zero_point)

    def quantized_weight(self) -> Tensor:
        """Return the weight ``[out, in]`` on the grid, float32, with gradients."""
        scale, zero_point = self.qparams()
        if self.rounding.scale_gradient == "lsq":
            scale = scaled_gradient(scale, self.scale_gradient_factor)
        grid, spec = self.grid_weight(scale, zero_point), self.spec
        if fused_rounding.serves(self.surrogate) and (spec.blocks is None or spec.symmetric):
            return fused_rounding.rounded(grid, scale, zero_point, spec.qmin, spec.qmax).flatten(1)
        codes = affine.round_to_codes(grid, spec, self.surrogate)
        return affine.from_codes(codes, scale, zero_point, spec)

    def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        return product(x, self.quantized_weight().to(x.dtype), self.bias, counts)

    @property
    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The weight that ``freeze`` packs: exact codes, also after training with a soft forward."""
        scale, zero_point = self.qparams()
        codes = affine.round_to_codes(self.grid_weight(scale, zero_point), self.spec)
        return QuantizedWeight(codes.to(torch.uint8).flatten(1), scale, zero_point, self.spec)

    def freeze(self) -> "PackedLinear":
        """Return the packed layer of this weight; its output is the same, bit for bit."""
        return PackedLinear.from_quantized(self.quantized, self.bias)
