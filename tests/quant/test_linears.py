"""Trained and packed linears: gradients are the closed forms; freezing, loading and casting change no bit."""

import copy

import pytest
import torch
from helpers.weights import Case, cases, gradient, make_weight, per_weight, rounded_to_nearest, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.config.quant import BITS, SCALE_BITS, QuantSpec
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.trained_linear import QuantLinear

# --------------------------------------------------------------------------------------------------- gradients


def clipping_layer(spec: QuantSpec, seed: int = 0) -> QuantLinear:
    """Return a layer whose range is too small and whose zero points are no integers."""
    layer = QuantLinear(make_weight(3, 32, "normal", 0.1, seed), torch.zeros(3), spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.scale.mul_(0.4 + 0.3 * torch.rand(layer.scale.shape, generator=generator))
        if not spec.symmetric:
            layer.zero_point.add_(torch.rand(layer.scale.shape, generator=generator) - 0.5)
    return layer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", sorted(SCALE_BITS))
def test_gradients_are_the_closed_forms(bits: int, symmetric: bool, scale_dtype: str) -> None:
    """Scale: LSQ's gradient. Weight: one inside the grid. Zero point: ``-s`` outside the grid."""
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=symmetric, scale_dtype=scale_dtype)
    layer = clipping_layer(spec)
    upstream = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    layer.quantized_weight().backward(upstream)
    scale, zero_point = (part.detach() for part in layer.qparams())
    s, z = per_weight(scale, 32), per_weight(zero_point, 32)
    u = layer.weight.detach().double() / s + z
    low, high = u.round() < 0, u.round() > spec.qmax
    inside = ~(low | high)
    assert bool(low.any())
    assert bool(high.any())
    g = upstream.double()
    by_scale = g * torch.where(inside, u.round() - u, torch.where(low, -z, spec.qmax - z))

    def summed(values: Tensor) -> Tensor:
        return affine.grouped(values, spec).sum(-1).float()

    assert torch.allclose(gradient(layer.weight), upstream * inside, rtol=1e-6, atol=0)  # g * s / s in float32
    assert torch.allclose(gradient(layer.scale), summed(by_scale), rtol=1e-4, atol=1e-3)
    if symmetric:
        assert layer.zero_point.grad is None
    else:
        assert torch.allclose(gradient(layer.zero_point), summed(g * ~inside * -s), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_trainable_parameter_moves(symmetric: bool) -> None:
    layer = clipping_layer(QuantSpec(num_bits=3, group_size=8, symmetric=symmetric))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    trainable = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trainable == ["weight", "scale"] + ([] if symmetric else ["zero_point"])
    layer(torch.randn(5, 32, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
    for name, p in layer.named_parameters():
        share = float((p.detach() != before[name]).float().mean())
        assert (share > 0.5) if name in trainable else (share == 0), (name, share)


# ------------------------------------------------------------------------------------------------------ layers


def trained_layer(case: Case, seed: int = 0) -> QuantLinear:
    """Return a layer as after training: no scale or zero point has a value that can be stored, some are far off."""
    weight, spec = case
    layer = QuantLinear(weight, torch.linspace(-1, 1, weight.shape[0]), spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
        layer.scale.mul_(1 - torch.randn(layer.scale.shape, generator=generator))  # some below zero
        if not spec.symmetric:
            layer.zero_point.add_(4 * torch.randn(layer.scale.shape, generator=generator))
    return layer


@given(cases(-3, 2), st.sampled_from([torch.float32, torch.bfloat16]))
def test_freeze_changes_no_bit(case: Case, dtype: torch.dtype) -> None:
    layer = trained_layer(case)
    assert layer.bias is not None
    layer.bias.data = layer.bias.data.to(dtype)
    frozen = layer.freeze()
    assert isinstance(frozen, PackedLinear)
    assert torch.equal(frozen.dequantized(), layer.quantized_weight())
    x = torch.randn(2, 3, case.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    out = frozen(x)
    assert out.dtype == dtype
    assert torch.equal(out, layer(x))


def test_a_layer_starts_at_round_to_nearest() -> None:
    weight = make_weight(4, 32, "normal", 0.1, 0)
    for spec in (QuantSpec(num_bits=3, group_size=8, symmetric=symmetric) for symmetric in (True, False)):
        expected = rounded_to_nearest(weight, spec)
        assert same(QuantLinear(weight, None, spec).freeze().quantized, expected)


@given(cases(-3, 2))
def test_packed_layers_keep_the_funnel(case: Case) -> None:
    quantized = rounded_to_nearest(*case)
    layer = PackedLinear.from_quantized(quantized, None)
    assert layer.quantized.spec == case.spec
    for name in ("codes", "scale", "zero_point"):
        found, expected = getattr(layer.quantized, name), getattr(quantized, name)
        assert torch.equal(found, expected), name
        assert found.dtype == expected.dtype, name


@given(cases(-3, 2))
def test_a_packed_layer_survives_a_change_of_precision(case: Case) -> None:
    """``model.half()`` and similar calls cast biases and must not cast a stored scale."""
    layer = PackedLinear.from_quantized(rounded_to_nearest(*case), torch.ones(case.weight.shape[0]))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    model = nn.Sequential(layer)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        for name, buffer in layer.named_buffers():
            assert buffer.dtype == (dtype if name == "weight" else before[name].dtype), name
            assert torch.equal(buffer.to(before[name].dtype), before[name]), name
    model.half()
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    assert layer(torch.ones(1, case.weight.shape[1], dtype=torch.float16)).dtype == torch.float16


@given(cases(-3, 2), st.booleans())
def test_a_packed_layer_survives_its_state_dict(case: Case, has_bias: bool) -> None:
    rows, columns = case.weight.shape
    layer = PackedLinear.from_quantized(rounded_to_nearest(*case), torch.randn(rows) if has_bias else None)
    fresh = PackedLinear(columns, rows, case.spec, torch.float32 if has_bias else None)
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = torch.randn(3, columns)
    assert torch.equal(fresh(x), layer(x))
    assert fresh.weight_shape.tolist() == [rows, columns]


def test_a_packed_layer_refuses_what_it_cannot_hold() -> None:
    spec = QuantSpec(num_bits=4, group_size=-1)
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    middle = torch.full((2, 1), float(spec.middle))
    with pytest.raises(AssertionError, match="a scale that its stored dtype does not hold"):
        PackedLinear.from_quantized(QuantizedWeight(codes, torch.full((2, 1), 0.1), middle, spec), None)
    with pytest.raises(AssertionError, match="a zero point off the middle"):
        PackedLinear.from_quantized(QuantizedWeight(codes, torch.ones(2, 1), middle - 1, spec), None)
