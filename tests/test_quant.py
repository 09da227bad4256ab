"""Laws of the quantizer core: every width, group, symmetry, scale dtype and shape, against independent arithmetic."""

import copy
import importlib
from contextlib import suppress
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.config import BITS, SCALE_BITS, QuantSpec
from qtool.errors import InputError
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight
from qtool.quant.linear import PackedLinear, QuantLinear
from qtool.quant.packing import num_words, pack, unpack
from qtool.quant.ranges import search_qparams

KINDS = ("normal", "positive", "negative", "constant", "one zero row", "all zero", "outlier", "half steps")


class Case(NamedTuple):
    """A grid, and a weight ``[out, in]`` that it may be given."""

    weight: Tensor
    spec: QuantSpec


specs = st.builds(
    QuantSpec,
    num_bits=st.sampled_from(BITS),
    group_size=st.sampled_from([-1, 1, 2, 3, 8, 16, 32]),
    symmetric=st.booleans(),
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
    """Any grid with any weight that it can hold; ``low`` and ``high`` bound the power of ten of its magnitude."""
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


def per_weight(values: Tensor, columns: int) -> Tensor:
    """``[out, groups]`` as float64 ``[out, in]``."""
    return values.double().repeat_interleave(columns // values.shape[1], dim=1)


def random_codes(rows: int, columns: int, num_bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**num_bits, (rows, columns), dtype=torch.uint8, generator=generator)


# ----------------------------------------------------------------------------------------------------- packing

code_tensors = st.builds(
    lambda bits, rows, columns, seed: (random_codes(rows, columns, bits, seed), bits),
    st.sampled_from(BITS),
    st.integers(1, 5),
    st.integers(1, 100),
    st.integers(0, 999),
)


@given(code_tensors)
def test_unpack_undoes_pack_on_any_shape(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (codes.shape[0], num_words(codes.shape[1], bits))
    assert torch.equal(unpack(words, bits, codes.shape[1]), codes)


@given(code_tensors)
def test_pack_is_the_bit_stream_least_significant_bit_first(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    for row, words in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        stream = "".join(format(code, f"0{bits}b")[::-1] for code in row)
        stream += "0" * (-len(stream) % 32)
        expected = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
        assert [word % 2**32 for word in words] == expected


@pytest.fixture(scope="module")
def compressed_tensors() -> ModuleType:
    pytest.importorskip("compressed_tensors")
    for name in ("pack_quantized.helpers", "quantized_compressors.pack_quantized"):  # newest first
        try:
            return importlib.import_module(f"compressed_tensors.compressors.{name}")
        except ModuleNotFoundError:
            continue
    pytest.fail("this compressed-tensors has its packer elsewhere; say here where")


@given(case=code_tensors)
def test_pack_is_that_of_compressed_tensors_along_rows_and_columns(
    compressed_tensors: ModuleType, case: tuple[Tensor, int]
) -> None:
    codes, bits = case
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), compressed_tensors.pack_to_int32(signed, bits))
    along_rows = compressed_tensors.pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(pack(codes.T.contiguous(), bits).T, along_rows)


@pytest.mark.parametrize("bits", BITS)
def test_pack_holds_both_ends_of_the_grid(bits: int) -> None:
    for code in (0, 2**bits - 1):
        codes = torch.full((2, 33), code, dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, 33), codes)


def test_three_bits_straddle_words_as_gptq_has_it() -> None:
    """Value 10 lies in words 0 and 1, value 21 in words 1 and 2."""
    for value, words in ((9, [0]), (10, [0, 1]), (11, [1]), (21, [1, 2]), (22, [2])):
        codes = torch.zeros(1, 32, dtype=torch.uint8)
        codes[0, value] = 7
        assert pack(codes, 3)[0].nonzero().flatten().tolist() == words


# -------------------------------------------------------------------------------------------------------- grid


@given(cases())
def test_fake_quantize_is_dequantize_of_quantize(case: Case) -> None:
    codes, scale, zero_point, spec = rounded_to_nearest(*case)
    expected = affine.dequantize(codes, scale, zero_point, spec)
    assert torch.equal(affine.fake_quantize(case.weight, scale, zero_point, spec), expected)


@given(cases())
def test_codes_and_zero_points_are_integers_on_the_grid(case: Case) -> None:
    codes, _, zero_point, spec = rounded_to_nearest(*case)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= spec.qmax
    assert torch.equal(zero_point, zero_point.round())
    assert 0 <= float(zero_point.min()) <= float(zero_point.max()) <= spec.qmax


@given(cases())
def test_codes_are_a_fixed_point(case: Case) -> None:
    codes, scale, zero_point, spec = rounded_to_nearest(*case)
    weight = affine.dequantize(codes, scale, zero_point, spec)
    assert torch.equal(affine.quantize(weight, scale, zero_point, spec), codes)


@given(specs, st.integers(0, 999))
def test_every_code_is_a_fixed_point(spec: QuantSpec, seed: int) -> None:
    codes = torch.arange(spec.qmax + 1, dtype=torch.uint8).unsqueeze(0)
    spec = spec.model_copy(update={"group_size": -1})
    scale = affine.stored_scale(torch.rand(1, 1, generator=torch.Generator().manual_seed(seed)) + 1e-3, spec)
    for zero_point in (0, spec.middle, spec.qmax):
        grid = scale, torch.full((1, 1), float(zero_point))
        assert torch.equal(affine.quantize(affine.dequantize(codes, *grid, spec), *grid, spec), codes)


@given(cases())
def test_error_is_half_a_step_inside_the_range(case: Case) -> None:
    weight, spec = case
    codes, scale, zero_point, _ = rounded_to_nearest(weight, spec)
    step, zero = per_weight(scale, weight.shape[1]), per_weight(zero_point, weight.shape[1])
    w = weight.double()
    inside = (w >= -zero * step) & (w <= (spec.qmax - zero) * step)
    error = (affine.dequantize(codes, scale, zero_point, spec).double() - w).abs()
    slack = spec.qmax * 2.0**-21  # float32 arithmetic on numbers of up to qmax steps
    assert bool((error <= step * (0.5 + slack))[inside].all())


@given(cases())
def test_minmax_leaves_outside_only_what_rounding_the_scale_does(case: Case) -> None:
    """The exact grid covers every weight to half a step; a scale rounded by ``r`` moves its ends by ``r * qmax``."""
    weight, spec = case
    codes, scale, zero_point, _ = rounded_to_nearest(weight, spec)
    groups = affine.grouped(weight, spec).double()
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    exact = (2 * torch.maximum(-low, high) if spec.symmetric else high - low) / spec.qmax
    exact = torch.where(exact == 0, scale.double(), exact)  # an all-zero group
    step = torch.maximum(per_weight(scale, weight.shape[1]), per_weight(exact, weight.shape[1]))
    rounded = per_weight((scale.double() - exact).abs(), weight.shape[1])
    error = (affine.dequantize(codes, scale, zero_point, spec).double() - weight.double()).abs()
    assert bool((error <= step * (0.5 + spec.qmax * 2.0**-21) + spec.qmax * rounded).all())


@given(cases())
def test_scale_is_a_positive_value_of_its_stored_dtype(case: Case) -> None:
    _, scale, _, spec = rounded_to_nearest(*case)
    stored = scale.to(getattr(torch, spec.scale_dtype))
    assert torch.equal(stored.float(), scale)
    assert bool((stored > 0).all())
    assert bool(torch.isfinite(stored).all())


@given(specs, st.integers(1, 4))
def test_zero_is_held_exactly(spec: QuantSpec, rows: int) -> None:
    weight = torch.zeros(rows, 96)
    assert torch.equal(affine.dequantize(*rounded_to_nearest(weight, spec)), weight)


def test_the_range_of_an_all_zero_group_is_taken_as_one_to_either_side() -> None:
    """Golden: a scale of 2 / 15, as good as any, where the smallest float16 would be no use to whoever trains it."""
    for symmetric in (True, False):
        spec = QuantSpec(num_bits=4, group_size=4, symmetric=symmetric, scale_dtype="float32")
        scale, zero_point = affine.minmax_qparams(torch.zeros(1, 8), spec)
        assert scale.tolist() == [[pytest.approx(2 / 15)] * 2]
        assert zero_point[0, 0] in ((8,) if symmetric else (7, 8))  # 7.5, but for the rounding of the scale


@given(cases(-3, 3))
def test_zeros_among_other_weights_stay_zero(case: Case) -> None:
    weight = case.weight.clone()
    weight[:, ::2] = 0
    rounded = affine.dequantize(*rounded_to_nearest(weight, case.spec))
    assert torch.equal(rounded[:, ::2], weight[:, ::2])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.75, -0.75])
def test_a_constant_group_keeps_its_value(bits: int, value: float) -> None:
    """Asymmetric: an end of the range, exact but for the scale. Symmetric: half a step off on the positive side."""
    weight = torch.full((2, 16), value)
    asymmetric = QuantSpec(num_bits=bits, group_size=8, symmetric=False, scale_dtype="float32")
    assert torch.allclose(affine.dequantize(*rounded_to_nearest(weight, asymmetric)), weight, rtol=1e-6)
    symmetric = asymmetric.model_copy(update={"symmetric": True})
    error = (affine.dequantize(*rounded_to_nearest(weight, symmetric)) - weight).abs()
    assert float(error.max()) <= 0.75 / symmetric.qmax * 1.001


@given(cases(-3, 3))
def test_symmetric_is_a_zero_point_at_the_middle_and_nothing_else(case: Case) -> None:
    spec = case.spec.model_copy(update={"symmetric": True})
    codes, scale, zero_point, _ = rounded_to_nearest(case.weight, spec)
    assert bool((zero_point == 2 ** (spec.num_bits - 1)).all())
    asymmetric = spec.model_copy(update={"symmetric": False})
    assert torch.equal(affine.quantize(case.weight, scale, zero_point, asymmetric), codes)


def test_rounding_is_half_to_even() -> None:
    """Golden: grid values 0.5, 1.5, 2.5, 3.5, 4.5 go to codes 0, 2, 2, 4, 4."""
    spec = QuantSpec(num_bits=3, group_size=-1, symmetric=False)
    weight = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]])
    codes = affine.quantize(weight, torch.ones(1, 1), torch.full((1, 1), 2.0), spec)
    assert codes.tolist() == [[0, 2, 2, 4, 4]]


def test_min_max_grids_are_those_of_the_formula() -> None:
    """Golden, by hand: 2 bits on -1, 0, 1, 2; symmetric then has scale 4/3 and the middle code 2."""
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    asymmetric = QuantSpec(num_bits=2, group_size=4, symmetric=False, scale_dtype="float32")
    codes, scale, zero_point, _ = rounded_to_nearest(weight, asymmetric)
    assert (codes.tolist(), scale.tolist(), zero_point.tolist()) == ([[0, 1, 2, 3]], [[1.0]], [[1.0]])
    codes, scale, zero_point, _ = rounded_to_nearest(weight, asymmetric.model_copy(update={"symmetric": True}))
    assert (codes.tolist(), scale.tolist(), zero_point.tolist()) == ([[1, 2, 3, 3]], [[pytest.approx(4 / 3)]], [[2.0]])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_more_bits_less_error(symmetric: bool, seed: int) -> None:
    weight = make_weight(32, 64, "normal", 0.02, seed)
    errors = [
        float((affine.dequantize(*rounded_to_nearest(weight, spec)) - weight).square().mean())
        for spec in (QuantSpec(num_bits=bits, group_size=16, symmetric=symmetric) for bits in BITS)
    ]
    assert all(more < 0.5 * less for less, more in pairwise(errors)), errors


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_smaller_groups_less_error(bits: int, symmetric: bool) -> None:
    weight = make_weight(32, 128, "normal", 0.02, 0)
    errors = [
        float((affine.dequantize(*rounded_to_nearest(weight, spec)) - weight).square().mean())
        for spec in (QuantSpec(num_bits=bits, group_size=size, symmetric=symmetric) for size in (-1, 64, 32, 16, 8))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    weight = torch.ones(4, 8)
    weight[1, 2] = weight[3, 4] = value
    with pytest.raises(InputError, match=r"^model\.up\.weight holds 2 NaN or infinite value\(s\) of 32"):
        affine.check_weight(weight, QuantSpec(group_size=8), "model.up.weight")


def test_a_group_size_that_does_not_divide_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"up\.weight has 96 input channels, and group_size 64 does not divide"):
        affine.check_weight(torch.ones(4, 96), QuantSpec(group_size=64), "up.weight")
    affine.check_weight(torch.ones(4, 96), QuantSpec(group_size=-1), "up.weight")


def test_a_scale_above_its_stored_dtype_is_refused_and_float32_holds_it() -> None:
    weight = torch.full((2, 16), 1e6)
    with pytest.raises(InputError, match=r"^up\.weight has weights up to 1e\+06.*float16.*scale_dtype: float32"):
        affine.check_weight(weight, QuantSpec(group_size=16), "up.weight")
    for scale_dtype in ("float32", "bfloat16"):
        spec = QuantSpec(group_size=16, scale_dtype=scale_dtype)
        affine.check_weight(weight, spec, "up.weight")
        assert torch.allclose(affine.dequantize(*rounded_to_nearest(weight, spec)), weight, rtol=0.1)


@given(cases())
def test_what_is_not_refused_is_quantized_to_finite_numbers(case: Case) -> None:
    affine.check_weight(case.weight, case.spec, "w")
    assert bool(torch.isfinite(affine.dequantize(*rounded_to_nearest(*case))).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_the_largest_weights_are_refused_or_quantized_to_finite_numbers(scale_dtype: str, symmetric: bool) -> None:
    weight = torch.tensor([[2e38, -3e38, 1e38, 0.0]])
    spec = QuantSpec(num_bits=4, group_size=-1, scale_dtype=scale_dtype, symmetric=symmetric)
    with suppress(InputError):
        affine.check_weight(weight, spec, "w")
        assert bool(torch.isfinite(affine.dequantize(*rounded_to_nearest(weight, spec))).all())


# ------------------------------------------------------------------------------------------------ range search


def weighted_error(
    weight: Tensor, grid: tuple[Tensor, Tensor], spec: QuantSpec, norm: float, importance: Tensor
) -> Tensor:
    """``sum h |w - Q(w)|**norm`` of each group, in float64."""
    change = (affine.fake_quantize(weight, *grid, spec).double() - weight.double()).abs().pow(norm) * importance
    return affine.grouped(change, spec).sum(-1)


@given(cases(-3, 3), st.sampled_from([2.0, 2.4, 3.0]), st.booleans())
def test_range_search_is_never_worse_than_min_max_under_its_own_measure(
    case: Case, norm: float, weighted: bool
) -> None:
    weight, spec = case
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) + 0.1
    found = search_qparams(weight, spec, norm, importance if weighted else None)
    h = importance.double() if weighted else torch.ones(weight.shape[1], dtype=torch.float64)
    searched = weighted_error(weight, found, spec, norm, h)
    minmax = weighted_error(weight, affine.minmax_qparams(weight, spec), spec, norm, h)
    tiny = 1e-6 * float(weight.abs().max()) ** norm * float(h.sum())  # float32 sums
    assert bool((searched <= minmax * (1 + 1e-4) + tiny).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_range_search_gains_at_few_bits_and_follows_importance(bits: int, symmetric: bool) -> None:
    weight = make_weight(16, 128, "normal", 0.02, 0)
    spec = QuantSpec(num_bits=bits, group_size=64, symmetric=symmetric)
    ones, importance = torch.ones(128), torch.logspace(-2, 2, 128)

    def total(grid: tuple[Tensor, Tensor], h: Tensor) -> float:
        return float(weighted_error(weight, grid, spec, 2.0, h).sum())

    searched, weighted = search_qparams(weight, spec, 2.0), search_qparams(weight, spec, 2.0, importance)
    assert total(searched, ones) < 0.95 * total(affine.minmax_qparams(weight, spec), ones)
    assert total(weighted, importance) < total(searched, importance)


@given(cases(-3, 3))
def test_range_search_gives_grids_like_any_other(case: Case) -> None:
    scale, zero_point = search_qparams(case.weight, case.spec)
    assert torch.equal(scale.to(getattr(torch, case.spec.scale_dtype)).float(), scale)
    assert bool((scale > 0).all())
    assert torch.equal(zero_point, zero_point.round().clamp(0, case.spec.qmax))
    if case.spec.symmetric:
        assert bool((zero_point == case.spec.middle).all())


# --------------------------------------------------------------------------------------------------- gradients


def clipping_layer(spec: QuantSpec, seed: int = 0) -> QuantLinear:
    """A layer whose range is too small and whose zero points are off the integers."""
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
    """LSQ's for the scale, one inside the grid for the weight, ``-s`` outside it for the zero point."""
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

    assert torch.allclose(layer.weight.grad, upstream * inside, rtol=1e-6, atol=0)  # g * s / s in float32
    assert torch.allclose(layer.scale.grad, summed(by_scale), rtol=1e-4, atol=1e-3)
    if symmetric:
        assert layer.zero_point.grad is None
    else:
        assert torch.allclose(layer.zero_point.grad, summed(g * ~inside * -s), rtol=1e-4, atol=1e-5)


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
    """What training leaves: weights, scales and zero points off anything that can be stored, some far outside."""
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
        for found, value in zip(QuantLinear(weight, None, spec).freeze().quantized, expected, strict=True):
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value


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
    """``model.half()`` and its like move biases and must not touch a stored scale."""
    layer = PackedLinear.from_quantized(rounded_to_nearest(*case), torch.ones(case.weight.shape[0]))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    model = nn.Sequential(layer)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        for name, buffer in layer.named_buffers():
            assert buffer.dtype == before[name].dtype, name
            assert torch.equal(buffer, before[name]), name
    model.half()
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


# ----------------------------------------------------------------------------------------------------- storage


@given(
    st.sampled_from(BITS),
    st.sampled_from([-1, 8, 16, 32]),
    st.booleans(),
    st.sampled_from(sorted(SCALE_BITS)),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_bits_per_weight_are_the_bytes_of_the_buffers(
    bits: int, group_size: int, symmetric: bool, scale_dtype: str, rows: int, columns: int
) -> None:
    """Sizes are multiples of 32, so that no word is padded."""
    spec = QuantSpec(num_bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    layer = PackedLinear(32 * columns, 32 * rows, spec)
    stored = [buffer for name, buffer in layer.named_buffers() if name not in ("weight", "weight_shape")]
    assert len(stored) == (2 if symmetric else 3)
    num_bytes = sum(buffer.numel() * buffer.element_size() for buffer in stored)
    assert 8 * num_bytes / (32 * rows * 32 * columns) == pytest.approx(spec.bits_per_weight(32 * columns), rel=1e-12)


@pytest.mark.parametrize(
    ("bits", "published"),
    [
        (4, {32: 4.63, 64: 4.31, 128: 4.16, 256: 4.08}),
        (3, {32: 3.59, 64: 3.30, 128: 3.15, 256: 3.07}),
        (2, {32: 2.56, 64: 2.28, 128: 2.14, 256: 2.07}),
    ],
)
def test_bits_per_weight_are_those_of_the_efficientqat_paper(bits: int, published: dict[int, float]) -> None:
    """Asymmetric, float16 scales (arXiv 2407.11062): ``b + (b + 16) / g``."""
    for group_size, value in published.items():
        spec = QuantSpec(num_bits=bits, group_size=group_size, symmetric=False)
        assert spec.bits_per_weight(4096) == pytest.approx(value, abs=0.0051)
