"""Smooth estimators of rounding and clamping against their definitions, and combinations that are refused."""

import math
from typing import Any

import pytest
import torch
from helpers.rounding_reference import GATES, STAIRCASES, assert_equal, gate_of, softclamp
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from qtool.config.training import OVERSHOOT, RoundingConfig
from qtool.quant import rounding

# ---------------------------------------------------------------------------------- definitions to compare with


def product_softclamp(x: Tensor, low: float, high: float, sharpness: float, gate: str) -> Tensor:
    """Compute the paper's form ``x g(x - a) g(b - x) + a g(a - x) + b g(x - b)``."""

    def g(t: Tensor) -> Tensor:
        return gate_of(sharpness * t, gate)

    return x * g(x - low) * g(high - x) + low * g(low - x) + high * g(x - high)


# ----------------------------------------------------------------------------------------------------- estimators


@given(st.floats(0.05, 40), st.sampled_from(sorted(STAIRCASES)))
def test_the_mean_slope_is_one_at_any_temperature(temperature: float, estimator: str) -> None:
    """Over one unit and between any two codes, so that the temperature does not change the learning rate."""
    x = torch.linspace(3, 4, 20001, dtype=torch.float64)
    slope = rounding.ESTIMATORS[estimator].slope(x, temperature)
    assert float(torch.trapezoid(slope, x)) == pytest.approx(1, abs=1e-4)
    codes = torch.arange(-3.0, 4, dtype=torch.float64)
    assert torch.allclose(rounding.ESTIMATORS[estimator].value(codes, temperature), codes, atol=1e-12)


@given(st.floats(0.05, 40), st.sampled_from(sorted(STAIRCASES)))
def test_values_and_slopes_are_those_of_the_definition(temperature: float, estimator: str) -> None:
    x = torch.linspace(-1.97, 5.03, 501, dtype=torch.float64).requires_grad_()
    value = STAIRCASES[estimator](x, temperature)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert_equal(rounding.ESTIMATORS[estimator].value(x.detach(), temperature), value)
    assert_equal(rounding.ESTIMATORS[estimator].slope(x.detach(), temperature), slope)
    single = rounding.ESTIMATORS[estimator].slope(x.detach().float(), temperature)
    assert single.dtype == torch.float32
    assert torch.allclose(single, slope.float(), atol=2e-5 * max(1, temperature))  # codes are rounded to float32


@pytest.mark.parametrize("estimator", sorted(STAIRCASES))
def test_a_temperature_towards_zero_is_straight_through(estimator: str) -> None:
    x = torch.linspace(-2, 5, 701, dtype=torch.float64)
    assert torch.allclose(rounding.ESTIMATORS[estimator].slope(x, 0.05), torch.ones_like(x), atol=1e-2)
    assert torch.allclose(rounding.ESTIMATORS[estimator].value(x, 0.05), x, atol=1e-2)
    assert torch.equal(rounding.ESTIMATORS["ste"].slope(x, 4.0), torch.ones_like(x))


@pytest.mark.parametrize("estimator", sorted(STAIRCASES))
def test_a_high_temperature_is_rounding(estimator: str) -> None:
    x = torch.tensor([0.1, 0.3, 0.45, 0.55, 0.8, 2.6], dtype=torch.float64)
    assert torch.allclose(rounding.ESTIMATORS[estimator].value(x, 100.0), x.round(), atol=0.01)


def test_slopes_of_the_periodic_steps_lie_where_they_should() -> None:
    """Golden, methods of arXiv 2410.10849 as we read them: lowest at the codes, highest between them."""
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for temperature, low, high in ((4.0, 0.86, 1.14), (6.0, 0.54, 1.53), (10.0, 0.13, 2.50)):
        slope = rounding.periodic_slope(x, temperature)
        assert (round(float(slope.min()), 2), round(float(slope.max()), 2)) == (low, high)
        assert int(slope.argmax()) == 500


@pytest.mark.parametrize(
    ("temperature", "low"), [(1.0, 0.235), (2.0, 0.393), (4.0, 0.420), (6.0, 0.271), (10.0, 0.0665)]
)
def test_slopes_of_the_local_step_lie_where_they_should(temperature: float, low: float) -> None:
    """Golden: ``T sig(-T/2) sig(T/2)`` at the codes and ``T / 4`` between, both over the mean ``tanh(T / 4)``."""
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    slope = rounding.local_slope(x, temperature) * math.tanh(temperature / 4)
    assert float(slope.min()) == pytest.approx(low, abs=5e-4)
    assert float(slope.max()) == pytest.approx(temperature / 4)


def test_dsq_is_the_local_step_at_twice_the_temperature() -> None:
    x = torch.linspace(-2, 5, 701, dtype=torch.float64)
    assert_equal(rounding.dsq_slope(x, 3.0), rounding.local_slope(x, 6.0))


# ----------------------------------------------------------------------------------------------------- soft clamp

clamps = st.tuples(st.sampled_from([(0, 3), (0, 7), (-8, 7)]), st.floats(4, 40), st.sampled_from(GATES))


@given(clamps)
def test_softclamp_holds_its_ends_and_passes_them_by_little(case: tuple[tuple[int, int], float, str]) -> None:
    (low, high), k, gate = case
    ends = torch.tensor([low, high], dtype=torch.float64)
    assert torch.allclose(
        rounding.softclamp(ends, low, high, k, gate), ends, atol=(high - low) * math.exp(-3 * k) + 1e-12
    )
    x = torch.linspace(low - 20, high + 20, 40001, dtype=torch.float64)
    value = rounding.softclamp(x, low, high, k, gate)
    for overshoot in (float(value.max()) - high, low - float(value.min())):
        assert 0.9 * OVERSHOOT[gate] / k < overshoot <= OVERSHOOT[gate] / k
    assert float(value[0]) == pytest.approx(low)
    assert float(value[-1]) == pytest.approx(high)
    slope = rounding.softclamp_slope(x, low, high, k, gate)
    least, tails = {"logistic": -0.0999, "gaussian": -0.1291}[gate], k * (high - low) * math.exp(-k * (high - low) / 2)
    assert least - tails <= float(slope.min())
    assert float(slope.max()) <= 1 - least + tails


@given(clamps)
def test_the_slope_of_softclamp_is_its_derivative(case: tuple[tuple[int, int], float, str]) -> None:
    (low, high), k, gate = case
    x = torch.linspace(low - 5, high + 5, 1001, dtype=torch.float64).requires_grad_()
    expected = softclamp(x, low, high, k, gate)
    assert_equal(rounding.softclamp(x.detach(), low, high, k, gate), expected)
    slope = torch.autograd.grad(expected.sum(), x)[0]
    assert_equal(rounding.softclamp_slope(x.detach(), low, high, k, gate), slope)


@given(clamps)
def test_softclamp_is_the_product_of_gates_of_the_paper_but_for_their_tails(
    case: tuple[tuple[int, int], float, str],
) -> None:
    (low, high), k, gate = case
    x = torch.linspace(low - 3, high + 3, 1001, dtype=torch.float64)
    difference = rounding.softclamp(x, low, high, k, gate) - product_softclamp(x, low, high, k, gate)
    assert float(difference.abs().max()) < 2 * max(abs(low), abs(high)) * math.exp(-k * (high - low) / 2) + 1e-13


def test_softclamp_turns_its_slope_where_it_is_furthest_out() -> None:
    slope = rounding.softclamp_slope(torch.tensor([7.31, 7.33], dtype=torch.float64), 0, 7, 4.0, "logistic")
    assert float(slope[0]) > 0 > float(slope[1])  # 1.278 / k beyond the end: 7.3195


@given(clamps, st.integers(-20, 20))
def test_softclamp_knows_no_place_where_codes_begin(case: tuple[tuple[int, int], float, str], shift: int) -> None:
    (low, high), k, gate = case
    x = torch.linspace(low - 3, high + 3, 101, dtype=torch.float64)
    moved = rounding.softclamp(x + shift, low + shift, high + shift, k, gate) - shift
    assert torch.allclose(moved, rounding.softclamp(x, low, high, k, gate), atol=1e-12)


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 6.0}, "temperature acts only with an estimator other than ste: leave it out"),
        ({"temperature_end": 6.0}, "temperature_end acts only with an estimator other than ste"),
        ({"sharpness": 6.0}, "sharpness acts only with clamp: softclamp"),
        ({"gate": "gaussian", "temperature": 6.0}, "temperature acts only with .*; gate acts only with"),
        ({"forward": "soft"}, "forward: soft needs an estimator other than ste"),
        (
            {"forward": "soft", "estimator": "sigmoid", "clamp": "softclamp", "sharpness": 0.55},
            r"sharpness 0\.55 passes the ends of the grid by half a code.*use a sharpness above 0\.56",
        ),
        (
            {"forward": "soft", "estimator": "dsq", "clamp": "softclamp", "sharpness": 0.34, "gate": "gaussian"},
            r"use a sharpness above 0\.34",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_told_what_to_do(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RoundingConfig(**keys)


@pytest.mark.parametrize("gate", GATES)
def test_the_least_sharpness_of_a_soft_forward_is_where_codes_stay_on_the_grid(gate: str) -> None:
    k = 2 * OVERSHOOT[gate] + 0.001
    RoundingConfig(forward="soft", estimator="sigmoid", clamp="softclamp", sharpness=k, gate=gate)
    x = torch.linspace(-30, 285, 50001, dtype=torch.float64)
    for sharpness, legal in ((k, True), (0.9 * k, False)):
        codes = rounding.softclamp(x, 0, 255, sharpness, gate).round()
        assert (int(codes.min()), int(codes.max())) == ((0, 255) if legal else (-1, 256))
