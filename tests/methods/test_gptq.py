"""GPTQ and GPTAQ: the limits in which they are another method, and plain references for the rest."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.methods import W4, correlated_inputs, generator, random_weight, run, same
from helpers.notes import Notes
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job, load_method
from qtool.blocks.moments import Statistics, collect
from qtool.blocks.stages import Stage, stages
from qtool.blocks.task import BlockTask, Rows
from qtool.config.quant import BITS, QuantSpec
from qtool.methods import gptq, rtn
from qtool.methods.gptq import factorise, solve
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.targets import select_targets
from qtool.quant import hessian as sums
from qtool.quant.affine import QuantizedWeight, dequantize, minmax_qparams, quantize
from qtool.quant.ranges import search_qparams
from qtool.system import progress
from qtool.system.errors import RunError

ORDERS: tuple[dict[str, Any], ...] = (
    {"act_order": "off"},
    {"act_order": "off", "static_groups": True},
    {"act_order": "group"},
    {"act_order": "group", "static_groups": True},
    {"act_order": "full", "static_groups": True},
)

# ------------------------------------------------------------------------------------------------------------- gptq


def statistics(*inputs: Tensor, floats: tuple[Tensor, ...] | None = None) -> Statistics:
    return collect(Stage([], [Rows(x) for x in inputs], None if floats is None else [Rows(x) for x in floats]))


def gptq_weight(weight: Tensor, stats: Statistics, spec: QuantSpec, **settings: Any) -> QuantizedWeight:
    config = gptq.Config(**{"damp": 0.01} | settings)
    return solve(weight, factorise(stats, spec, config, "layer"), spec, config)


def output_error(weight: Tensor, found: QuantizedWeight, x: Tensor) -> float:
    return float((x.double() @ (dequantize(*found) - weight).double().T).square().sum())


@given(
    st.sampled_from(ORDERS),
    st.sampled_from(BITS),
    st.sampled_from([-1, 8, 16]),
    st.booleans(),
    st.sampled_from([1, 5, 16, 128]),
    st.integers(0, 99),
)
@settings(max_examples=25)
def test_gptq_with_an_identity_hessian_is_rtn(
    order: dict[str, Any], bits: int, group_size: int, symmetric: bool, block_size: int, seed: int
) -> None:
    """Bit for bit, in any order: no column says anything about another."""
    spec = QuantSpec(num_bits=bits, group_size=group_size, symmetric=symmetric)
    weight = random_weight(7, 48, seed)
    for kind in ("minmax", "search"):
        chosen = order | {"range": kind, "norm": 2.4, "block_size": block_size}
        found = gptq_weight(weight, Statistics(torch.eye(48), None), spec, **chosen)
        expected = rtn.round_to_nearest(weight, spec, rtn.Config(range=kind, norm=2.4))
        assert same({"": found}, {"": expected}), kind


def test_gptq_with_a_diagonal_hessian_is_rtn_for_unequal_channels_too() -> None:
    weight, spec = random_weight(7, 48), QuantSpec(num_bits=3, group_size=16)
    hessian = torch.diag(torch.logspace(-2, 2, 48)[torch.randperm(48, generator=generator(0))])
    for order in ORDERS:
        found = gptq_weight(weight, Statistics(hessian, None), spec, range="minmax", **order)
        assert same({"": found}, {"": rtn.round_to_nearest(weight, spec, rtn.Config())}), order


def reference_gptq(
    weight: Tensor, x: Tensor, spec: QuantSpec, order: list[int], static: bool, damp: float = 0.01
) -> Tensor:
    """Codes by the plain formulas in float64, one column at a time: OBS with the inverse Hessian itself.

    After column ``q`` is rounded, ``w -= (w_q - Q(w_q)) / [H^-1]_qq [H^-1]_q:`` and ``H^-1`` loses row and column
    ``q`` by one step of Gaussian elimination. No Cholesky factor and no blocks of columns.
    """
    w, x = weight.double().clone(), x.double()
    hessian = 2 / x.shape[0] * x.T @ x
    inverse = torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(w.shape[1], dtype=torch.float64))
    size = w.shape[1] if spec.group_size == -1 else spec.group_size
    grids: dict[int, tuple[Tensor, Tensor]] = {}
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    for q in order:
        group = q // size
        if group not in grids:
            columns = slice(group * size, (group + 1) * size)
            source = (weight.double() if static else w)[:, columns]
            low, high = source.amin(1).clamp(max=0), source.amax(1).clamp(min=0)
            if spec.symmetric:
                larger = torch.where(-low >= high, -low, -high)  # the end that is the lowest code
                scale = (larger / spec.middle if spec.signed else 2 * larger.abs() / spec.qmax).half().double()
                grids[group] = scale, torch.full_like(scale, spec.middle)
            else:
                scale = ((high - low) / spec.qmax).half().double()
                grids[group] = scale, (-low / scale).round().clamp(0, spec.qmax)
        scale, zero_point = grids[group]
        code = (w[:, q] / scale + zero_point).round().clamp(0, spec.qmax)
        codes[:, q] = code.to(torch.uint8)
        error = (w[:, q] - (code - zero_point) * scale) / inverse[q, q]
        w -= torch.outer(error, inverse[q])
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_gptq_is_the_plain_formula(order: dict[str, Any], group_size: int, symmetric: bool) -> None:
    """Every code equals that of a float64 reference that shares no step with the solver."""
    spec = QuantSpec(num_bits=3, group_size=group_size, symmetric=symmetric)
    weight, x = random_weight(6, 48), correlated_inputs(200, 48)
    stats = statistics(x)
    columns = sums.column_order(stats.hessian.diagonal(), spec, order["act_order"]).tolist()
    expected = reference_gptq(weight, x, spec, columns, order.get("static_groups", False))
    assert not torch.equal(expected, rtn.round_to_nearest(weight, spec, rtn.Config()).codes)
    for block_size in (128, 8, 1):
        found = gptq_weight(weight, stats, spec, range="minmax", block_size=block_size, **order)
        assert torch.equal(found.codes, expected), block_size


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_gptq_has_less_than_eight_tenths_of_the_error_of_rtn(order: dict[str, Any], bits: int, symmetric: bool) -> None:
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=symmetric)
    weight, x = random_weight(24, 64), correlated_inputs(400, 64)
    nearest = output_error(weight, rtn.round_to_nearest(weight, spec, rtn.Config()), x)
    for kind in ("minmax", "search", "weighted"):
        ours = output_error(weight, gptq_weight(weight, statistics(x), spec, range=kind, **order), x)
        assert ours < 0.8 * nearest, (kind, ours / nearest)


def test_gptq_gains_nothing_where_channels_are_independent() -> None:
    """The error of rounding cannot be made up for by channels that know nothing of it."""
    weight, x = random_weight(24, 64), torch.randn(100_000, 64, generator=generator(0))
    spec = QuantSpec(num_bits=4, group_size=16)
    nearest = output_error(weight, rtn.round_to_nearest(weight, spec, rtn.Config()), x)
    ours = output_error(weight, gptq_weight(weight, statistics(x), spec, range="minmax"), x)
    assert ours == pytest.approx(nearest, rel=0.05)


def test_statistics_do_not_depend_on_how_tokens_are_batched() -> None:
    x = correlated_inputs(90, 32)
    drifted = x + 0.1 * torch.randn(90, 32, generator=generator(9))
    whole = statistics(x, floats=(drifted,))
    split = statistics(*x.split([64, 26]), floats=drifted.split([64, 26]))
    assert torch.allclose(whole.hessian, 2 / 90 * x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.allclose(split.hessian, whole.hessian, rtol=1e-5, atol=1e-5)
    assert isinstance(whole.drift, Tensor)
    assert isinstance(split.drift, Tensor)
    assert torch.allclose(whole.drift, 2 / 90 * (drifted - x).T @ x, rtol=1e-4, atol=1e-5)
    assert torch.allclose(split.drift, whole.drift, rtol=1e-4, atol=1e-5)
    assert statistics(x).drift is None


@given(st.integers(0, 999), st.sampled_from([4, 8, 48, -1]))
def test_group_order_keeps_groups_whole_and_takes_loud_channels_first(seed: int, group_size: int) -> None:
    diagonal = torch.rand(48, generator=generator(seed))
    spec = QuantSpec(group_size=group_size)
    order = sums.column_order(diagonal, spec, "group")
    assert sorted(order.tolist()) == list(range(48))
    size = 48 if group_size == -1 else group_size
    groups = order.view(-1, size)
    assert bool((groups // size == groups[:, :1] // size).all())
    sorted_diagonal = diagonal[groups]
    assert bool((sorted_diagonal[:, 1:] <= sorted_diagonal[:, :-1]).all())
    assert bool((sorted_diagonal[1:, 0] <= sorted_diagonal[:-1, 0]).all())


def test_the_other_orders_are_as_they_lie_and_by_activation() -> None:
    diagonal = torch.tensor([1.0, 4.0, 2.0, 2.0])
    assert sums.column_order(diagonal, QuantSpec(group_size=2), "off").tolist() == [0, 1, 2, 3]
    assert sums.column_order(diagonal, QuantSpec(group_size=2), "full").tolist() == [1, 2, 3, 0]


def test_full_order_without_static_groups_is_refused() -> None:
    with pytest.raises(ValidationError, match="act_order: full needs static_groups: true"):
        gptq.Config(act_order="full")


@pytest.mark.parametrize("static", [True, False])
def test_static_groups_are_the_grids_of_the_original_weights(static: bool) -> None:
    weight, spec = random_weight(8, 64), QuantSpec(num_bits=3, group_size=16, symmetric=False)
    stats = statistics(correlated_inputs(300, 64))
    found = gptq_weight(weight, stats, spec, range="minmax", static_groups=static)
    expected = minmax_qparams(weight, spec)
    assert torch.equal(found.scale, expected[0]) == static
    assert torch.equal(found.zero_point, expected[1]) == static


@pytest.mark.parametrize("order", ["off", "group", "full"])
def test_a_weighted_range_knows_which_channel_is_which(order: str) -> None:
    """The cost of a column is known in the order of solving, the grid is fitted in that of the weight."""
    weight, spec = random_weight(8, 64), QuantSpec(num_bits=3, group_size=16)
    config = gptq.Config(static_groups=True, act_order=order, range="weighted", norm=2.0, damp=0.01)
    factor = factorise(statistics(correlated_inputs(300, 64)), spec, config, "layer")
    importance = torch.empty(64)
    importance[factor.order] = 1 / factor.upper.diagonal() ** 2
    found = solve(weight, factor, spec, config)
    expected = search_qparams(weight, spec, 2.0, importance)
    assert torch.equal(found.scale, expected[0])
    assert not torch.equal(found.scale, search_qparams(weight, spec, 2.0)[0])


def indefinite(share: float, size: int = 32) -> Tensor:
    """A Hessian spoiled by rounding: its smallest eigenvalue is ``-share`` of its mean diagonal."""
    basis: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator(0), dtype=torch.float64))[0]
    values = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    values[0] = -share
    hessian = basis @ torch.diag(values) @ basis.T
    return (hessian / hessian.diagonal().mean()).float()


@pytest.mark.parametrize(("share", "tries"), [(0.0, 0), (0.015, 1), (0.03, 2), (0.2, 4), (0.5, 5)])
def test_damping_goes_up_until_the_hessian_can_be_factorised_and_names_the_linear(share: float, tries: int) -> None:
    notes = Notes()
    spec = QuantSpec(num_bits=4, group_size=16)
    with progress.use(notes):
        factor = factorise(
            Statistics(indefinite(share), None), spec, gptq.Config(damp=0.01), "model.layers.3.mlp.up_proj"
        )
    assert bool(torch.isfinite(factor.upper).all())
    assert len(notes.texts) == tries
    assert all(note.startswith("model.layers.3.mlp.up_proj: the Hessian is not positive") for note in notes.texts)
    step = gptq.DAMP_LADDER[tries]
    damped = indefinite(share) + step * 0.01 * torch.eye(32)
    ordered = damped[factor.order][:, factor.order]
    assert torch.allclose(factor.upper.T @ factor.upper @ ordered, torch.eye(32), atol=2e-2)


@given(st.integers(1, 40), st.sampled_from([1, 3, 8, 64]), st.integers(0, 99))
def test_the_factor_is_the_cholesky_factor_of_the_inverse_whatever_part_is_worked_on(
    groups: int, part: int, seed: int
) -> None:
    """Against LAPACK in float64, for sizes that are, and are not, whole numbers of parts."""
    size = groups * 3
    inputs = torch.randn(size + 50, size, generator=generator(seed))
    spec, config = QuantSpec(num_bits=4, group_size=3), gptq.Config(damp=0.1, act_order="group")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "PART", part)
        stats = statistics(inputs)
        factor = factorise(stats, spec, config, "layer")
    hessian = 2 / len(inputs) * inputs.double().T @ inputs.double()
    torch.testing.assert_close(stats.hessian.double(), hessian, atol=1e-5, rtol=1e-5)
    assert torch.equal(stats.hessian, stats.hessian.T)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(size)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped[factor.order][:, factor.order]), upper=True)
    torch.testing.assert_close(factor.upper.double(), expected, atol=1e-4, rtol=1e-3)
    assert torch.equal(factor.upper, factor.upper.triu())


@pytest.mark.parametrize("hessian", [indefinite(5.0), torch.full((32, 32), float("nan"))], ids=["indefinite", "NaN"])
def test_a_hessian_that_no_damping_helps_ends_the_run_and_names_the_linear(hessian: Tensor) -> None:
    with pytest.raises(RunError, match=r"^layers\.0\.v_proj: the Hessian cannot be factorised even with damping 1 "):
        factorise(Statistics(hessian, None), QuantSpec(group_size=16), gptq.Config(damp=0.01), "layers.0.v_proj")


def test_fewer_tokens_than_channels_are_enough() -> None:
    """The Hessian is singular; damping makes it regular."""
    weight, x = random_weight(16, 64), correlated_inputs(5, 64)
    spec = QuantSpec(num_bits=4, group_size=16)
    found = gptq_weight(weight, statistics(x), spec)
    assert output_error(weight, found, x) < 0.3 * output_error(
        weight, rtn.round_to_nearest(weight, spec, rtn.Config()), x
    )


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_channels_that_are_never_active_keep_their_weights(order: dict[str, Any]) -> None:
    """They are rounded to nearest, on a grid that they share, and do not disturb the others."""
    weight, x = random_weight(8, 64), correlated_inputs(300, 64)
    x[:, 5] = x[:, 16:32] = 0  # one among others, and a whole group
    spec = QuantSpec(num_bits=4, group_size=16)
    found = gptq_weight(weight, statistics(x), spec, range="minmax", **order)
    dead = [5, *range(16, 32)]
    assert torch.equal(found.codes[:, dead], quantize(weight, found.scale, found.zero_point, spec)[:, dead])
    assert torch.equal(found.scale[:, 1], minmax_qparams(weight, spec)[0][:, 1])
    assert output_error(weight, found, x) < 0.8 * output_error(
        weight, rtn.round_to_nearest(weight, spec, rtn.Config()), x
    )


def test_an_input_that_is_always_zero_gives_rtn() -> None:
    weight, spec = random_weight(8, 32), QuantSpec(num_bits=4, group_size=16)
    found = gptq_weight(weight, statistics(torch.zeros(50, 32)), spec, range="minmax")
    assert same({"": found}, {"": rtn.round_to_nearest(weight, spec, rtn.Config())})


def test_linears_that_share_an_input_are_solved_together_as_each_alone(
    make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    """Rows do not touch each other: stacking q, k and v changes nothing but the time."""
    together, alone = make_llama(), make_llama()
    targets = select_targets(alone, W4)
    config = gptq.Config()
    gptq.run(Job.select(together, W4, tokens), config)

    def one_by_one(task: BlockTask) -> None:
        for stage in stages(task):
            for target in stage.targets:
                gptq.quantize_group(task, [target], collect(stage, config.token_weights), config)

    run_blocks(Job(alone, tuple(targets), tokens), one_by_one)
    first, second = packed_linears(together.model), packed_linears(alone.model)
    for name in first:
        agreement = (first[name].quantized.codes == second[name].quantized.codes).float().mean()
        assert float(agreement) > 0.999, name  # matrices of another height may be summed in another order


# ------------------------------------------------------------------------------------------------------------ gptaq


def drifting_inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs from the quantized stream, and what the float stream has in their place."""
    x = correlated_inputs(600, 64, seed)
    return x, x + 0.3 * x.std() * correlated_inputs(600, 64, seed + 50) / 3


def float_error(weight: Tensor, found: QuantizedWeight, x: Tensor, floats: Tensor) -> float:
    """``|W x_float - Q x|**2``."""
    return float((floats.double() @ weight.double().T - x.double() @ dequantize(*found).double().T).square().sum())


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_gptaq_without_drift_is_gptq(order: dict[str, Any]) -> None:
    weight, (x, _) = random_weight(16, 64), drifting_inputs()
    spec = QuantSpec(num_bits=3, group_size=16)
    with_term = gptq_weight(weight, statistics(x, floats=(x,)), spec, gptaq=0.25, **order)
    assert same({"": with_term}, {"": gptq_weight(weight, statistics(x), spec, **order)})


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_gptaq_steers_towards_the_float_outputs(order: dict[str, Any], seed: int) -> None:
    weight, (x, floats) = random_weight(16, 64, seed), drifting_inputs(seed)
    spec = QuantSpec(num_bits=4, group_size=16)
    stats = statistics(x, floats=(floats,))
    plain = float_error(weight, gptq_weight(weight, statistics(x), spec, range="minmax", **order), x, floats)
    errors = [
        float_error(weight, gptq_weight(weight, stats, spec, range="minmax", gptaq=strength, **order), x, floats)
        for strength in (0.25, 1.0)
    ]
    assert errors[0] < plain, (errors, plain)
    assert errors[1] < plain, (errors, plain)


def reference_gptaq(weight: Tensor, x: Tensor, floats: Tensor, spec: QuantSpec, strength: float) -> Tensor:
    """Codes by the formula of methods.md 6.4 in float64, columns as they lie, one block: ``w_i P_i`` after each."""
    w, x, floats = weight.double().clone(), x.double(), floats.double()
    hessian, drift = 2 / x.shape[0] * x.T @ x, 2 / x.shape[0] * (floats - x).T @ x
    size = w.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    correction = strength * (drift @ upper.T).triu(1) @ upper
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))[:, 0].double()
    scale = (-largest / spec.middle).half().double()  # the largest weight is the lowest code
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    for i in range(size):
        column = w[:, i].clone()
        code = (column / scale + spec.middle).round().clamp(0, spec.qmax)
        codes[:, i] = code.to(torch.uint8)
        error = (column - (code - spec.middle) * scale) / upper[i, i]
        w[:, i:] += torch.outer(column, correction[i, i:]) - torch.outer(error, upper[i, i:])
    return codes


def test_gptaq_is_the_plain_formula() -> None:
    weight, (x, floats) = random_weight(16, 64), drifting_inputs()
    spec = QuantSpec(num_bits=4, group_size=-1)
    stats = statistics(x, floats=(floats,))
    found = gptq_weight(weight, stats, spec, range="minmax", act_order="off", gptaq=0.25, block_size=64)
    expected = reference_gptaq(weight, x, floats, spec, 0.25)
    assert torch.equal(found.codes, expected)
    assert not torch.equal(found.codes, reference_gptaq(weight, x, floats, spec, 0.0))


def test_gptaq_runs_through_a_model_and_changes_it(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    plain = run(load_method("gptq"), make_llama(), tokens, W4)
    steered = run(load_method("gptq"), make_llama(), tokens, W4, gptaq=0.25)
    first = "model.layers.0.self_attn."
    for name in plain:
        drifted = name not in (f"{first}q_proj", f"{first}k_proj", f"{first}v_proj")  # these read what the model reads
        assert torch.equal(plain[name].codes, steered[name].codes) != drifted, name
