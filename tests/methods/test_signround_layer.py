"""The layer that SignRound trains: its gradients in closed form, and what becomes of its state."""

from typing import Any

import pytest
import torch
from helpers.rounding_layers import random_layer
from helpers.weights import gradient
from hypothesis import given
from hypothesis import strategies as st

from qtool.config.quant import BITS, QuantSpec
from qtool.methods.signround import SignRoundLinear
from qtool.quant.affine import minmax_qparams
from qtool.quant.ranges import search_qparams


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_gradients_are_the_closed_forms(bits: int, symmetric: bool, scale_dtype: Any) -> None:
    """With ``G`` the gradient of the weight ``(q - z) s``, ``r = w / s`` and rounding passed straight through."""
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=symmetric, scale_dtype=scale_dtype)
    layer = random_layer(spec)
    upstream = torch.randn(6, 32, generator=torch.Generator().manual_seed(9))
    (layer.quantized_weight() * upstream).sum().backward()

    qmax, g = spec.qmax, upstream.view(6, 2, 16)
    codes, scale, zero = (part.view(6, 2, -1) for part in layer.quantized[:3])
    ratio = layer.weight.view(6, 2, 16) / scale
    grid = ratio + zero + layer.offset.detach()
    inside = (grid.round() >= 0) & (grid.round() <= qmax)
    assert bool(inside.any())
    assert bool((~inside).any())
    by_scale = (g * (codes.float() - zero - inside * ratio)).sum(-1)
    by_zero = (g * ~inside * -scale).sum(-1)
    s0, z0, s = layer.scale, layer.zero_point, scale.squeeze(-1)
    if symmetric:
        expected = (by_scale * s0).unsqueeze(0)
    else:
        below, above = s0 * z0 / qmax, s0 * (qmax - z0) / qmax  # ds / dfactor
        unrounded = layer.factors[0].detach() * z0 * s0 / s
        ends = (z0 * s0 / s - unrounded / s * below, -unrounded / s * above)  # dz / dfactor
        expected = torch.stack([by_scale * below + by_zero * ends[0], by_scale * above + by_zero * ends[1]])
    assert torch.allclose(gradient(layer.offset), g * inside * scale, rtol=1e-4, atol=1e-7)
    assert torch.allclose(gradient(layer.factors), expected, rtol=1e-3, atol=1e-5)


@given(
    st.sampled_from(BITS),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(0, 999),
)
def test_freezing_changes_no_bit(bits: int, symmetric: bool, float_zero: bool, scale_dtype: Any, seed: int) -> None:
    spec = QuantSpec(
        num_bits=bits,
        group_size=16,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        float_zero=float_zero and not symmetric,
    )
    layer = random_layer(spec, seed)
    layer.expanded = layer.quantized_weight().detach()
    packed = layer.freeze()
    assert torch.equal(packed.dequantized(), layer.expanded)
    assert torch.equal(packed.weight_scale.sign(), layer.scale.sign())
    x = torch.randn(3, 32)
    assert torch.equal(packed(x), layer(x))


@given(st.sampled_from(BITS), st.booleans(), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 99))
def test_factors_of_one_and_offsets_of_zero_change_no_bit(
    bits: int, symmetric: bool, scale_dtype: Any, seed: int
) -> None:
    spec = QuantSpec(num_bits=bits, group_size=8, symmetric=symmetric, scale_dtype=scale_dtype)
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    for grid in (minmax_qparams(weight, spec), search_qparams(weight, spec)):
        found = SignRoundLinear(weight, None, spec, grid).quantized
        assert torch.equal(found.scale, grid[0])
        assert torch.equal(found.zero_point, grid[1])
