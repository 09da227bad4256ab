"""Laws of the integer grid for every width, group, symmetry, scale dtype and shape, by independent arithmetic."""

from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from helpers.weights import Case, cases, make_weight, per_weight, rounded_to_nearest, specs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.quant import BITS, QuantSpec
from qtool.quant import affine
from qtool.quant.ranges import search_qparams
from qtool.system.errors import InputError

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
    ends = -zero * step, (spec.qmax - zero) * step  # the second is the lower one where a scale is negative
    inside = (w >= torch.minimum(*ends)) & (w <= torch.maximum(*ends))
    error = (affine.dequantize(codes, scale, zero_point, spec).double() - w).abs()
    slack = spec.qmax * 2.0**-21  # error of float32 arithmetic on numbers of up to qmax steps
    assert bool((error <= step.abs() * (0.5 + slack))[inside].all())


@given(cases())
def test_minmax_leaves_outside_only_what_rounding_the_scale_does(case: Case) -> None:
    """The exact grid covers every weight to half a step; a scale rounded by ``r`` moves its ends by ``r * qmax``.

    With scales of either sign, it covers to a step: the lowest level is the end with the larger weight.
    """
    weight, spec = case
    codes, scale, zero_point, _ = rounded_to_nearest(weight, spec)
    dequantized = affine.dequantize(codes, scale, zero_point, spec)
    groups = affine.grouped(weight, spec).double()
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    exact = (2 * torch.maximum(-low, high) if spec.symmetric else high - low) / spec.qmax
    if spec.signed:
        exact = torch.where(-low >= high, -low, -high) / spec.middle
    exact = torch.where(exact == 0, scale.double(), exact)  # an all-zero group
    assert torch.equal(exact.sign(), scale.double().sign())
    scale, exact, covered = scale.abs(), exact.abs(), 1.0 if spec.signed else 0.5
    step = torch.maximum(per_weight(scale, weight.shape[1]), per_weight(exact, weight.shape[1]))
    rounded = per_weight((scale.double() - exact).abs(), weight.shape[1])
    error = (dequantized.double() - weight.double()).abs()
    assert bool((error <= step * (covered + spec.qmax * 2.0**-21) + spec.qmax * rounded).all())


@given(cases())
def test_scale_is_a_value_of_its_stored_dtype_and_positive_unless_the_grid_allows_both_signs(case: Case) -> None:
    _, scale, _, spec = rounded_to_nearest(*case)
    stored = scale.to(getattr(torch, spec.scale_dtype))
    assert torch.equal(stored.float(), scale)
    assert bool((stored.abs() > 0 if spec.signed else stored > 0).all())
    assert bool(torch.isfinite(stored).all())


@given(specs, st.integers(1, 4))
def test_zero_is_held_exactly(spec: QuantSpec, rows: int) -> None:
    weight = torch.zeros(rows, 96)
    assert torch.equal(affine.dequantize(*rounded_to_nearest(weight, spec)), weight)


def test_the_range_of_an_all_zero_group_is_taken_as_one_to_either_side() -> None:
    """Golden: a scale of 2 / 15 or 1 / 8; the smallest float16 would fit too, and could not be trained."""
    for symmetric, negative, expected in ((True, False, 2 / 15), (True, True, 1 / 8), (False, False, 2 / 15)):
        spec = QuantSpec(num_bits=4, group_size=4, symmetric=symmetric, scale_dtype="float32", negative_scales=negative)
        scale, zero_point = affine.minmax_qparams(torch.zeros(1, 8), spec)
        assert scale.tolist() == [[pytest.approx(expected)] * 2]
        assert zero_point[0, 0] in ((8,) if symmetric else (7, 8))  # 7.5 up to the rounding of the scale


@given(cases(-3, 3))
def test_zeros_among_other_weights_stay_zero(case: Case) -> None:
    weight = case.weight.clone()
    weight[:, ::2] = 0
    rounded = affine.dequantize(*rounded_to_nearest(weight, case.spec))
    assert torch.equal(rounded[:, ::2], weight[:, ::2])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.75, -0.75])
def test_a_constant_group_keeps_its_value(bits: int, value: float) -> None:
    """Exact up to the scale's rounding; half a step off on a symmetric grid whose scales are positive."""
    weight = torch.full((2, 16), value)
    asymmetric = QuantSpec(num_bits=bits, group_size=8, symmetric=False, scale_dtype="float32")
    assert torch.allclose(affine.dequantize(*rounded_to_nearest(weight, asymmetric)), weight, rtol=1e-6)
    signed = asymmetric.model_copy(update={"symmetric": True, "negative_scales": True})
    assert torch.allclose(affine.dequantize(*rounded_to_nearest(weight, signed)), weight, rtol=1e-6)
    symmetric = signed.model_copy(update={"negative_scales": False})
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
    """Golden, by hand: 2 bits on -1, 0, 1, 2; symmetric then has scale 4/3 and the middle code 2.

    With scales of either sign the scale is -1: the lowest level, -2 steps, is the largest weight.
    """
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    asymmetric = QuantSpec(num_bits=2, group_size=4, symmetric=False, scale_dtype="float32")
    codes, scale, zero_point, _ = rounded_to_nearest(weight, asymmetric)
    assert (codes.tolist(), scale.tolist(), zero_point.tolist()) == ([[0, 1, 2, 3]], [[1.0]], [[1.0]])
    signed = asymmetric.model_copy(update={"symmetric": True})
    codes, scale, zero_point, _ = rounded_to_nearest(weight, signed.model_copy(update={"negative_scales": False}))
    assert (codes.tolist(), scale.tolist(), zero_point.tolist()) == ([[1, 2, 3, 3]], [[pytest.approx(4 / 3)]], [[2.0]])
    codes, scale, zero_point, _ = rounded_to_nearest(weight, signed)
    assert (codes.tolist(), scale.tolist(), zero_point.tolist()) == ([[3, 2, 1, 0]], [[-1.0]], [[2.0]])


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
    """Compute ``sum h |w - Q(w)|**norm`` of each group, in float64."""
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
    tiny = 1e-6 * float(weight.abs().max()) ** norm * float(h.sum())  # error of float32 sums
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
    assert bool((scale.abs() > 0 if case.spec.signed else scale > 0).all())
    assert torch.equal(zero_point, zero_point.round().clamp(0, case.spec.qmax))
    if case.spec.symmetric:
        assert bool((zero_point == case.spec.middle).all())
