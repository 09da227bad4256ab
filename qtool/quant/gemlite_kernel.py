"""gemlite's product on CUDA: 2, 4 and 8 bits, computed in bfloat16; the bound of torch's products holds for it too."""

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant.affine import QuantizedWeight

GROUPS = (256, 128, 64, 32)  # group sizes that gemlite is given


def refuses(spec: QuantSpec, out: int, in_: int) -> str | None:
    """Return the reason why gemlite cannot hold a weight ``[out, in]`` on this grid, or ``None``."""
    if spec.num_bits == 3:
        return "no kernel for 3 bits"
    if spec.group_size != -1 and spec.group_size not in GROUPS:
        return f"no kernel for groups of {spec.group_size} channels"
    return f"a weight of {out} x {in_} is not a multiple of 128 x 128" if out % 128 or in_ % 128 else None


def missing() -> str | None:
    """Return the reason why gemlite cannot be used, or ``None``."""
    return None if find_spec("gemlite") else "gemlite is not installed: pip install gemlite"


def prepare(weight: QuantizedWeight) -> tuple[Any, ...]:
    """Return gemlite's layer with the weight."""
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


def matmul(x: Tensor, linear: Any) -> Tensor:
    """Map ``x [rows, in]`` bfloat16 to ``[rows, out]``."""
    y: Tensor = linear(x)
    return y
