"""Laws of grids whose scales and minima are stored by blocks, and the layers and methods that work on them."""

import copy
import math

import pytest
import torch
from helpers import tiny
from helpers.methods import correlated_inputs
from helpers.weights import make_weight
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from qtool.blocks.moments import Statistics
from qtool.config.grids import BLOCK_GRIDS
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.quant import affine, block_scales
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.ranges import range_error, search_qparams
from qtool.quant.trained_linear import QuantLinear

NAMES = sorted(BLOCK_GRIDS)
KINDS = ("normal", "positive", "negative", "one zero row", "all zero", "outlier")


@st.composite
def weights(draw: st.DrawFn, low: int = -6, high: int = 2) -> tuple[Tensor, QuantSpec]:
    spec = QuantSpec.model_validate({"grid": draw(st.sampled_from(NAMES))})
    magnitude = 10.0 ** draw(st.integers(low, high))
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 999))
    return make_weight(draw(st.sampled_from([1, 3, 33])), 512, kind, magnitude, seed), spec


def rounded(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    grid = search_qparams(weight, spec, 2.0)
    return QuantizedWeight(affine.quantize(weight, *grid, spec), *grid, spec)


@given(weights())
def test_what_is_stored_is_stored_again_without_a_change(case: tuple[Tensor, QuantSpec]) -> None:
    weight, spec = case
    _, scale, zero_point, _ = rounded(weight, spec)
    again = affine.stored_scale(scale, spec)
    assert torch.equal(again, scale)
    assert torch.equal(affine.stored_zero_point(zero_point, again, spec), zero_point)


@given(weights())
def test_scales_are_float16_numbers_times_small_integers(case: tuple[Tensor, QuantSpec]) -> None:
    weight, spec = case
    _, scale, zero_point, _ = rounded(weight, spec)
    grid = spec.blocks
    assert grid is not None
    values = [scale] if spec.symmetric else [scale, block_scales.minimum(scale, zero_point)]
    for least, value in zip((1, 0), values, strict=False):
        number, integers = value, torch.ones_like(value)
        if grid.integer_bits:
            number, integers = block_scales.split(value, grid, least)
            assert torch.equal(block_scales.joined(number, integers, grid), value)
        assert torch.equal(number.half().float(), number)
        assert torch.equal(integers, integers.round())
        sizes = integers.abs() if spec.signed else integers
        assert least <= float(sizes.min()) <= float(sizes.max()) <= max(1, grid.largest)


@given(weights())
def test_a_packed_layer_gives_back_every_bit(case: tuple[Tensor, QuantSpec]) -> None:
    weight, spec = case
    quantized = rounded(weight, spec)
    layer = PackedLinear.from_quantized(quantized, None)
    assert all(torch.equal(one, other) for one, other in zip(layer.quantized[:3], quantized[:3], strict=True))
    dense = affine.dequantize(*quantized)
    assert torch.equal(layer.dequantized(), dense)
    rows = torch.tensor([len(weight) - 1, 0])
    assert torch.equal(layer.dequantized(rows=rows), dense[rows])
    assert torch.equal(layer.dequantized(rows=slice(1, 2)), dense[1:2])
    stored = sum(8 * tensor.nbytes for name, tensor in layer.state_dict().items() if name not in ("weight_shape",))
    if len(weight) % 32 == 0:
        assert stored - 8 == spec.bits_per_weight(512) * weight.numel()


@given(weights(low=-3, high=1))
def test_training_starts_at_the_same_bits(case: tuple[Tensor, QuantSpec]) -> None:
    weight, spec = case
    quantized = rounded(weight, spec)
    layer = QuantLinear(weight, None, spec)
    layer.start_from(quantized)
    assert torch.equal(layer.quantized_weight(), affine.dequantize(*quantized))
    assert torch.equal(layer.freeze().dequantized(), affine.dequantize(*quantized))


@given(weights(low=-3, high=1), st.sampled_from([1.0, 2.0, 3.0]))
def test_the_searched_range_is_never_worse_than_that_of_the_extremes(
    case: tuple[Tensor, QuantSpec], norm: float
) -> None:
    weight, spec = case
    groups, one = affine.grouped(weight, spec), torch.ones(1)
    searched, plain = search_qparams(weight, spec, norm), affine.minmax_qparams(weight, spec)
    after, before = (range_error(groups, *grid, spec, norm, one).sum() for grid in (searched, plain))
    assert float(after) <= float(before) * (1 + 1e-5)


@given(weights(low=-3, high=1))
def test_the_error_is_at_most_that_of_the_stored_step(case: tuple[Tensor, QuantSpec]) -> None:
    """Inside a group's stored range a weight is off by half a step at most."""
    weight, spec = case
    codes, scale, zero_point, _ = rounded(weight, spec)
    groups, step = affine.grouped(weight, spec).double(), scale.double().unsqueeze(-1)
    low = -zero_point.double().unsqueeze(-1) * step
    inside = (groups >= low) & (groups <= low + spec.qmax * step)
    error = (affine.grouped(affine.dequantize(codes, scale, zero_point, spec), spec).double() - groups).abs()
    assert bool((error <= step * (0.5 + 2.0**-15))[inside].all())


def test_gradients_are_those_of_the_affine_formula() -> None:
    """``w = (code - z) s``: the derivative is ``code - z`` for the scale and ``-s`` for the zero point."""
    weight, spec = make_weight(4, 512, "normal", 0.1, 0), QuantSpec(grid="q4_k")
    codes, scale, zero_point, _ = rounded(weight, spec)
    s, z = scale.clone().requires_grad_(), zero_point.clone().requires_grad_()
    upstream = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    affine.dequantize(codes, s, z, spec).backward(upstream)
    g, q = affine.grouped(upstream, spec), affine.grouped(codes, spec).float()
    assert s.grad is not None
    assert z.grad is not None
    torch.testing.assert_close(s.grad, (g * (q - zero_point.unsqueeze(-1))).sum(-1))
    torch.testing.assert_close(z.grad, (-g * scale.unsqueeze(-1)).sum(-1))


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_form_costs_little_beside_free_scales(name: str) -> None:
    weight, spec = make_weight(32, 512, "normal", 0.02, 1), QuantSpec.model_validate({"grid": name})
    free = search_qparams(weight, spec.free, 2.0)
    best = QuantizedWeight(affine.quantize(weight, *free, spec.free), *free, spec.free)
    # minima of 6 bits are multiples of about a third of a step of q5_k, whose rounding alone adds that squared, 0.1
    most = 1.12 if name == "q5_k" else 1.1
    assert affine.relative_error(weight, rounded(weight, spec)) < most * affine.relative_error(weight, best)


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q6_k"])
def test_gptq_lowers_the_output_error_of_a_block_grid_in_any_order(name: str) -> None:
    from qtool.methods import gptq, rtn
    from qtool.quant.hessian import gram

    x, weight = correlated_inputs(600, 512), make_weight(16, 512, "normal", 0.02, 2)
    spec = QuantSpec.model_validate({"grid": name})

    def error(found: QuantizedWeight) -> float:
        return float((x @ (affine.dequantize(*found) - weight).T).square().mean())

    nearest = error(rtn.round_to_nearest(weight, spec, rtn.Config(range="search", norm=2)))
    for settings in ({}, {"act_order": "off"}, {"static_groups": True, "act_order": "full"}):
        config = gptq.Config.model_validate(settings)
        factor = gptq.factorise(Statistics(gram([x]), None), spec, config, "linear")
        found = gptq.solve(weight, factor, spec, config)
        assert torch.equal(affine.stored_scale(found.scale, spec), found.scale)
        assert error(found) < 0.8 * nearest, settings


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("name", NAMES)
def test_a_name_implies_the_other_keys(name: str) -> None:
    spec, grid = QuantSpec.model_validate({"grid": name}), BLOCK_GRIDS[name]
    assert (spec.num_bits, spec.group_size, spec.symmetric) == (grid.num_bits, grid.group_size, grid.symmetric)
    assert spec.label() == name
    assert QuantSpec(**spec.model_dump()) == spec
    assert copy.deepcopy(spec).weights_only == spec
    assert math.isclose(spec.bits_per_weight(512), grid.bits_per_weight)


def test_a_contradiction_is_refused_and_says_what_to_leave_out() -> None:
    with pytest.raises(ValidationError, match=r"grid: q4_k has group_size: 32.*leave out group_size"):
        QuantSpec(grid="q4_k", group_size=64)
    with pytest.raises(ValidationError, match=r"should be 2, 3, 4 or 8; 6 bits are a grid of GGUF: grid: q6_k"):
        QuantSpec(num_bits=6)


def test_overrides_change_to_a_block_grid_and_back() -> None:
    quant = QuantConfig.model_validate(
        {
            "num_bits": 3,
            "overrides": {
                "*.q": {"grid": "q6_k"},
                "*.k": {"grid": "q6_k", "activations": None},
                "*.v": {"num_bits": 4},
            },
        }
    )
    assert quant.spec_for("a.q") == QuantSpec(grid="q6_k")
    assert quant.spec_for("a.v") == QuantSpec(num_bits=4)
    back = QuantConfig.model_validate(
        {"grid": "q4_k", "overrides": {"*.q": {"grid": "affine", "num_bits": 8, "group_size": 64}}}
    )
    again = QuantConfig.model_validate(back.model_dump(mode="json", exclude_unset=True))
    for each in (back, again):
        assert each.spec_for("a.q") == QuantSpec(num_bits=8, group_size=64, symmetric=False)
        assert each.spec_for("a.k") == QuantSpec(grid="q4_k")


def test_rows_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(Exception, match=r"576 input channels, and blocks of q4_k have 256"):
        affine.check_weight(torch.zeros(2, 576), QuantSpec(grid="q4_k"), "weight")


def test_affine_grids_are_written_as_before() -> None:
    assert "grid" not in QuantSpec().model_dump()
    assert "grid" not in tiny.specs(tiny.packed(tiny.BUILTIN, QuantConfig())).popitem()[1].model_dump()
