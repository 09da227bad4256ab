"""The packed linear layer: integer codes, scales and zero points, held in memory as a native checkpoint stores them.

Every method ends in this layer. It expands its weight for each product, which is exact, or hands inputs of few rows to
a kernel (``kernels.py``). Input and output are rounded too where the grid asks for it (``activations.py``).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.config.quant import ACTIVATION_KEYS, QuantSpec
from qtool.quant import kernels
from qtool.quant.activations import ActivationRounding
from qtool.quant.affine import QuantizedWeight
from qtool.quant.expert_product import by_parts, product
from qtool.quant.packed_weight import PackedWeight


class PackedLinear(ActivationRounding, PackedWeight):
    """A linear whose weight is held as packed codes; see ``packed_weight.py``.

    Arithmetic is exact unless ``accelerate`` was called; then ``kernel`` multiplies inputs of few rows.
    """

    def __init__(self, in_features: int, out_features: int, spec: QuantSpec, bias: torch.dtype | None = None) -> None:
        """Make a layer of zeros, to load tensors into; ``bias`` is the dtype of its bias, ``None`` if it has none."""
        super().__init__()
        self.hold(in_features, out_features, spec)
        # not in the state dict: they are made from the buffers; one, or one for each of several experts
        self.kernels: tuple[kernels.Kernel, ...] = ()
        self.bias = None if bias is None else nn.Parameter(torch.zeros(out_features, dtype=bias), requires_grad=False)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None) -> "PackedLinear":
        """Pack ``weight``; ``bias`` ``[out]`` keeps its dtype. The layer shares no memory with either."""
        out_features, in_features = weight.codes.shape
        with torch.device(weight.codes.device):
            layer = cls(in_features, out_features, weight.spec, None if bias is None else bias.dtype)
        layer.fill(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def accelerate(self, experts: int = 1, among: Sequence[kernels.Backend] | None = None) -> str:
        """Prepare a kernel for inputs of few rows; return the reason if there is none, else an empty string.

        The kernel holds a second copy of the weight in its own layout; the state dict does not change. Each of
        ``experts`` whose weights are stacked gets a kernel of its own. ``among`` are the backends to try, in order;
        ``None``: see ``kernels.prepare``.
        """
        self.kernels = ()
        codes, scale, zero_point, spec = self.quantized
        parts = zip(codes.chunk(experts), scale.chunk(experts), zero_point.chunk(experts), strict=True)
        found = []
        for part in parts:
            kernel, reason = kernels.prepare(QuantizedWeight(*part, spec), among)
            if kernel is None:
                return reason
            found.append(kernel)
        self.kernels = tuple(found)
        return ""

    @property
    def kernel(self) -> kernels.Kernel | None:
        """The kernel, of experts that of the first."""
        return self.kernels[0] if self.kernels else None

    def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]`` in the dtype of ``x``; without a kernel, the weight is expanded.

        With ``counts``, of experts, only the weights of those that have rows are expanded.
        """
        if counts is not None:
            return self._of_experts(x, counts)
        if self.kernel is not None and self.kernel.takes(x) and not self.weight_scale.requires_grad:
            y = self.kernel(x)
            return y if self.bias is None else y.add_(self.bias)
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    def _of_experts(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Map the rows ``x [rows, in]`` of each expert to ``[rows, out]`` by its own weight."""
        if self.weight_scale.requires_grad and torch.is_grad_enabled():
            return product(x, self.dequantized(x.dtype), None, counts)
        size = self.out_features // len(counts)

        def multiply(expert: int, rows: Tensor) -> Tensor:
            kernel = self.kernels[expert] if self.kernels else None
            if kernel is not None and kernel.takes(rows):
                return kernel(rows)
            return F.linear(rows, self.dequantized(x.dtype, slice(expert * size, (expert + 1) * size)))

        return by_parts(x, counts, multiply)

    def changed(self) -> None:
        """Make the kernel again by the same library, after the buffers have changed or moved."""
        before, self.kernels = self.kernels, ()
        if before and self.weight_scale.device.type != "meta":
            first = before[0].backend
            self.accelerate(len(before), [first, *kernels.of_library(first.library)])

    def extra_repr(self) -> str:
        """Return shape and grid, for ``print(model)``."""
        rounded = "".join(f", {key}={getattr(self.spec, key)}" for key in ACTIVATION_KEYS if getattr(self.spec, key))
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec.label()}{rounded}"
