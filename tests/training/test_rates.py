"""A learning rate is the distance over the schedule, bit for bit as in the formula of each method."""

from typing import Any

import pytest
import torch
from helpers.efficientqat import config, random_layer
from helpers.methods import generator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtool.config.quant import BITS, QuantSpec
from qtool.config.training import OptimConfig
from qtool.methods import lrqat, lsq
from qtool.methods.efficientqat import block_ap, e2e_qp
from qtool.methods.efficientqat.config import ScaleConfig
from qtool.methods.efficientqat.e2e_qp import ScaleLinear
from qtool.quant.trained_linear import QuantLinear
from qtool.training.block_training import Norm
from qtool.training.fit import ParamGroup, fit, total_factor
from qtool.training.linears import grid_groups
from qtool.training.rates import LEAST_TOTAL, ends_to_scale, rate, scale_group

TOTAL = 5.3  # sum of a schedule's factors
WEIGHT = torch.randn(6, 32, generator=generator(3)) * 0.05
distances = st.floats(0, 1e3)
totals = st.floats(1e-3, 1e6)


@given(distances, totals, st.floats(0, 1))
def test_a_rate_is_the_distance_over_the_total_unless_it_is_given(distance: float, total: float, given: float) -> None:
    assert rate(distance, total, None) == distance / total
    assert rate(distance, total, given) == given


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 7, 40])
def test_a_parameter_whose_gradient_keeps_its_sign_moves_by_its_distance(schedule: Any, num_steps: int) -> None:
    optim = OptimConfig(optimizer="signsgd", schedule=schedule)
    moved = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    lr = rate(0.7, total_factor(num_steps, optim), None)
    fit([ParamGroup([moved], lr)], num_steps, lambda step: -moved.sum(), optim)
    assert moved.tolist() == pytest.approx([0.7] * 3)


def test_a_training_without_steps_has_finite_rates() -> None:
    assert rate(1.0, 0.0, None) == 1 / LEAST_TOTAL


@given(st.floats(1e-3, 10), st.floats(1e-4, 1), st.sampled_from(BITS))
def test_the_ends_of_a_range_move_by_their_steps(ends: float, scale: float, bits: int) -> None:
    qmax = 2**bits - 1
    moved = scale * (1 + ends_to_scale(ends, qmax))
    assert (moved - scale) * qmax / 2 == pytest.approx(ends * scale)


SIZES = st.floats(1e-6, 1e6).flatmap(lambda size: st.sampled_from([size, -size]))


@given(st.lists(SIZES, min_size=1, max_size=8), st.floats(0.01, 0.9), st.sampled_from(["adamw", "signsgd", "lion"]))
def test_a_scale_moves_by_a_share_of_its_own_size_and_never_through_zero(
    sizes: list[float], share: float, optimizer: Any
) -> None:
    optim = OptimConfig(optimizer=optimizer, eps=1e-30)
    scale = nn.Parameter(torch.tensor(sizes))
    start = scale.detach().clone()
    fit([scale_group(scale, share, total_factor(9, optim))], 9, lambda step: scale.abs().sum(), optim)
    assert (scale.detach() / start).tolist() == pytest.approx([1 - share] * len(sizes), rel=1e-5)


def test_a_given_rate_is_that_of_all_scales() -> None:
    optim = OptimConfig(optimizer="signsgd", schedule="constant")
    scale = nn.Parameter(torch.tensor([1.0, -2.0, 1e-3]))
    fit([scale_group(scale, 0.1, TOTAL, 0.25)], 2, lambda step: -scale.sum(), optim)
    assert scale.tolist() == pytest.approx([1.5, -1.5, 0.501])


@pytest.mark.parametrize("symmetric", [True, False])
def test_rates_of_lsq_are_those_of_its_formula_bit_for_bit(symmetric: bool) -> None:
    layer = QuantLinear(WEIGHT, None, QuantSpec(num_bits=3, group_size=16, symmetric=symmetric))
    assert bool((layer.scale < 0).any()) == symmetric
    settings = lsq.Config(travel=0.3, scale_travel=0.15)
    ends = settings.scale_travel / TOTAL
    weight_step = float(layer.qparams()[0].detach().abs().mean())
    trained = 2 if symmetric else 3  # the zero point of a symmetric grid is constant
    expected = [0.3 * weight_step / TOTAL, 0.15 * 2 / 7 / TOTAL, ends]
    assert [group.lr for group in grid_groups(layer, settings, TOTAL)] == expected[:trained]
    fixed = settings.model_copy(update={"lr": 2e-5, "scale_lr": 1e-4})
    assert [group.lr for group in grid_groups(layer, fixed, TOTAL)] == [2e-5, 1e-4, 1e-4][:trained]


def test_rates_of_lrqat_are_those_of_its_formula_bit_for_bit() -> None:
    settings = lrqat.Config(travel=0.7, scale_travel=0.15, rank=4)
    layer = lrqat.LowRankLinear(WEIGHT, None, QuantSpec(num_bits=3, group_size=16), settings, generator(0))
    assert bool((layer.scale < 0).any())
    found = [group.lr for group in lrqat.groups_of(layer, settings, TOTAL)]
    assert found == [0.7 / TOTAL, 0.15 * 2 / 7 / TOTAL]
    fixed = settings.model_copy(update={"lr": 2e-5, "scale_lr": 1e-4})
    assert [group.lr for group in lrqat.groups_of(layer, fixed, TOTAL)] == [2e-5, 1e-4]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_rates_of_block_ap_are_those_of_its_formula_bit_for_bit(rank: int, symmetric: bool) -> None:
    layer = random_layer(QuantSpec(num_bits=2, group_size=16, symmetric=symmetric), rank)
    assert bool((layer.scale < 0).any()) == symmetric
    norm = Norm(nn.Parameter(torch.ones(4)), nn.Parameter(torch.tensor([1.0, -3.0])), torch.float32)
    settings = config(travel=0.5, scale_share=0.2, zero_travel=3, norm_travel=0.1)
    step = float(layer.scale.detach().abs().mean())
    of_weight = 0.5 * step / TOTAL
    expected = [] if rank else [of_weight]
    expected += [0.2 / TOTAL] if symmetric else [0.2 / TOTAL, 3 / TOTAL]
    if rank:
        expected += [of_weight / step, of_weight / step * float(layer.get_parameter("down").detach().abs().mean())]
    expected.append(0.1 * float(norm.master.detach().abs().mean()) / TOTAL)
    assert [group.lr for group in block_ap.groups_of([layer], [norm], TOTAL, settings)] == expected


@pytest.mark.parametrize("symmetric", [True, False])
def test_rates_of_e2e_qp_are_those_of_its_formula_bit_for_bit(symmetric: bool) -> None:
    packed = random_layer(QuantSpec(num_bits=2, group_size=16, symmetric=symmetric)).freeze()
    layer, settings = ScaleLinear.of(packed, True, not symmetric), ScaleConfig(scale_share=0.2, zero_travel=3)
    assert bool((layer.scale < 0).any()) == symmetric
    expected = [0.2 / TOTAL] if symmetric else [0.2 / TOTAL, 3 / TOTAL]
    assert [group.lr for group in e2e_qp.groups_of(layer, TOTAL, settings)] == expected
