"""Packed matrix products: every backend in one table, ``BACKENDS``.

The exact path expands a weight and multiplies; a backend multiplies by the codes, or by a weight that was expanded
once, which is faster for the few rows of decoding. The file of each library says what its product holds and how near
it is to the exact one: ``torch_kernels.py``, ``ort_kernel.py``, ``gemlite_kernel.py``. Each backend is tested for that
when a shape is first prepared. ``kernel_timing.py`` finds the fastest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qtool.config.quant import QuantSpec
from qtool.quant import affine, gemlite_kernel, ort_kernel, torch_kernels
from qtool.quant.affine import QuantizedWeight

PROBE_ROWS = 8  # rows of the input that a kernel is tried on
PROBED_NUMBERS = 1 << 24  # number of weights that are expanded at once for a test
PROBE_CHANNELS = 4  # nonzero channels of such a row, on average: few, so that the tolerance is tight
ALL_CHANNELS = 1 << 62
ALL_ROWS = 1 << 62
DENSE = "dense"  # the library of backends that hold the expanded weight


# fault of a backend by grid, shape and device; "" if it passed its test
_found: dict[tuple[Any, ...], str] = {}


class Backend(NamedTuple):
    """A way to multiply by packed codes. ``prepare`` makes the state of a weight, whatever the model's dtype."""

    name: str
    library: str  # what a user calls to use it: ``use_backend(model, library)``
    device: str  # type of the device that the backend runs on; "" is any
    serves: str  # the grids that it takes, in words
    error: str  # how far its product is from the exact one, in words
    sample: QuantSpec  # a grid that it takes, to try it on
    max_rows: int  # most rows of x; for more of them, expanding the weight and multiplying is faster
    missing: Callable[[], str | None]  # reason why this machine cannot run the backend
    refuses: Callable[[QuantSpec, int, int], str | None]  # reason why it cannot hold a weight [out, in] on this grid
    prepare: Callable[[QuantizedWeight], tuple[Any, ...]]
    matmul: Callable[..., Tensor]  # x [rows, in] of ``dtype`` and the state -> [rows, out]
    dtype: torch.dtype = torch.bfloat16
    tolerance: Callable[[Tensor, QuantizedWeight], Tensor] = torch_kernels.tolerance  # x, weight -> [rows, out]
    probe_channels: int = PROBE_CHANNELS  # nonzero channels of the rows that it is tested with, on average
    of_experts: bool = True  # whether each of the stacked experts of a layer gets a kernel of its own

    def runs_on(self, device: torch.device) -> bool:
        """Return whether the backend is one of devices of this type."""
        return self.device in ("", device.type)


@dataclass(frozen=True)
class Kernel:
    """A backend with one weight in the backend's own layout, held beside the packed codes."""

    backend: Backend
    state: tuple[Any, ...]

    def takes(self, x: Tensor) -> bool:
        """Return whether ``x`` has few enough rows for this kernel and needs no gradient."""
        return 0 < x.numel() <= self.backend.max_rows * x.shape[-1] and not (
            x.requires_grad and torch.is_grad_enabled()
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1]).to(self.backend.dtype).contiguous()
        y = self.backend.matmul(rows, *self.state)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    @property
    def num_bytes(self) -> int:
        """Memory that the backend's layout takes."""
        modules = [part for part in self.state if isinstance(part, torch.nn.Module)]
        parts = [*self.state, *(parameter for module in modules for parameter in module.parameters())]
        return sum(getattr(part, "nbytes", 0) for part in parts)


def of_library(*names: str) -> list[Backend]:
    """Return the backends of these libraries, in order of preference."""
    return [backend for backend in BACKENDS if backend.library in names]


def missing(library: str) -> str | None:
    """Return the reason why this machine cannot run any kernel of ``library``; ``None`` if it can, or it has none."""
    reasons = [_device_missing(backend.device) or backend.missing() for backend in of_library(library)]
    return reasons[0] if reasons and all(reasons) else None


@torch.no_grad()
def prepare(weight: QuantizedWeight, among: Sequence[Backend] | None = None) -> tuple[Kernel | None, str]:
    """Return a kernel of the first backend that takes ``weight`` and passes its test, or ``None`` and the reasons.

    ``among`` are the backends to try, in this order; ``None``: those that compute in bfloat16 with packed codes.
    """
    reasons = []
    for backend in of_library("torch", "gemlite") if among is None else among:
        if not backend.runs_on(weight.codes.device):
            continue
        kernel, reason = attempt(backend, weight)
        if kernel is not None:
            return kernel, ""
        reasons.append(f"{backend.name}: {reason}")
    return None, "; ".join(reasons) or f"there is no kernel for devices of type {weight.codes.device.type}"


@torch.no_grad()
def attempt(backend: Backend, weight: QuantizedWeight) -> tuple[Kernel | None, str]:
    """Return a kernel of ``backend``, or its fault; the first weight of each shape is multiplied and compared."""
    if reason := unfit(backend, weight.spec, *weight.codes.shape):
        return None, reason
    key = (backend, weight.spec, weight.codes.shape, weight.codes.device)
    kernel = None
    if not _found.get(key):
        try:
            kernel = Kernel(backend, backend.prepare(weight))
            if key not in _found:
                _found[key] = wrong(kernel, weight)
        except Exception as problem:  # a library's own kernel, on a machine that it may not have been made for
            _found[key] = f"failed when it was tried: {type(problem).__name__}: {problem}"
    return (None, _found[key]) if _found[key] else (kernel, "")


def unfit(backend: Backend, spec: QuantSpec, out_features: int, in_features: int) -> str | None:
    """Return the reason why ``backend`` cannot hold a weight of this shape on this machine, or ``None``."""
    if spec.blocks is not None and backend.library != DENSE:
        return f"no kernel multiplies by codes of {spec.grid}; llama.cpp does, from a GGUF export"
    return backend.refuses(spec, out_features, in_features) or backend.missing()


def wrong(kernel: Kernel, weight: QuantizedWeight) -> str:
    """Compare with the exact product on random rows, together and one alone; return the fault, or an empty string."""
    out_features, in_features = weight.codes.shape
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(PROBE_ROWS, in_features, generator=generator) * in_features < kernel.backend.probe_channels
    x = (torch.randn(PROBE_ROWS, in_features, generator=generator) * kept).to(weight.codes.device)
    y, tiny = torch.cat([kernel(x[:1]), kernel(x)[1:]]), torch.finfo(torch.float32).tiny
    parts = (tensor.split(max(1, PROBED_NUMBERS // in_features)) for tensor in (*weight[:3], y.T))
    shares = []
    for codes, scale, zero_point, found in zip(*parts, strict=True):  # a head has too many rows to expand them at once
        part = QuantizedWeight(codes, scale, zero_point, weight.spec)
        error = (found.T - x @ affine.dequantize(*part).T).abs()
        shares.append((error / kernel.backend.tolerance(x, part).clamp(min=tiny)).max())
    share = torch.stack(shares).max().item()  # not a number if one of them is not
    return "" if share <= 1 else f"off by {share:.3g} times its tolerance on a weight {out_features} x {in_features}"


def examine() -> list[dict[str, Any]]:
    """Try each backend on a small weight: its name, device, grids, and the reason if this machine cannot run it."""
    return [
        {
            "name": backend.name,
            "library": backend.library,
            "device": backend.device,
            "serves": backend.serves,
            "error": backend.error,
            "reason": _device_missing(backend.device) or backend.missing() or _tried(backend) or None,
        }
        for backend in BACKENDS
    ]


@torch.no_grad()
def _tried(backend: Backend) -> str:
    spec = backend.sample
    codes = torch.arange(256 * 256, dtype=torch.int32).mul(7).remainder(spec.qmax + 1).view(256, 256).to(torch.uint8)
    scale = torch.linspace(0.5, 1.5, 256 * spec.num_groups(256)).view(256, -1)
    zero_point = torch.full_like(scale, spec.middle)
    codes, scale, zero_point = (tensor.to(backend.device or "cpu") for tensor in (codes, scale, zero_point))
    return attempt(backend, QuantizedWeight(codes, scale, zero_point, spec))[1]


def _device_missing(device: str) -> str | None:
    return "no GPU" if device == "cuda" and not torch.cuda.is_available() else None


# the table, in order of preference -----------------------------------------------------------------------------------

_W4, _W8 = QuantSpec(num_bits=4, group_size=128), QuantSpec(num_bits=8, group_size=128)
_BFLOAT16 = "input and scales rounded to bfloat16, about 0.3 % of a layer's output"
_SMALL, _PAIRS = "2, 3 and 4 bits", "8 bits in groups, as two int4 halves"

BACKENDS = (
    Backend(
        name="int4",
        library="torch",
        device="cpu",
        serves=_SMALL,
        error=_BFLOAT16,
        sample=_W4,
        max_rows=48,
        missing=partial(torch_kernels.op_missing, "_weight_int4pack_mm_for_cpu"),
        refuses=partial(torch_kernels.int4_refuses, (2, 3, 4), 16, 32),
        prepare=torch_kernels.prepare_int4_cpu,
        matmul=torch_kernels.int4_cpu,
    ),
    Backend(
        name="int8",
        library="torch",
        device="cpu",
        serves="8 bits, one group per row",
        error=_BFLOAT16,
        sample=QuantSpec(num_bits=8, group_size=-1),
        max_rows=48,
        missing=partial(torch_kernels.op_missing, "_weight_int8pack_mm"),
        refuses=torch_kernels.int8_refuses,
        prepare=torch_kernels.prepare_int8_cpu,
        matmul=torch_kernels.int8_cpu,
    ),
    Backend(
        name="int4 pairs",
        library="torch",
        device="cpu",
        serves=_PAIRS,
        error=_BFLOAT16,
        sample=_W8,
        max_rows=24,
        missing=partial(torch_kernels.op_missing, "_weight_int4pack_mm_for_cpu"),
        refuses=partial(torch_kernels.int4_refuses, (8,), 16, 32),
        prepare=torch_kernels.prepare_int4_cpu,
        matmul=partial(torch_kernels.halves, torch_kernels.int4_cpu),
    ),
    Backend(
        name="gemlite",
        library="gemlite",
        device="cuda",
        serves="2, 4 and 8 bits",
        error=_BFLOAT16,
        sample=_W4,
        max_rows=64,
        missing=gemlite_kernel.missing,
        refuses=gemlite_kernel.refuses,
        prepare=gemlite_kernel.prepare,
        matmul=gemlite_kernel.matmul,
    ),
    Backend(
        name="int4",
        library="torch",
        device="cuda",
        serves=_SMALL,
        error=_BFLOAT16,
        sample=_W4,
        max_rows=64,
        missing=torch_kernels.int4_cuda_missing,
        refuses=partial(torch_kernels.int4_refuses, (2, 3, 4), 8, 32),
        prepare=torch_kernels.prepare_int4_cuda,
        matmul=torch_kernels.int4_cuda,
    ),
    Backend(
        name="int4 pairs",
        library="torch",
        device="cuda",
        serves=_PAIRS,
        error=_BFLOAT16,
        sample=_W8,
        max_rows=32,
        missing=torch_kernels.int4_cuda_missing,
        refuses=partial(torch_kernels.int4_refuses, (8,), 8, 32),
        prepare=torch_kernels.prepare_int4_cuda,
        matmul=partial(torch_kernels.halves, torch_kernels.int4_cuda),
    ),
    Backend(
        name="ort",
        library="ort",
        device="cpu",
        serves="2, 3, 4 and 8 bits",
        error="not exact: input rounded to 8 bits, about 0.7 % of a layer's output",
        sample=_W4,
        max_rows=48,
        missing=ort_kernel.missing,
        refuses=ort_kernel.refuses,
        prepare=ort_kernel.prepare,
        matmul=ort_kernel.matmul,
        dtype=torch.float32,
        tolerance=ort_kernel.tolerance,
        probe_channels=ALL_CHANNELS,
        of_experts=False,
    ),
    *(
        Backend(
            name=f"dense {name}",
            library=DENSE,
            device="",
            serves="every grid",
            error=error,
            sample=_W4,
            max_rows=ALL_ROWS,
            missing=torch_kernels.always,
            refuses=torch_kernels.always,
            prepare=partial(torch_kernels.expand, dtype),
            matmul=F.linear,
            dtype=dtype,
        )
        for name, dtype, error in (
            ("float32", torch.float32, "the exact weight"),
            ("bfloat16", torch.bfloat16, "the exact weight, rounded to bfloat16"),
        )
    ),
)
