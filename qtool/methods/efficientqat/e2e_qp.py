"""E2E-QP, the second phase of EfficientQAT: the codes stay, and the scales train on a loss of the whole model.

A layer keeps its packed codes and float32 masters of its scales, but no float weight: the weight is expanded for each
product, and again for its gradient. With ``W = (q - z) s`` and ``G`` the gradient of ``W``, the gradient of a scale is
``sum G (q - z)`` over its group, and that of a zero point is ``-s sum G``. Scales and zero points are rounded to their
stored values before they are used, so packing at the end changes no bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool.blocks.job import Job
from qtool.methods.efficientqat.config import ScaleConfig
from qtool.models.linears import packed_linears, replace_linear
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight
from qtool.quant.expert_product import outer_product, product, transposed_product
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.packed_weight import ALL
from qtool.quant.packing import unpack
from qtool.reports.records import Series
from qtool.training.end_to_end import train_model
from qtool.training.fit import FitResult, ParamGroup
from qtool.training.losses import CE
from qtool.training.plan import plan_of
from qtool.training.rates import end_to_end_total, rate, scale_group
from qtool.training.sharding import train_by_block

PHASE = "e2e-qp"  # name of the folder of the training state


class _Product(torch.autograd.Function):
    """The product ``x W^T + bias``, with gradients of ``x``, the scale and the zero point."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, layer: "ScaleLinear", counts: Sequence[int] | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.layer, ctx.counts = layer, counts
        return product(x, layer.dequantized(x.dtype), layer.bias, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        layer: ScaleLinear = ctx.layer
        grad_x = grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[0]:
            grad_x = transposed_product(grad, layer.dequantized(grad.dtype), ctx.counts).to(x.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            products = outer_product(grad.flatten(0, -2), x.flatten(0, -2).to(grad.dtype), ctx.counts)
            of_weight = affine.grouped(products, layer.spec).to(scale.dtype)
            total = of_weight.sum(-1)
            if ctx.needs_input_grad[1]:
                codes = unpack(layer.weight_packed, layer.spec.num_bits, layer.in_features)
                grad_scale = torch.linalg.vecdot(of_weight, affine.grouped(codes, layer.spec).to(scale.dtype))
                grad_scale -= zero_point * total
            if ctx.needs_input_grad[2]:
                grad_zero_point = -scale * total
        return grad_x, grad_scale, grad_zero_point, None, None


class ScaleLinear(PackedLinear):
    """A packed linear whose scales, zero points or both train."""

    scale: nn.Parameter  # float32 [out, groups]
    zero_point: nn.Parameter

    @classmethod
    def of(cls, packed: PackedLinear, scales: bool, zero_points: bool) -> "ScaleLinear":
        """Make a layer that shares the buffers of ``packed``; ``scales`` and ``zero_points`` say what trains."""
        with torch.device(packed.weight_packed.device):
            layer = cls(packed.in_features, packed.out_features, packed.spec)
        for name, buffer in packed.named_buffers():
            setattr(layer, name, buffer)
        layer.bias = packed.bias
        scale, zero_point = packed.qparams()
        layer.scale = nn.Parameter(scale.clone(), requires_grad=scales)
        layer.zero_point = nn.Parameter(zero_point.clone(), requires_grad=zero_points and not packed.spec.symmetric)
        return layer

    def qparams(self, rows: slice | Tensor = ALL) -> tuple[Tensor, Tensor]:
        """Return scale and zero point as they are stored, float32 ``[out, groups]``, with gradients to the masters."""
        scale = affine.stored_scale(self.scale[rows], self.spec)
        return scale, affine.stored_zero_point(self.zero_point[rows], scale, self.spec)

    def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]``."""
        result: Tensor = _Product.apply(x, *self.qparams(), self, counts)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def packed(self) -> PackedLinear:
        """Return the packed layer of this weight; its output is the same, bit for bit."""
        return PackedLinear.from_quantized(QuantizedWeight(*self.quantized), self.bias)


def groups_of(layer: ScaleLinear, total: float, config: ScaleConfig) -> list[ParamGroup]:
    """Return the parameters of a layer that train, with learning rates; distances are divided by ``total``."""
    groups = [
        scale_group(layer.scale, config.scale_share, total, config.lr),
        ParamGroup([layer.zero_point], rate(config.zero_travel, total, config.lr)),
    ]
    return [group for group in groups if group.parameters[0].requires_grad]


def train_scales(job: Job, config: ScaleConfig) -> tuple[Series, ...]:
    """Train the scales of all packed linears on the text of the job; return the losses of steps and validations."""
    loaded = job.loaded
    teacher = None if config.loss == CE else loaded.float_copy()
    total = end_to_end_total(plan_of(config, len(job.text), "method.e2e").total, len(loaded.blocks()))
    blocks = [*(name for name, _ in loaded.blocks()), *(target.name for target in job.tables.of_method)]
    layers: list[dict[str, ScaleLinear]] = []

    def put(index: int) -> list[ParamGroup]:
        made = {}
        for name, packed in packed_linears(loaded.model.get_submodule(blocks[index])).items():
            made[f"{blocks[index]}.{name}".removesuffix(".")] = ScaleLinear.of(
                packed, "scales" in config.trains, "zero_points" in config.trains
            )
        for name, layer in made.items():
            replace_linear(loaded.model, name, layer)
        layers.append(made)
        return [group for layer in made.values() for group in groups_of(layer, total, config)]

    def train(groups: list[ParamGroup]) -> FitResult:
        return train_model(job, teacher, groups, config, phase=PHASE)

    def pack(index: int) -> None:
        for name, layer in layers[index].items():
            replace_linear(loaded.model, name, layer.packed())

    found = train_by_block(job, teacher, config, put, train, pack)
    return found.series("e2e_loss")
