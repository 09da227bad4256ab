"""The packed linear layer: integer codes, scales and zero points, held in memory as a native checkpoint stores them.

Every method ends in this layer. It expands its weight for each product, which is exact, or hands inputs of few rows to
a kernel (``kernels.py``). Input and output are rounded too where the grid asks for it (``activations.py``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.config.quant import ACTIVATION_KEYS, QuantSpec
from qtool.quant import affine, kernels
from qtool.quant.activations import ActivationRounding
from qtool.quant.affine import QuantizedWeight
from qtool.quant.expert_product import by_parts, product
from qtool.quant.packing import WORD, num_words, pack, unpack
from qtool.system.errors import InputError
from qtool.system.tensors import size_for

FORMAT_VERSION = 1  # version of the native checkpoint's format
ACTIVATIONS_VERSION = 2  # version of a checkpoint that rounds activations or the KV cache: older readers must stop
PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")  # buffers of a packed linear

ALL = slice(None)  # all rows of a weight
CHUNK_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 26}  # number of weights expanded at once; a CPU's caches hold 2**19


class PackedLinear(ActivationRounding):
    """A linear whose weight is held as packed codes; buffer names and shapes are those of ``pack-quantized``.

    The buffer ``weight`` is one number, the format version. Its shape makes a loader that does not know qtool stop at
    a size mismatch, instead of filling the layer with random numbers. It is a byte in files, and in memory a number of
    the model's dtype, because models ask a linear for the dtype of its weight (``hidden.to(linear.weight.dtype)``).

    Arithmetic is exact unless ``accelerate`` was called; then ``kernel`` multiplies inputs of few rows.
    """

    weight: Tensor
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    weight_shape: Tensor

    def __init__(self, in_features: int, out_features: int, spec: QuantSpec, bias: torch.dtype | None = None) -> None:
        """Make a layer of zeros, to load tensors into; ``bias`` is the dtype of its bias, ``None`` if it has none."""
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        # not in the state dict: they are made from the buffers; one, or one for each of several experts
        self.kernels: tuple[kernels.Kernel, ...] = ()
        groups = spec.num_groups(in_features)
        self.register_buffer("weight", torch.full((1,), float(FORMAT_VERSION)))
        words = num_words(in_features, spec.num_bits)
        self.register_buffer("weight_packed", torch.zeros(out_features, words, dtype=torch.int32))
        scale_dtype = getattr(torch, spec.scale_dtype)
        self.register_buffer("weight_scale", torch.zeros(out_features, groups, dtype=scale_dtype))
        if spec.float_zero:
            self.register_buffer("weight_zero_point", torch.zeros(out_features, groups, dtype=scale_dtype))
        elif not spec.symmetric:
            words = num_words(out_features, spec.num_bits)
            self.register_buffer("weight_zero_point", torch.zeros(words, groups, dtype=torch.int32))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))
        self.bias = None if bias is None else nn.Parameter(torch.zeros(out_features, dtype=bias), requires_grad=False)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None) -> "PackedLinear":
        """Pack ``weight``; ``bias`` ``[out]`` keeps its dtype. The layer shares no memory with either."""
        codes, scale, zero_point, spec = weight
        out_features, in_features = codes.shape
        with torch.device(codes.device):
            layer = cls(in_features, out_features, spec, None if bias is None else bias.dtype)
        layer.weight_packed = pack(codes, spec.num_bits)
        layer.weight_scale = scale.to(layer.weight_scale.dtype, copy=True)
        assert torch.equal(layer.weight_scale.float(), scale), "a scale that its stored dtype does not hold"
        if spec.symmetric:
            assert bool((zero_point == spec.middle).all()), "a symmetric grid with a zero point off the middle"
        elif spec.float_zero:
            layer.weight_zero_point = zero_point.to(layer.weight_zero_point.dtype, copy=True)
            assert torch.equal(layer.weight_zero_point.float(), zero_point), "a zero point that its dtype does not hold"
        else:
            layer.weight_zero_point = pack(zero_point.to(torch.uint8).T.contiguous(), spec.num_bits).T.contiguous()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def check(self, name: str) -> None:
        """Refuse loaded tensors that do not fit the grid.

        Raises:
            InputError: the tensor that does not fit, whose name is printed after ``name``.
        """
        with torch.device("meta"):
            fitting = PackedLinear(self.in_features, self.out_features, self.spec)
        for part, buffer in fitting.named_buffers():
            found = self.get_buffer(part)
            if part == "weight" and found.shape == buffer.shape:
                continue  # a byte in files
            if found.shape != buffer.shape or found.dtype != buffer.dtype:
                raise InputError(
                    f"{name}.{part} is {found.dtype} {list(found.shape)}; its grid {self.spec.label()} needs "
                    f"{buffer.dtype} {list(buffer.shape)}"
                )
        shape = [self.out_features, self.in_features]
        if self.weight_shape.device.type != "meta" and self.weight_shape.tolist() != shape:
            raise InputError(f"{name}.weight_shape is {self.weight_shape.tolist()}; the model needs {shape}")

    def mark(self, dtype: torch.dtype) -> None:
        """Let the buffer ``weight`` have the dtype of the model."""
        self.weight = self.weight.to(dtype)

    @property
    def quantized(self) -> QuantizedWeight:
        """Codes, scale and zero point, unpacked."""
        codes = unpack(self.weight_packed, self.spec.num_bits, self.in_features)
        return QuantizedWeight(codes, *self.qparams(), self.spec)

    def qparams(self, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of ``rows``, float32 ``[out, groups]``."""
        scale = self.weight_scale[rows].float()
        if self.spec.symmetric:
            return scale, torch.full_like(scale, self.spec.middle)
        if self.spec.float_zero:
            return scale, self.weight_zero_point[rows].float()
        words, (start, stop, _) = self.weight_zero_point, rows.indices(self.out_features)
        bits = self.spec.num_bits
        first = start * bits // WORD if start * bits % WORD == 0 else 0  # rows before the first word are not unpacked
        words = words[first : num_words(stop, bits)].T.contiguous()
        skipped = first * WORD // bits
        return scale, unpack(words, bits, stop - skipped)[:, start - skipped :].T.float()

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Tensor:
        """Return ``rows`` of the weight ``[out, in]``, computed in float32 and rounded to ``dtype``, some at a time."""
        scale, zero_point = self.qparams(rows)
        if scale.requires_grad and torch.is_grad_enabled():
            return affine.dequantize(*self.quantized).to(dtype)[rows]
        size = max(1, size_for(scale.device, CHUNK_NUMBERS) // self.in_features)
        packed = self.weight_packed[rows]
        weight = torch.empty(len(packed), self.in_features, dtype=dtype, device=scale.device)
        parts = (tensor.split(size) for tensor in (weight, packed, scale, zero_point))
        for part, words, row_scale, row_zero_point in zip(*parts, strict=True):
            codes = affine.grouped(unpack(words, self.spec.num_bits, self.in_features), self.spec).float()
            codes.sub_(row_zero_point.unsqueeze(-1)).mul_(row_scale.unsqueeze(-1))  # affine.dequantize, in place
            part.copy_(codes.flatten(1))
        return weight

    def accelerate(self, experts: int = 1) -> str:
        """Prepare a kernel for inputs of few rows; return the reason if there is none, else an empty string.

        The kernel holds a second copy of the weight in its own layout; the state dict does not change. Each of
        ``experts`` whose weights are stacked gets a kernel of its own.
        """
        self.kernels = ()
        codes, scale, zero_point, spec = self.quantized
        parts = zip(codes.chunk(experts), scale.chunk(experts), zero_point.chunk(experts), strict=True)
        found = []
        for part in parts:
            kernel, reason = kernels.prepare(QuantizedWeight(*part, spec))
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model, but keep the grid in its stored dtype: ``model.half()`` must not change a weight."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype and name != "weight":
                setattr(self, name, buffer.to(moved.device))
        if self.weight_scale.device != before["weight_scale"].device:
            self._renew()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}weight"] = self.weight.to(torch.uint8)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._renew()

    def _renew(self) -> None:
        """Make the kernel again, after its buffers have changed or moved."""
        experts, self.kernels = len(self.kernels), ()
        if experts and self.weight_scale.device.type != "meta":
            self.accelerate(experts)

    def extra_repr(self) -> str:
        """Return shape and grid, for ``print(model)``."""
        rounded = "".join(f", {key}={getattr(self.spec, key)}" for key in ACTIVATION_KEYS if getattr(self.spec, key))
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec.label()}{rounded}"
