"""Packed matrix products: every backend in one table, ``BACKENDS``.

The exact path expands a weight and multiplies; a backend multiplies by the codes, which is faster for the few rows of
decoding. All backends compute in bfloat16 with float32 sums. ``int8`` is torch's int8 matmul, for 8 bits with one scale
for each row; ``gemlite`` is the library of that name. All others use torch's int4 matmul, whose weight is

    w = (k - 8) * s + m        k in 0 .. 15; s and m bfloat16, for each row and group of 32, 64, 128 or 256 channels.

* 4 bits: ``k`` is the code and ``m = (8 - zero_point) * s``, which is 0 on a symmetric grid.
* 2 and 3 bits: ``code - zero_point`` lies in ``-7 .. 7``, so ``k = code - zero_point + 8`` and ``m = 0``; for a zero
  point between two codes, ``k`` is computed with the nearer one, and ``m`` makes up for the difference.
* 8 bits: each row becomes two, whose products are added: ``k`` is the upper half of a code with scale ``16 s``, and its
  lower half with scale ``s``.

So codes are exact; scales that are not stored in bfloat16 are rounded to bfloat16, and so is ``m`` if it is not 0. Each
output is within ``TOLERANCE * sum_j |x_j| s (|code - zero_point| + |middle - zero_point| + 2**(num_bits - 4))`` of the
exact one: eight roundings of half a bfloat16 step. Each backend is tested for that when a shape is first prepared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight

TOLERANCE = 2.0**-6  # largest error of an output, in the unit that the formula above defines
GROUPS = (256, 128, 64, 32)  # group sizes of torch's int4 matmul and of gemlite
PROBE_ROWS = 8  # rows of the input that a kernel is tried on
PROBED_NUMBERS = 1 << 24  # number of weights that are expanded at once for a test
PROBE_CHANNELS = 4  # nonzero channels of such a row, on average: few, so that the tolerance is tight


# fault of a backend by grid, shape and device; "" if it passed its test
_found: dict[tuple[Any, ...], str] = {}


class Backend(NamedTuple):
    """A way to multiply by packed codes. ``prepare`` makes the state of a weight, whatever the model's dtype."""

    name: str
    device: str  # type of the device that the backend runs on
    serves: str  # the grids that it takes, in words
    sample: QuantSpec  # a grid that it takes, to try it on
    max_rows: int  # most rows of x; for more of them, expanding the weight and multiplying is faster
    missing: Callable[[], str | None]  # reason why this machine cannot run the backend
    refuses: Callable[[QuantSpec, int, int], str | None]  # reason why it cannot hold a weight [out, in] on this grid
    prepare: Callable[[QuantizedWeight], tuple[Any, ...]]
    matmul: Callable[..., Tensor]  # x [rows, in] bfloat16 and the state -> [rows, out]


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
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        y = self.backend.matmul(rows, *self.state)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    @property
    def num_bytes(self) -> int:
        """Memory that the backend's layout takes."""
        modules = [part for part in self.state if isinstance(part, torch.nn.Module)]
        tensors = [part for part in self.state if isinstance(part, Tensor)]
        return sum(t.nbytes for t in [*tensors, *(p for module in modules for p in module.parameters())])


@torch.no_grad()
def prepare(weight: QuantizedWeight) -> tuple[Kernel | None, str]:
    """Return a kernel of the first backend that takes ``weight`` and passes its test, or ``None`` and the reasons."""
    if weight.spec.blocks is not None:
        return None, f"no kernel multiplies by codes of {weight.spec.grid}; llama.cpp does, from a GGUF export"
    reasons = []
    for backend in BACKENDS:
        if backend.device != weight.codes.device.type:
            continue
        reason = backend.refuses(weight.spec, *weight.codes.shape) or backend.missing()
        if reason is None:
            kernel, reason = _attempt(backend, weight)
            if kernel is not None:
                return kernel, ""
        reasons.append(f"{backend.name}: {reason}")
    return None, "; ".join(reasons) or f"there is no kernel for devices of type {weight.codes.device.type}"


def _attempt(backend: Backend, weight: QuantizedWeight) -> tuple[Kernel | None, str]:
    """Return a kernel of ``backend``, or its fault; the first weight of each shape is multiplied and compared."""
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


def tolerance(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return the largest allowed error of each output ``[rows, out]``, for ``x [rows, in]``."""
    codes, scale, zero_point, spec = weight
    offset = (spec.middle - zero_point).abs() + 2.0 ** (spec.num_bits - 4)
    steps = (affine.grouped(codes, spec).float() - zero_point.unsqueeze(-1)).abs() + offset.unsqueeze(-1)
    return TOLERANCE * x.abs().float() @ (steps * scale.unsqueeze(-1)).flatten(1).T


def wrong(kernel: Kernel, weight: QuantizedWeight) -> str:
    """Compare with the exact product on sparse random rows, together and one alone; return the fault, or ``""``."""
    out_features, in_features = weight.codes.shape
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(PROBE_ROWS, in_features, generator=generator) * in_features < PROBE_CHANNELS
    x = (torch.randn(PROBE_ROWS, in_features, generator=generator) * kept).to(weight.codes.device)
    y, tiny = torch.cat([kernel(x[:1]), kernel(x)[1:]]), torch.finfo(torch.float32).tiny
    parts = (tensor.split(max(1, PROBED_NUMBERS // in_features)) for tensor in (*weight[:3], y.T))
    shares = []
    for codes, scale, zero_point, found in zip(*parts, strict=True):  # a head has too many rows to expand them at once
        part = QuantizedWeight(codes, scale, zero_point, weight.spec)
        error = (found.T - x @ affine.dequantize(*part).T).abs()
        shares.append((error / tolerance(x, part).clamp(min=tiny)).max())
    share = torch.stack(shares).max().item()  # not a number if one of them is not
    return "" if share <= 1 else f"off by {share:.3g} times its tolerance on a weight {out_features} x {in_features}"


def examine() -> list[dict[str, Any]]:
    """Try each backend on a small weight: its name, device, grids, and the reason if this machine cannot run it."""
    return [
        {
            "name": backend.name,
            "device": backend.device,
            "serves": backend.serves,
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
    codes, scale, zero_point = (tensor.to(backend.device) for tensor in (codes, scale, zero_point))
    return _attempt(backend, QuantizedWeight(codes, scale, zero_point, spec))[1]


def _device_missing(device: str) -> str | None:
    return "no GPU" if device == "cuda" and not torch.cuda.is_available() else None


# torch's int4 matmul -------------------------------------------------------------------------------------------------


def _group(spec: QuantSpec, in_features: int) -> int | None:
    """Return the largest group of the int4 matmul that divides every group of ``spec``; ``None`` if there is none."""
    size = in_features if spec.group_size == -1 else spec.group_size
    return next((group for group in GROUPS if size % group == 0), None)


def _int4_refuses(bits: tuple[int, ...], rows: int, channels: int, spec: QuantSpec, out: int, in_: int) -> str | None:
    if spec.num_bits not in bits:
        return f"no kernel for {spec.num_bits} bits"
    if _group(spec, in_) is None:
        size = in_ if spec.group_size == -1 else spec.group_size
        return f"groups of {size} channels are not a multiple of 32"
    if out % rows or in_ % channels:
        return f"a weight of {out} x {in_} is not a multiple of {rows} x {channels}"
    return None


def _int4_grid(weight: QuantizedWeight) -> tuple[Tensor, Tensor, int]:
    """Return codes ``k`` ``[out, in]`` uint8, the pairs ``s, m`` ``[groups, out, 2]`` bfloat16, and the group size."""
    codes, scale, zero_point, spec = weight
    group = _group(spec, codes.shape[1])
    assert group is not None
    s = scale.bfloat16().float()
    if spec.num_bits < 4:
        nearest = zero_point.round().clamp(spec.qmin, spec.qmax)
        codes = (affine.grouped(codes, spec) + (8 - nearest).to(torch.uint8).unsqueeze(-1)).flatten(1)
        m = (nearest - zero_point) * s
    elif spec.num_bits == 4:
        m = (8 - zero_point) * s
    else:
        codes = torch.cat([codes >> 4, codes & 15])
        upper, lower = (spec.middle - zero_point).div(16, rounding_mode="floor"), (-zero_point).remainder(16)
        s, m = torch.cat([16 * s, s]), torch.cat([16 * upper * s, (8 + lower) * s])
    repeats = codes.shape[1] // group // s.shape[1]
    grid = torch.stack([s, m], -1).repeat_interleave(repeats, 1).transpose(0, 1)
    return codes, grid.contiguous().bfloat16(), group


def _prepare_int4_cpu(weight: QuantizedWeight) -> tuple[Any, ...]:
    codes, grid, group = _int4_grid(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)  # 1: tiles matter on a GPU only
    return packed, group, grid


def _prepare_int4_cuda(weight: QuantizedWeight) -> tuple[Any, ...]:
    codes, grid, group = _int4_grid(weight)
    tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), tiles)
    return packed, group, grid


def _int4_cpu(x: Tensor, packed: Tensor, group: int, grid: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, grid)
    return y


def _int4_cuda(x: Tensor, packed: Tensor, group: int, grid: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, group, grid)
    return y


def _halves(product: Callable[..., Tensor], x: Tensor, *state: Any) -> Tensor:
    upper, lower = product(x, *state).chunk(2, dim=-1)
    return upper + lower


def _op_missing(op: str) -> str | None:
    return None if hasattr(torch.ops.aten, op) else f"torch {torch.__version__} has no {op}"


def _int4_cuda_missing() -> str | None:
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    return _op_missing("_weight_int4pack_mm")


# torch's int8 matmul, one scale for each row -------------------------------------------------------------------------


def _int8_refuses(spec: QuantSpec, out: int, in_: int) -> str | None:
    if spec.num_bits != 8:
        return f"no kernel for {spec.num_bits} bits"
    return None if spec.num_groups(in_) == 1 else "no kernel for groups, only one scale per row"


def _prepare_int8_cpu(weight: QuantizedWeight) -> tuple[Any, ...]:
    codes, scale, zero_point, spec = weight
    signed = (codes ^ 128).view(torch.int8)  # code - 128
    offset = None if spec.symmetric else ((spec.middle - zero_point) * scale).flatten()
    return signed, scale.flatten().bfloat16(), offset


def _int8_cpu(x: Tensor, signed: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int8pack_mm(x, signed, scale)
    return y if offset is None else torch.addcmul(y.float(), x.float().sum(-1, keepdim=True), offset)


# gemlite -------------------------------------------------------------------------------------------------------------


def _gemlite_refuses(spec: QuantSpec, out: int, in_: int) -> str | None:
    if spec.num_bits == 3:
        return "no kernel for 3 bits"
    if spec.group_size != -1 and spec.group_size not in GROUPS:
        return f"no kernel for groups of {spec.group_size} channels"
    return f"a weight of {out} x {in_} is not a multiple of 128 x 128" if out % 128 or in_ % 128 else None


def _gemlite_missing() -> str | None:
    return None if find_spec("gemlite") else "gemlite is not installed"


def _prepare_gemlite(weight: QuantizedWeight) -> tuple[Any, ...]:
    from gemlite import DType, GemLiteLinear

    codes, scale, zero_point, spec = weight
    out_features, in_features = codes.shape
    group = in_features if spec.group_size == -1 else spec.group_size
    linear = GemLiteLinear(
        spec.num_bits,
        group_size=group,
        in_features=in_features,
        out_features=out_features,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    # fma_mode would compute codes * scale + offset, with the offset rounded to bfloat16
    linear.pack(codes, scale.bfloat16(), zero_point.bfloat16(), bias=None, fma_mode=False)
    return (linear,)


def _gemlite(x: Tensor, linear: Any) -> Tensor:
    y: Tensor = linear(x)
    return y


# the table, in order of preference -----------------------------------------------------------------------------------

_W4, _W8 = QuantSpec(num_bits=4, group_size=128), QuantSpec(num_bits=8, group_size=128)
_SMALL, _PAIRS = "2, 3 and 4 bits", "8 bits in groups, as two int4 halves"

BACKENDS = (
    Backend(
        name="int4",
        device="cpu",
        serves=_SMALL,
        sample=_W4,
        max_rows=48,
        missing=partial(_op_missing, "_weight_int4pack_mm_for_cpu"),
        refuses=partial(_int4_refuses, (2, 3, 4), 16, 32),
        prepare=_prepare_int4_cpu,
        matmul=_int4_cpu,
    ),
    Backend(
        name="int8",
        device="cpu",
        serves="8 bits, one group per row",
        sample=QuantSpec(num_bits=8, group_size=-1),
        max_rows=48,
        missing=partial(_op_missing, "_weight_int8pack_mm"),
        refuses=_int8_refuses,
        prepare=_prepare_int8_cpu,
        matmul=_int8_cpu,
    ),
    Backend(
        name="int4 pairs",
        device="cpu",
        serves=_PAIRS,
        sample=_W8,
        max_rows=24,
        missing=partial(_op_missing, "_weight_int4pack_mm_for_cpu"),
        refuses=partial(_int4_refuses, (8,), 16, 32),
        prepare=_prepare_int4_cpu,
        matmul=partial(_halves, _int4_cpu),
    ),
    Backend(
        name="gemlite",
        device="cuda",
        serves="2, 4 and 8 bits",
        sample=_W4,
        max_rows=64,
        missing=_gemlite_missing,
        refuses=_gemlite_refuses,
        prepare=_prepare_gemlite,
        matmul=_gemlite,
    ),
    Backend(
        name="int4",
        device="cuda",
        serves=_SMALL,
        sample=_W4,
        max_rows=64,
        missing=_int4_cuda_missing,
        refuses=partial(_int4_refuses, (2, 3, 4), 8, 32),
        prepare=_prepare_int4_cuda,
        matmul=_int4_cuda,
    ),
    Backend(
        name="int4 pairs",
        device="cuda",
        serves=_PAIRS,
        sample=_W8,
        max_rows=32,
        missing=_int4_cuda_missing,
        refuses=partial(_int4_refuses, (8,), 8, 32),
        prepare=_prepare_int4_cuda,
        matmul=partial(_halves, _int4_cuda),
    ),
)
