"""Random weights of every kind and size on every grid, for tests of laws that hold for all."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.quant import BITS, SCALE_BITS, QuantSpec
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight

KINDS = ("normal", "positive", "negative", "constant", "one zero row", "all zero", "outlier", "half steps")


class Case(NamedTuple):
    """A grid, and a weight ``[out, in]`` to put on it."""

    weight: Tensor
    spec: QuantSpec


specs = st.builds(
    QuantSpec,
    num_bits=st.sampled_from(BITS),
    group_size=st.sampled_from([-1, 1, 2, 3, 8, 16, 32]),
    symmetric=st.booleans(),
    negative_scales=st.sampled_from([None, False]),
    scale_dtype=st.sampled_from(sorted(SCALE_BITS)),
)


def make_weight(rows: int, columns: int, kind: str, magnitude: float, seed: int) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "positive":
        weight = weight.abs() + 0.1
    elif kind == "negative":
        weight = -weight.abs() - 0.1
    elif kind == "constant":
        weight = weight[:, :1].expand(rows, columns)
    elif kind == "one zero row":
        weight[0] = 0
    elif kind == "all zero":
        weight = torch.zeros_like(weight)
    elif kind == "outlier":
        weight[-1, -1] = 20
    elif kind == "half steps":
        weight = weight.mul(4).round() / 4
    return (weight * magnitude).float()


@st.composite
def cases(draw: st.DrawFn, low: int = -45, high: int = 36) -> Case:
    """Draw a grid and a weight that it can hold; ``low`` and ``high`` bound the exponent of the weight's magnitude."""
    spec = draw(specs)
    columns = draw(st.integers(1, 40)) if spec.group_size == -1 else spec.group_size * draw(st.integers(1, 4))
    if spec.scale_dtype == "float16":
        high = min(high, 2)
    magnitude = draw(st.one_of(st.just(1.0), st.integers(low, high).map(lambda power: 10.0**power)))
    weight = make_weight(
        draw(st.integers(1, 6)), columns, draw(st.sampled_from(KINDS)), magnitude, draw(st.integers(0, 999))
    )
    return Case(weight, spec)


def rounded_to_nearest(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    scale, zero_point = affine.minmax_qparams(weight, spec)
    return QuantizedWeight(affine.quantize(weight, scale, zero_point, spec), scale, zero_point, spec)


def same(found: QuantizedWeight, expected: QuantizedWeight) -> bool:
    """True if both have the same grid, codes, scales and zero points."""
    parts = zip(found[:3], expected[:3], strict=True)
    return found.spec == expected.spec and all(torch.equal(one, other) for one, other in parts)


def gradient(of: Tensor) -> Tensor:
    """Return the gradient of a tensor that must have one."""
    assert of.grad is not None
    return of.grad


def per_weight(values: Tensor, columns: int) -> Tensor:
    """Expand ``[out, groups]`` to float64 ``[out, in]``."""
    return values.double().repeat_interleave(columns // values.shape[1], dim=1)


def random_weight(spec: QuantSpec, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """Return random codes, random zero points that the grid allows, and scales of several magnitudes and signs."""
    generator = torch.Generator().manual_seed(seed)
    groups = spec.num_groups(columns)
    codes = torch.randint(0, spec.qmax + 1, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = 0.01 * torch.randn(rows, groups, generator=generator).exp()
    if spec.signed:
        scale *= torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1
    scale = affine.stored_scale(scale, spec)
    zero_point = torch.full((rows, groups), float(spec.middle))
    if not spec.symmetric:
        zero_point = torch.randint(0, spec.qmax + 1, (rows, groups), generator=generator).float()
    return QuantizedWeight(codes, scale, zero_point, spec)


def w(num_bits: int, group_size: int = 64, symmetric: bool = True, scale_dtype: str = "float16") -> QuantSpec:
    return QuantSpec.model_validate(
        {"num_bits": num_bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
    )
