"""One contract for every method, the limits in which a method is another one, and plain references for the rest."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool import checkpoint, methods, progress
from qtool.blocks import BlockTask, Stage, run_blocks
from qtool.config import BITS, ModelConfig, QuantConfig, QuantSpec
from qtool.errors import RunError
from qtool.methods import awq, gptq, rtn
from qtool.methods.gptq import Statistics, collect, column_order, factorise, solve
from qtool.models import LoadedModel, Target, dense_weight, load_model, packed_linears
from qtool.quant.affine import QuantizedWeight, dequantize, minmax_qparams, quantize
from qtool.quant.ranges import search_qparams

W4 = QuantConfig(num_bits=4, group_size=16)
ORDERS: tuple[dict[str, Any], ...] = (
    {"act_order": "off"},
    {"act_order": "off", "static_groups": True},
    {"act_order": "group"},
    {"act_order": "group", "static_groups": True},
    {"act_order": "full", "static_groups": True},
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


QUICK: dict[str, dict[str, Any]] = {  # the contract does not ask for the best result
    "efficientqat": {
        "epochs": 0.1,
        "min_steps": 16,
        "batch_size": 2,
        "e2e": {"steps": 4, "batch_size": 2, "scale_travel": 0.01},
    },
    "signround": {"iterations": 20},
    "lrqat": {"batch_size": 2, "rank": 4, "travel": 0.1, "scale_travel": 0.02},
    "lsq": {"batch_size": 2, "travel": 0.1, "scale_travel": 0.02},
    "paretoq": {"batch_size": 2, "travel": 0.1, "scale_travel": 0.02},
    "qat": {"batch_size": 2, "travel": 0.1},
    "llmqat": {"batch_size": 2, "travel": 0.1},
}


# ---------------------------------------------------------------------------- the contract, for every method there is


@pytest.fixture(params=methods.names())
def method(request: pytest.FixtureRequest) -> methods.Method:
    return methods.get(request.param)


def run(
    method: methods.Method, loaded: LoadedModel, tokens: Tensor, quant: QuantConfig, **settings: Any
) -> dict[str, QuantizedWeight]:
    """Quantize ``loaded`` and return what became of each linear."""
    config = method.config(**QUICK.get(method.config.model_fields["name"].default, {}) | settings)
    series = method.run(loaded, tokens if method.needs_data(config) else None, quant, config, 0)
    if not method.end_to_end(config):
        assert all(len(values) == len(loaded.blocks()) for values in series.values())
    return {name: layer.quantized for name, layer in packed_linears(loaded.model).items()}


def same(ours: dict[str, QuantizedWeight], theirs: dict[str, QuantizedWeight]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)
        for a, b in ((ours[name], theirs[name]) for name in ours)
    )


def test_there_are_the_methods_that_users_know() -> None:
    trained = {"efficientqat", "llmqat", "lrqat", "lsq", "paretoq", "qat"}
    assert {"awq", "gptq", "hqq", "rtn", "signround"} | trained <= set(methods.names())


def test_a_method_says_what_it_is(method: methods.Method, request: pytest.FixtureRequest) -> None:
    assert method.config.model_fields["name"].default == request.node.callspec.params["method"]
    assert method.summary
    assert not method.summary.endswith(".")
    for name, field in method.config.model_fields.items():
        assert field.description or name == "name", f"{name} has no description"
        assert not field.is_required(), f"{name} has no default"


@pytest.mark.parametrize("symmetric", [True, False])
def test_packs_every_target_and_no_other_linear(
    method: methods.Method, llama: LoadedModel, tokens: Tensor, symmetric: bool
) -> None:
    quant = QuantConfig(num_bits=4, group_size=16, symmetric=symmetric)
    targets = {target.name: target.spec for target in llama.targets(quant)}
    result = run(method, llama, tokens, quant)
    assert {name: weight.spec for name, weight in result.items()} == targets
    assert [name for name, m in llama.model.named_modules() if isinstance(m, nn.Linear)] == ["lm_head"]
    for name, weight in result.items():
        assert int(weight.codes.max()) <= weight.spec.qmax, name
        assert bool((weight.zero_point == weight.spec.middle).all()) == symmetric, name
        assert float(weight.codes.float().std()) > 1, f"{name} has hardly any codes"


def test_same_arguments_same_bits(
    method: methods.Method, make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    """The global random state is no argument."""
    first, second = make_llama(), make_llama()
    torch.manual_seed(1)
    once = run(method, first, tokens, W4)
    torch.manual_seed(2)
    assert same(run(method, second, tokens, W4), once)
    for (name, one), other in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_survives_disk_with_equal_logits(method: methods.Method, family: str, tmp_path: Path, tokens: Tensor) -> None:
    loaded = tiny.load(tiny.FAMILIES[family](tmp_path / "float"))
    run(method, loaded, tokens, QuantConfig(num_bits=3, group_size=16, symmetric=False))
    with checkpoint.atomic_folder(tmp_path / "packed", overwrite=False) as partial:
        checkpoint.save(partial, loaded, tiny.specs(loaded))
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert set(packed_linears(restored)) == set(packed_linears(loaded.model))
    assert torch.equal(tiny.logits(restored), tiny.logits(loaded.model))


def test_keeps_zero_points_between_codes_where_asked_to(
    method: methods.Method, llama: LoadedModel, tmp_path: Path, tokens: Tensor
) -> None:
    result = run(method, llama, tokens, QuantConfig(num_bits=3, group_size=16, symmetric=False, float_zero=True))
    assert all(bool((weight.zero_point != weight.zero_point.round()).any()) for weight in result.values())
    with checkpoint.atomic_folder(tmp_path / "packed", overwrite=False) as partial:
        checkpoint.save(partial, llama, tiny.specs(llama))
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(tiny.logits(restored), tiny.logits(llama.model))


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_8_bits_leave_the_model_as_good_as_it_was(
    method: methods.Method, family: str, tmp_path: Path, tokens: Tensor
) -> None:
    loaded = tiny.load(tiny.FAMILIES[family](tmp_path / "float"))
    before = tiny.logits(loaded.model)
    run(method, loaded, tokens, QuantConfig(num_bits=8, group_size=16))
    assert 0 < float((tiny.logits(loaded.model) - before).norm() / before.norm()) < 0.03


def test_overrides_are_respected(method: methods.Method, llama: LoadedModel, tokens: Tensor) -> None:
    overrides: dict[str, Any] = {
        "*.q_proj": {"num_bits": 8},  # in one group with k and v, which have 4
        "*.v_proj": {"symmetric": False, "group_size": -1},
        "*.up_proj": {"skip": True},  # beside gate, which is quantized
        "*.down_proj": {"num_bits": 2, "scale_dtype": "float32"},
        "model.layers.1.mlp.*": {"skip": True},
    }
    floats = copy.deepcopy(llama)
    result = run(method, llama, tokens, QuantConfig(num_bits=4, group_size=16, overrides=overrides))
    labels = {name.removeprefix("model.layers."): weight.spec.label() for name, weight in result.items()}
    attention = {"q_proj": "w8g16", "k_proj": "w4g16", "v_proj": "w4pc asym", "o_proj": "w4g16"}
    assert labels == {
        **{f"{block}.self_attn.{name}": label for block in (0, 1) for name, label in attention.items()},
        "0.mlp.gate_proj": "w4g16",
        "0.mlp.down_proj": "w2g16",
    }
    for name, module in llama.model.named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(module.weight, floats.model.get_submodule(name).weight), name
    assert bool(torch.isfinite(tiny.logits(llama.model)).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_less_error(
    method: methods.Method, make_llama: Callable[[], LoadedModel], tokens: Tensor, symmetric: bool
) -> None:
    before = tiny.logits(make_llama().model)
    errors = []
    for bits in BITS:
        loaded = make_llama()
        run(method, loaded, tokens, QuantConfig(num_bits=bits, group_size=16, symmetric=symmetric))
        errors.append(float((tiny.logits(loaded.model) - before).norm() / before.norm()))
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.05 * errors[0]


def test_unknown_settings_are_refused(method: methods.Method) -> None:
    with pytest.raises(ValidationError, match="dampp"):
        method.config(dampp=1)


# -------------------------------------------------------------------------------------------------------------- rtn


@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_is_the_nearest_code_of_the_min_max_grid(llama: LoadedModel, symmetric: bool) -> None:
    quant = QuantConfig(num_bits=3, group_size=32, symmetric=symmetric, scale_dtype="bfloat16")
    weights = {target.name: target.weight.clone() for target in llama.targets(quant)}
    for name, found in run(methods.get("rtn"), llama, torch.empty(0), quant).items():
        w = weights[name].view(weights[name].shape[0], -1, 32)
        grid = ((torch.arange(8) - found.zero_point.unsqueeze(-1)) * found.scale.unsqueeze(-1)).unsqueeze(2)
        distance = (grid - w.unsqueeze(-1)).abs()
        chosen = distance.gather(-1, found.codes.view_as(w).long().unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(chosen, distance.amin(-1), rtol=0, atol=1e-6)


def test_rtn_reports_the_weight_error_of_each_block(llama: LoadedModel) -> None:
    targets = llama.targets(W4)
    weights = {target.name: target.weight.clone() for target in targets}
    series = rtn.run(llama, None, W4, rtn.Config(), 0)
    packed = packed_linears(llama.model)
    for block, error in enumerate(series["weight_error"]):
        names = [target.name for target in targets if target.block == block]
        change = sum(float((packed[name].dequantized() - weights[name]).square().sum()) for name in names)
        assert error == pytest.approx(change / sum(float(weights[name].square().sum()) for name in names), rel=1e-5)


def test_rtn_with_a_searched_range_has_less_weight_error(make_llama: Callable[[], LoadedModel]) -> None:
    quant = QuantConfig(num_bits=3, group_size=32)
    plain, searched = (
        rtn.run(make_llama(), None, quant, rtn.Config(range=kind, norm=2.0), 0)["weight_error"]
        for kind in ("minmax", "search")
    )
    assert all(ours < 0.95 * theirs for ours, theirs in zip(searched, plain, strict=True))


# ------------------------------------------------------------------------------------------------------------- gptq


def correlated_inputs(tokens: int, channels: int, seed: int = 0, rank: int = 12) -> Tensor:
    """Inputs as layers have them: few directions carry most, and some channels are loud."""
    mixing = torch.randn(rank, channels, generator=generator(seed))
    x = torch.randn(tokens, rank, generator=generator(seed + 1)) @ mixing
    x += 0.3 * torch.randn(tokens, channels, generator=generator(seed + 2))
    return x * torch.exp(torch.randn(channels, generator=generator(seed + 3)) * 0.5)


def statistics(*inputs: Tensor, floats: tuple[Tensor, ...] | None = None) -> Statistics:
    return collect(Stage([], list(inputs), None if floats is None else list(floats)), gptq.Config())


def gptq_weight(weight: Tensor, stats: Statistics, spec: QuantSpec, **settings: Any) -> QuantizedWeight:
    config = gptq.Config(**{"damp": 0.01} | settings)
    return solve(weight, factorise(stats, spec, config, "layer"), spec, config)


def output_error(weight: Tensor, found: QuantizedWeight, x: Tensor) -> float:
    return float((x.double() @ (dequantize(*found) - weight).double().T).square().sum())


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed)) * 0.05


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
                scale = (2 * torch.maximum(-low, high) / spec.qmax).half().double()
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
    columns = column_order(stats.hessian.diagonal(), spec, order["act_order"]).tolist()
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
    assert torch.allclose(whole.drift, 2 / 90 * (drifted - x).T @ x, rtol=1e-4, atol=1e-5)
    assert torch.allclose(split.drift, whole.drift, rtol=1e-4, atol=1e-5)
    assert statistics(x).drift is None


@given(st.integers(0, 999), st.sampled_from([4, 8, 48, -1]))
def test_group_order_keeps_groups_whole_and_takes_loud_channels_first(seed: int, group_size: int) -> None:
    diagonal = torch.rand(48, generator=generator(seed))
    spec = QuantSpec(group_size=group_size)
    order = column_order(diagonal, spec, "group")
    assert sorted(order.tolist()) == list(range(48))
    size = 48 if group_size == -1 else group_size
    groups = order.view(-1, size)
    assert bool((groups // size == groups[:, :1] // size).all())
    sorted_diagonal = diagonal[groups]
    assert bool((sorted_diagonal[:, 1:] <= sorted_diagonal[:, :-1]).all())
    assert bool((sorted_diagonal[1:, 0] <= sorted_diagonal[:-1, 0]).all())


def test_the_other_orders_are_as_they_lie_and_by_activation() -> None:
    diagonal = torch.tensor([1.0, 4.0, 2.0, 2.0])
    assert column_order(diagonal, QuantSpec(group_size=2), "off").tolist() == [0, 1, 2, 3]
    assert column_order(diagonal, QuantSpec(group_size=2), "full").tolist() == [1, 2, 3, 0]


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


class Notes(progress.Sink):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, message: str) -> None:
        self.texts.append(message)


def indefinite(share: float, size: int = 32) -> Tensor:
    """A Hessian spoiled by rounding: its smallest eigenvalue is ``-share`` of its mean diagonal."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator(0), dtype=torch.float64))[0]
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
    targets = alone.targets(W4)
    config = gptq.Config()
    gptq.run(together, tokens, W4, config, 0)

    def one_by_one(task: BlockTask) -> None:
        for stage in task.stages():
            for target in stage.targets:
                gptq.quantize_group(task, [target], collect(stage, config), config)

    run_blocks(alone, tokens, targets, one_by_one)
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
    scale = (2 * weight.abs().amax(1).double() / spec.qmax).half().double()
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
    plain = run(methods.get("gptq"), make_llama(), tokens, W4)
    steered = run(methods.get("gptq"), make_llama(), tokens, W4, gptaq=0.25)
    first = "model.layers.0.self_attn."
    for name in plain:
        drifted = name not in (f"{first}q_proj", f"{first}k_proj", f"{first}v_proj")  # these read what the model reads
        assert torch.equal(plain[name].codes, steered[name].codes) != drifted, name


# -------------------------------------------------------------------------------------------------------------- awq


def with_outliers(loaded: LoadedModel, strength: float = 30.0) -> LoadedModel:
    """A few channels of what each block's linears read are loud, as in real models."""
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                parameter[torch.tensor([3, 17, 40])] *= strength
            elif name.endswith("up_proj.weight"):
                parameter[torch.tensor([5, 50])] *= strength
    return loaded


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_that_scales_and_clips_nothing_is_rtn(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, symmetric: bool
) -> None:
    """``num_ratios: 1`` tries only the ratio 0, whose scale is one everywhere."""
    quant = QuantConfig(num_bits=4, group_size=16, symmetric=symmetric)
    ours, theirs = with_outliers(make_llama()), with_outliers(make_llama())
    found = run(methods.get("awq"), ours, tokens, quant, num_ratios=1, clip=False)
    assert same(found, run(methods.get("rtn"), theirs, tokens, quant))
    for name, parameter in theirs.model.named_parameters():
        assert torch.equal(ours.model.get_parameter(name), parameter), name


@pytest.mark.parametrize("bits", [3, 4])
def test_awq_lowers_the_block_error_where_channels_are_loud(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, bits: int
) -> None:
    quant = QuantConfig(num_bits=bits, group_size=32)

    def first_output(loaded: LoadedModel) -> Tensor:
        outputs: list[Tensor] = []
        run_blocks(loaded, tokens, [], lambda task: outputs.append(task.forward(task.inputs[0])))
        return outputs[0]

    def error(**settings: Any) -> float:
        loaded = with_outliers(make_llama(), 10)
        before = first_output(loaded)
        run(methods.get("awq"), loaded, tokens, quant, **settings)
        return float((first_output(loaded) - before).norm() / before.norm())

    nearest, scaled, clipped = error(num_ratios=1, clip=False), error(clip=False), error(num_ratios=1)
    assert scaled < 0.7 * nearest
    assert clipped < 0.9 * nearest
    assert error() < 0.7 * nearest


def test_awq_scales_loud_channels_up_and_moves_the_rest_into_the_norm(llama: LoadedModel, tokens: Tensor) -> None:
    """The function of the float parts is kept: norm and dequantized readers together are what they were."""
    loaded = with_outliers(llama)
    floats = copy.deepcopy(loaded)
    run(methods.get("awq"), loaded, tokens, QuantConfig(num_bits=8, group_size=16, scale_dtype="float32"))
    for block in (0, 1):
        name = f"model.layers.{block}.input_layernorm"
        norms = [model.model.get_submodule(name).weight for model in (floats, loaded)]
        s = norms[0] / norms[1]
        assert float(s[[3, 17, 40]].min()) > float(s.median()), "loud channels are not scaled up"
        linear = f"model.layers.{block}.self_attn.k_proj"
        old = dense_weight(floats.model.get_submodule(linear)) * norms[0]
        new = packed_linears(loaded.model)[linear].dequantized() * norms[1]
        assert float((new - old).norm() / old.norm()) < 0.02


def test_awq_judges_by_the_module_around_the_readers(llama: LoadedModel, tokens: Tensor) -> None:
    found: list[dict[str, str]] = []

    def visit(task: BlockTask) -> None:
        folds = awq.find_folds(task, task.inputs[0][:1])
        names = {module: name for name, module in task.block.named_modules()}
        found.append({names[fold.source]: names[awq.judged_module(task.block, fold)] for fold in folds})
        for target in task.targets:
            task.pack(target, rtn.round_to_nearest(target.weight, target.spec, rtn.Config()))

    run_blocks(llama, tokens, llama.targets(W4), visit)
    assert (
        found
        == [{"input_layernorm": "self_attn", "post_attention_layernorm": "mlp", "mlp.up_proj": "mlp.down_proj"}] * 2
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_is_never_worse_than_not_clipping_and_leaves_queries_and_keys(symmetric: bool) -> None:
    spec = QuantSpec(num_bits=3, group_size=16, symmetric=symmetric)
    weight = random_weight(8, 64)
    weight[:, ::16] *= 4  # one large weight in every group
    linear = nn.Linear(64, 8, bias=False)
    linear.weight.data.copy_(weight)
    x = correlated_inputs(300, 64).view(300, 4, 16).transpose(0, 1)
    moment = x.transpose(1, 2) @ x

    def errors(grid: tuple[Tensor, Tensor]) -> Tensor:
        change = (dequantize(quantize(weight, *grid, spec), *grid, spec) - weight).view(8, 4, 16)
        return torch.einsum("rgi,gti->rgt", change, x).square().sum(-1)

    minmax = minmax_qparams(weight, spec)
    clipped = awq.clipped_qparams(Target("mlp.up_proj", linear, spec, 0), moment, awq.Config())
    assert bool((errors(clipped) <= errors(minmax) * (1 + 1e-4)).all())
    assert float(errors(clipped).sum()) < 0.9 * float(errors(minmax).sum())
    for kept in (
        awq.clipped_qparams(Target("attn.q_proj", linear, spec, 0), moment, awq.Config()),
        awq.clipped_qparams(Target("mlp.up_proj", linear, spec, 0), moment, awq.Config(clip=False)),
        awq.clipped_qparams(Target("mlp.up_proj", linear, spec, 0), moment, awq.Config(clip_steps=1)),
    ):
        assert torch.equal(kept[0], minmax[0])
        assert torch.equal(kept[1], minmax[1])


def test_awq_on_a_checkpoint_in_half_precision_writes_norms_that_disk_holds(tmp_path: Path, tokens: Tensor) -> None:
    loaded = with_outliers(tiny.load(tiny.llama(tmp_path / "m", dtype=torch.bfloat16)))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.copy_(parameter.bfloat16())
    run(methods.get("awq"), loaded, tokens, W4)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter.bfloat16().float(), parameter), name


def test_awq_folds_the_same_norms_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model has a residual stream beside which the branches are small, as real ones have."""
    monkeypatch.setattr(awq, "search_scale", lambda task, fold, mean, *_: torch.linspace(0.5, 2, mean.numel()))
    tokens = torch.randint(2, 4096, (1, 48), generator=generator(0))
    folded: dict[str, list[str]] = {}
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(ModelConfig(path="builtin:wiki-llama-3m", dtype=dtype, device="cpu"))
        before = {
            name: parameter.clone() for name, parameter in loaded.model.named_parameters() if parameter.dim() == 1
        }
        run(methods.get("awq"), loaded, tokens, QuantConfig(num_bits=3, group_size=32), clip=False)
        after = dict(loaded.model.named_parameters())
        folded[dtype] = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert len(folded["float32"]) == 8  # both norms of four blocks
    assert folded["bfloat16"] == folded["float32"]
