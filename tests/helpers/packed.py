"""Random quantized weights of any bits, symmetry and groups, for tests of packed layouts."""

from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.quant import BITS, QuantSpec
from qtool.quant.affine import QuantizedWeight, dequantize


class Weight(NamedTuple):
    """A quantized weight that a layout must hold, and its dequantized float32 ``[out, in]``."""

    quantized: QuantizedWeight
    dense: Tensor


@st.composite
def weights(draw: st.DrawFn, groups: tuple[int, ...] = (-1, 32, 64, 96, 128, 256)) -> Weight:
    """Draw codes and zero points, the extremes included, and scales that are float16 numbers of a usual size.

    Where scales may be negative, about half of them are, the first one always.
    """
    symmetric = draw(st.booleans())
    spec = QuantSpec(
        num_bits=draw(st.sampled_from(BITS)),
        group_size=draw(st.sampled_from(groups)),
        symmetric=symmetric,
        negative_scales=symmetric and draw(st.booleans()),
    )
    columns = draw(st.sampled_from([32, 96, 256, 512])) if spec.group_size == -1 else spec.group_size
    columns *= 1 if spec.group_size == -1 else draw(st.integers(1, 3))
    rows = draw(st.sampled_from([32, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    shape = (rows, spec.num_groups(columns))
    codes = torch.randint(spec.qmax + 1, (rows, columns), generator=generator).to(torch.uint8)
    codes[0, 0], codes[-1, -1] = 0, spec.qmax
    scale = (torch.rand(shape, generator=generator) + 0.01) * 10.0 ** draw(st.integers(-4, 1))
    if spec.signed:
        scale *= torch.randint(2, shape, generator=generator) * 2 - 1
        scale[0, 0] = -scale[0, 0].abs()
    zero_point = torch.full(shape, float(spec.middle))
    if not spec.symmetric:
        zero_point = torch.randint(spec.qmax + 1, shape, generator=generator).float()
        zero_point[0, 0], zero_point[-1, -1] = 0, spec.qmax
    quantized = QuantizedWeight(codes, scale.half().float(), zero_point, spec)
    return Weight(quantized, dequantize(*quantized))


WEIGHTS = given(weight=weights())
