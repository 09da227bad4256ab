"""Rounding of activations, keys and values: the arithmetic, and that both layers round their inputs and outputs."""

from collections.abc import Sequence

import pytest
import torch
from helpers.weights import gradient
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.config.quant import ActivationGrid, QuantSpec
from qtool.quant.activations import round_symmetric, round_tokens
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.trained_linear import QuantLinear


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ the arithmetic


def test_a_token_is_rounded_between_its_smallest_and_its_largest_value() -> None:
    """Golden, by hand: 2 bits on -1 .. 2 have a step of 1, and half of it goes to the even code."""
    x = torch.tensor([[-1.0, -0.4, 0.4, 2.0], [-1.0, -0.5, 0.5, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 3e-30]])
    expected = [[-1.0, 0.0, 0.0, 2.0], [-1.0, -1.0, 1.0, 2.0], [5.0] * 4, [0.0, 0.0, 0.0, 3e-30]]
    assert round_tokens(x, 2).tolist() == [pytest.approx(row) for row in expected]


def test_heads_have_ranges_of_their_own() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0, 10.0, 22.0, 30.0]])
    assert round_tokens(x, 2, 4).tolist() == [[0, 1, 2, 3, 0, 10, 20, 30]]
    assert round_tokens(x, 2).tolist() == [[0, 0, 0, 0, 0, 10, 20, 30]]


@given(st.integers(2, 8), st.sampled_from([None, 4, 8]), st.sampled_from([1e-3, 1.0, 1e4]), st.integers(0, 999))
def test_error_is_half_a_step_and_the_ends_stay(bits: int, size: int | None, magnitude: float, seed: int) -> None:
    x = magnitude * (randn(3, 2, 16, seed=seed) + 1)
    rounded = round_tokens(x, bits, size)
    groups, found = (t.double().unflatten(-1, (-1, size or 16)) for t in (x, rounded))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    assert bool(((found - groups).abs() <= step * 0.501).all())
    assert torch.allclose(found.amin(-1, keepdim=True), low, rtol=1e-5, atol=0)
    assert torch.allclose(found.amax(-1, keepdim=True), high, rtol=1e-4, atol=1e-5 * magnitude)
    codes = (found - low) / step
    assert bool(((codes - codes.round()).abs() < 1e-3).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_shape_stay_and_are_computed_in_no_less_than_float32(dtype: torch.dtype) -> None:
    x = randn(2, 3, 16).to(dtype)
    rounded = round_tokens(x.transpose(0, 1), 6, 8)  # strides are free
    assert (rounded.dtype, rounded.shape) == (dtype, (3, 2, 16))
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(rounded, round_tokens(x.transpose(0, 1).float(), 6, 8).to(dtype))
    assert torch.equal(rounded[1], round_tokens(x[:, 1], 6, 8))  # tokens are independent


def test_the_gradient_passes_unchanged() -> None:
    """Against autograd of the formula with a constant range: every value lies inside it, so nothing is clamped."""
    x = randn(3, 16).double().requires_grad_()
    upstream = randn(3, 16, seed=1).double()
    (found,) = torch.autograd.grad(round_tokens(x, 4, 8), x, upstream)
    groups = x.unflatten(-1, (-1, 8))
    low, high = groups.detach().aminmax(dim=-1, keepdim=True)
    steps = (groups - low) / ((high - low) / 15)
    straight = steps + (steps.round() - steps).detach()
    (expected,) = torch.autograd.grad((straight * ((high - low) / 15) + low).flatten(-2), x, upstream)
    assert float((found - expected).abs().max()) < 1e-10
    assert torch.equal(found, upstream)


def test_a_symmetric_grid_has_its_largest_code_at_the_largest_value() -> None:
    """Golden, by hand: 3 bits on values up to 3 have codes -3 .. 3 and a step of 1, and halves go to the even code."""
    x = torch.tensor([[3.0, -0.5, 1.5, 0.4], [-3.0, 0.5, 2.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 3e-30, 0.0, 0.0]])
    expected = [[3.0, 0.0, 2.0, 0.0], [-3.0, 0.0, 2.0, 0.0], [0.0] * 4, [0.0, 3e-30, 0.0, 0.0]]
    assert round_symmetric(x, 3).tolist() == [pytest.approx(row) for row in expected]


@given(st.integers(2, 8), st.sampled_from([1e-3, 1.0, 1e4]), st.integers(0, 999), st.integers(-20, 20))
def test_symmetric_codes_and_their_laws(bits: int, magnitude: float, seed: int, power: int) -> None:
    """The error is half a step, 0 and the largest value stay, and signs and powers of two pass through."""
    x = magnitude * randn(3, 2, 16, seed=seed)
    x[..., 3] = 0
    rounded = round_symmetric(x, bits)
    largest = x.double().abs().amax(-1, keepdim=True)
    step = largest / (2 ** (bits - 1) - 1)
    assert bool(((rounded.double() - x.double()).abs() <= step * 0.50001).all())
    codes = rounded.double() / step
    assert bool(((codes - codes.round()).abs() < 1e-4).all())
    assert int(codes.round().abs().amax()) == 2 ** (bits - 1) - 1
    assert torch.allclose(rounded.double().abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=0)
    assert bool((rounded[..., 3] == 0).all())
    assert torch.equal(round_symmetric(-x, bits), -rounded)
    assert torch.equal(round_symmetric(x * 2.0**power, bits), rounded * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_symmetric_grid_keeps_dtype_and_shape_and_passes_gradients(dtype: torch.dtype) -> None:
    x = randn(2, 3, 16).to(dtype).requires_grad_()
    rounded = round_symmetric(x.transpose(0, 1), 6)
    assert (rounded.dtype, rounded.shape) == (dtype, (3, 2, 16))
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(rounded, round_symmetric(x.transpose(0, 1).float(), 6).to(dtype))
    assert torch.equal(rounded[1], round_symmetric(x[:, 1], 6))  # tokens are independent
    upstream = randn(3, 2, 16, seed=1).to(dtype)
    assert torch.equal(torch.autograd.grad(rounded, x, upstream)[0], upstream.transpose(0, 1))


# ---------------------------------------------------------------------------------------------------- the recipe


def test_bits_alone_are_an_asymmetric_grid_and_are_written_that_way() -> None:
    plain = QuantSpec.model_validate({"activations": 8})
    assert plain == QuantSpec(activations=ActivationGrid(num_bits=8))
    assert plain.model_dump()["activations"] == 8
    symmetric = QuantSpec.model_validate({"activations": {"num_bits": 8, "symmetric": True}})
    assert symmetric.model_dump()["activations"] == {"num_bits": 8, "symmetric": True}
    assert QuantSpec(**symmetric.model_dump()) == symmetric != plain
    assert (str(plain.activations), str(symmetric.activations)) == ("8", "8 sym")


# ---------------------------------------------------------------------------------------------------- the layers

LAYER = QuantSpec(
    num_bits=4, group_size=8, symmetric=False, activations=ActivationGrid(num_bits=5), kv_cache=3, kv_group_size=4
)
SYMMETRIC = LAYER.model_copy(update={"activations": ActivationGrid(num_bits=5, symmetric=True)})


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, spec: QuantSpec) -> Tensor:
    """Compute a linear on the grid ``spec`` step by step."""
    if spec.activations is not None:
        x = (round_symmetric if spec.activations.symmetric else round_tokens)(x, spec.activations.num_bits)
    y = nn.functional.linear(x, weight, bias)
    return y if spec.kv_cache is None else round_tokens(y, spec.kv_cache, spec.kv_group_size)


@pytest.mark.parametrize(
    "spec",
    [LAYER, SYMMETRIC, LAYER.model_copy(update={"kv_cache": None}), LAYER.model_copy(update={"activations": None})],
)
def test_both_layers_round_what_they_read_and_give(spec: QuantSpec) -> None:
    weight, bias, x = randn(12, 16), randn(12, seed=1), randn(2, 5, 16, seed=2)
    layer = QuantLinear(weight, bias, spec)
    expected = by_hand(x, layer.quantized_weight(), bias, spec)
    assert not torch.equal(expected, nn.functional.linear(x, layer.quantized_weight(), bias))
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.freeze()(x), expected)
    assert "activations=5" in repr(QuantLinear(weight, bias, LAYER).freeze())


def test_a_subclass_with_a_forward_of_its_own_rounds_too() -> None:
    class Other(QuantLinear):
        def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
            return nn.functional.linear(x, torch.ones(12, 16))

    x = randn(5, 16)
    assert torch.equal(Other(randn(12, 16), None, LAYER)(x), by_hand(x, torch.ones(12, 16), torch.zeros(12), LAYER))


def test_a_kernel_gets_the_rounded_input_and_its_product_is_rounded() -> None:
    grid = ActivationGrid(num_bits=3)
    spec = QuantSpec(num_bits=4, group_size=32, symmetric=False, activations=grid, kv_cache=3, kv_group_size=32)
    layer = QuantLinear(randn(64, 64), None, spec).freeze()
    plain = PackedLinear.from_quantized(layer.quantized._replace(spec=spec.weights_only), None)
    if layer.accelerate():
        pytest.skip("this machine has no kernel")
    plain.accelerate()
    x = randn(1, 64, seed=3)
    assert not torch.equal(plain(x), plain(round_tokens(x, 3)))
    assert torch.equal(layer(x), round_tokens(plain(round_tokens(x, 3)), 3, 32))


@pytest.mark.parametrize("grid", [None, ActivationGrid(num_bits=4), ActivationGrid(num_bits=4, symmetric=True)])
def test_a_compiled_layer_rounds_too(grid: ActivationGrid | None) -> None:
    layer = QuantLinear(randn(12, 16), None, LAYER.model_copy(update={"activations": grid})).freeze()
    x = randn(5, 16)
    compiled = torch.compile(nn.Sequential(layer), backend="eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_reach_weights_through_rounded_inputs(symmetric: bool) -> None:
    grid = ActivationGrid(num_bits=5, symmetric=symmetric)
    spec = LAYER.model_copy(update={"kv_cache": None, "kv_group_size": None, "activations": grid})
    layer, x, upstream = QuantLinear(randn(12, 16), None, spec), randn(5, 16).requires_grad_(), randn(5, 12, seed=1)
    layer(x).backward(upstream)
    weight = layer.quantized_weight()
    rounded = round_symmetric(x, 5) if symmetric else round_tokens(x, 5)
    (expected,) = torch.autograd.grad(weight, layer.weight, upstream.T @ rounded)
    assert torch.allclose(gradient(layer.weight), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradient(x), upstream @ weight, rtol=1e-5, atol=1e-6)
