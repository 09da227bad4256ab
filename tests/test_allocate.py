"""Widths under a budget: solvers against brute force, what a budget counts, and what a run makes of a plan."""

import copy
import itertools
import json
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_state import Killed, hashes, killed_at_rename, quantize, stop_after

from qtool import allocate, cli, evaluate, knapsack, recipe, run, sensitivity
from qtool.allocate import Plan, units_of
from qtool.budget import BudgetConfig
from qtool.checkpoint import Source, folder_bytes
from qtool.config import QuantConfig, QuantOverride, QuantSpec
from qtool.data import Calibration
from qtool.errors import InputError, RunError
from qtool.knapsack import SOLVERS, exact, total
from qtool.methods import gptq
from qtool.models import LoadedModel, Target, dense_weight, packed_linears, weight_of
from qtool.quant.affine import dequantize
from qtool.quant.affine import quantize as codes_of
from qtool.quant.ranges import search_qparams
from qtool.sensitivity import ESTIMATORS, Unit, compensated, merged, nearest, rounded_unit

WIDTHS = (2, 3, 4, 8)
BLOCK = ["self_attn: q_proj, k_proj, v_proj", "self_attn: o_proj", "mlp: gate_proj, up_proj", "mlp: down_proj"]


def budgeted(quant: QuantConfig | None = None, **budget: object) -> QuantConfig:
    """A grid with a budget."""
    return (quant or QuantConfig(group_size=32)).model_copy(update={"budget": BudgetConfig.model_validate(budget)})


def planned(loaded: LoadedModel, quant: QuantConfig, tokens: torch.Tensor) -> Plan:
    return allocate.plan(loaded, lambda: loaded, units_of(loaded, quant), quant, Calibration(tokens))


# ------------------------------------------------------------------------------------------------------------ solvers


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int]:
    """Up to five items; costs need not fall, and may be equal."""
    sizes, costs = [], []
    for _ in range(draw(st.integers(1, 5))):
        sizes.append(sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=4))))
        number = st.floats(0, 4) | st.integers(0, 3).map(float)
        costs.append(draw(st.lists(number, min_size=len(sizes[-1]), max_size=len(sizes[-1]))))
    return sizes, costs, sum(size[0] for size in sizes) + draw(st.integers(0, 60))


def cheapest(sizes: list[list[int]], costs: list[list[float]], capacity: int) -> float:
    """By trying everything."""
    every = itertools.product(*(range(len(size)) for size in sizes))
    return min(total(costs, chosen) for chosen in every if total(sizes, chosen) <= capacity)


@given(instances())
def test_dp_finds_what_trying_everything_finds(instance: tuple[list[list[int]], list[list[float]], int]) -> None:
    sizes, costs, capacity = instance
    assert total(costs, exact(sizes, costs, capacity)) == pytest.approx(cheapest(*instance), abs=1e-7)


@given(instances(), st.sampled_from(sorted(SOLVERS)))
def test_no_solver_exceeds_the_budget_or_makes_the_smallest_choice_worse(
    instance: tuple[list[list[int]], list[list[float]], int], solver: str
) -> None:
    sizes, costs, capacity = instance
    chosen = SOLVERS[solver](*instance)
    assert total(sizes, chosen) <= capacity
    assert total(costs, chosen) <= total(costs, [0] * len(sizes)) + 1e-9


@given(instances(), st.integers(0, 20), st.sampled_from(["dp", "lagrangian"]))
def test_more_budget_never_costs_more(
    instance: tuple[list[list[int]], list[list[float]], int], more: int, solver: str
) -> None:
    sizes, costs, capacity = instance
    before, after = (total(costs, SOLVERS[solver](sizes, costs, c)) for c in (capacity, capacity + more))
    assert after <= before + 1e-7


@given(instances())
def test_lagrangian_is_optimal_for_the_size_that_it_uses(
    instance: tuple[list[list[int]], list[list[float]], int],
) -> None:
    sizes, costs, _ = instance
    chosen = knapsack.lagrangian(*instance)
    assert total(costs, chosen) <= cheapest(sizes, costs, total(sizes, chosen)) + 1e-7


@pytest.mark.parametrize("solver", ["dp", "lagrangian"])
def test_the_worked_example_of_the_closed_form(solver: str) -> None:
    """``b_l = mean + log2(a_l s_l) / 2 - ...`` for errors ``a s 4**-b``: 6.1, 5.1, 4.1 and 3.1 bits."""
    weights, sensitivity = (100, 100, 400, 400), (4 * 1.0, 1 * 1.0, 1 * 0.25, 0.25 * 0.25)
    mean = sum(n * math.log2(a) for n, a in zip(weights, sensitivity, strict=True)) / sum(weights)
    expected = [4 + math.log2(a) / 2 - mean / 2 for a in sensitivity]
    assert expected == pytest.approx([6.1, 5.1, 4.1, 3.1])
    tenths = range(11, 82)
    sizes = [[n * bits for bits in tenths] for n in weights]
    costs = [[n * a * 4 ** (-bits / 10) for bits in tenths] for n, a in zip(weights, sensitivity, strict=True)]
    chosen = SOLVERS[solver](sizes, costs, 40 * sum(weights))
    assert [tenths[index] / 10 for index in chosen] == pytest.approx(expected)


@pytest.mark.parametrize("odd", [0, 1])
def test_dp_is_exact_on_the_shapes_of_a_large_model(odd: int) -> None:
    """Against a plain dynamic program over every reachable size; with odd sizes, which share no factor, the bound."""
    shapes = [3 * 4096 * 4096 + odd, 4096 * 4096 + 3 * odd, 2 * 4096 * 11008 + 7 * odd, 4096 * 11008 + 5 * odd]
    generator = torch.Generator().manual_seed(0)
    sizes = [[n * bits for bits in WIDTHS] for _ in range(32) for n in shapes]
    costs = [[float(a) * 4.0**-bits for bits in WIDTHS] for a in torch.randn(128, generator=generator).exp()]
    capacity = 3 * 32 * sum(shapes)
    chosen = exact(sizes, costs, capacity)
    assert total(sizes, chosen) <= capacity
    lower = knapsack.lagrangian(sizes, costs, capacity)
    assert total(costs, chosen) <= total(costs, knapsack.greedy(sizes, costs, capacity, lower))
    if not odd:
        assert total(costs, chosen) == pytest.approx(dense_optimum(sizes, costs, capacity), rel=1e-9)


def dense_optimum(sizes: list[list[int]], costs: list[list[float]], capacity: int) -> float:
    """One number for each size there may be, in units of the common divisor."""
    unit = math.gcd(*(n for size in sizes for n in size))
    room = capacity // unit
    best = torch.zeros(room + 1, dtype=torch.float64)
    for size, cost in zip(sizes, costs, strict=True):
        options = [
            F.pad(best[: room + 1 - n // unit], (n // unit, 0), value=torch.inf) + c
            for n, c in zip(size, cost, strict=True)
        ]
        best = torch.stack(options).amin(0)
    return float(best.min())


# ---------------------------------------------------------------------------------------------------- units and limits


def test_units_are_what_engines_fuse(llama: LoadedModel) -> None:
    names = [unit.name for unit in units_of(llama, budgeted(average_bits=4))]
    assert names == [f"model.layers.{i}.{part}" for i in range(2) for part in BLOCK]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_units_of_other_architectures(family: str, tmp_path) -> None:
    loaded = tiny.load(tiny.FAMILIES[family](tmp_path / family))
    units = units_of(loaded, budgeted(average_bits=4))
    assert len(units) == 2 * 4
    shared = "attn: c_attn" if family == "gpt2" else "self_attn: q_proj, k_proj, v_proj"
    assert units[0].name.endswith(shared)


def test_experts_of_a_layer_are_one_unit() -> None:
    spec = QuantSpec()
    names = [f"model.layers.{i}.mlp.experts.{e}.{p}" for i in (0, 1) for e in (0, 1) for p in ("up_proj", "down_proj")]
    groups = [[Target(name, torch.nn.Linear(1, 1), spec, 0)] for name in ["model.layers.0.mlp.gate", *names]]
    assert [len(unit) for unit in merged(groups)] == [1, 4, 4]


@pytest.mark.parametrize("average_bits", [2.6, 3.0, 3.7, 5.0])
@pytest.mark.parametrize("quant", [QuantConfig(group_size=32), QuantConfig(group_size=16, symmetric=False)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_average_bits_count_scales_and_zero_points(llama, tokens, average_bits, quant, solver) -> None:
    if quant.group_size == 16 and average_bits < 3.2:
        average_bits += 0.7
    plan = planned(llama, budgeted(quant, average_bits=average_bits, estimator="variance", solver=solver), tokens)
    assert average_bits - 0.7 < plan.bits_per_weight <= average_bits
    targets = llama.targets(plan.applied(quant))
    stored = sum(t.spec.bits_per_weight(t.weight_shape[1]) * t.weight.numel() for t in targets)
    assert stored / sum(t.weight.numel() for t in targets) == plan.bits_per_weight


def test_more_bits_never_raise_the_predicted_cost(llama, tokens) -> None:
    budgets = [2.5 + i / 10 for i in range(30)]
    plans = [planned(llama, budgeted(average_bits=bits, estimator="variance"), tokens) for bits in budgets]
    assert all(later.cost <= before.cost for before, later in itertools.pairwise(plans))
    assert {each.num_bits for each in plans[0].allotments} == {2}
    assert len({plan.bits_per_weight for plan in plans}) > 10


def test_pins_and_floors_hold_for_all_that_is_fused(llama, tokens) -> None:
    quant = budgeted(
        average_bits=3.6,
        estimator="variance",
        choices=[2, 3, 4],
        floors={"*.down_proj": 3},
        pins={"*.1.*.q_proj": 8},
    )
    plan = planned(llama, quant, tokens)
    found = {target.name: target.spec.num_bits for target in llama.targets(plan.applied(quant))}
    assert all(bits >= 3 for name, bits in found.items() if name.endswith("down_proj"))
    assert {found[f"model.layers.1.self_attn.{p}_proj"] for p in "qkv"} == {8}
    assert set(found.values()) >= {2, 8}
    assert all(bits in (2, 3, 4, 8) for bits in found.values())


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"pins": {"*.w_proj": 4}}, r"quant\.budget\.pins: no quantized linear matches '\*\.w_proj'"),
        ({"floors": {"*.w_proj": 4}}, r"quant\.budget\.floors: no quantized linear matches"),
        ({"pins": {"*q_proj": 4, "*k_proj": 3}}, r"q_proj, k_proj, v_proj share one width, and .* gives them 3, 4"),
        (
            {"pins": {"*q_proj": 3}, "floors": {"*v_proj": 4}},
            r"have a floor of 4 bits, and quant\.budget pins them to 3",
        ),
        ({"choices": [2, 3], "floors": {"*v_proj": 4}}, r"have a floor of 4 bits, and quant\.budget has choices 2, 3"),
        ({"average_bits": 2.4}, r"average_bits is 2\.4, and the least that is possible is 2\.5000 bits per weight"),
        ({"floors": {"*": 3}, "average_bits": 3.2}, r"the least that is possible is 3\.5000 bits"),
    ],
)
def test_what_cannot_be_is_refused(llama, budget, message) -> None:
    with pytest.raises(InputError, match=message):
        units_of(llama, budgeted(**{"average_bits": 6} | budget))


def test_a_size_below_the_least_is_refused_with_the_least(llama, tokens) -> None:
    with pytest.raises(InputError, match=r"the least that is possible is [0-9,]+ bytes, of which") as found:
        units_of(llama, budgeted(size=50_000))
    least = int(str(found.value).split("possible is ")[1].split(" bytes")[0].replace(",", ""))
    with pytest.raises(InputError):
        units_of(llama, budgeted(size=least - 1))
    plan = planned(llama, budgeted(size=least, estimator="variance"), tokens)
    assert {each.num_bits for each in plan.allotments} == {2}
    assert plan.num_bytes <= least


def test_a_budget_is_one_number() -> None:
    for wrong in ({}, {"average_bits": 3, "size": "1GB"}, {"average_bits": 3, "choices": [3, 2]}):
        with pytest.raises(ValidationError):
            BudgetConfig.model_validate(wrong)
    assert BudgetConfig.model_validate({"size": "2.1GB"}).size == 2_100_000_000


def test_widths_come_from_one_place() -> None:
    with pytest.raises(InputError, match=r"no quant\.budget"):
        allocate.check(QuantConfig())
    fixed = {"*.q_proj": QuantOverride.model_validate({"num_bits": 8})}
    with pytest.raises(InputError, match=r"gives num_bits to '\*\.q_proj'.*quant\.budget\.pins"):
        allocate.check(budgeted(QuantConfig(overrides=fixed), average_bits=3))
    other = {"*.q_proj": QuantOverride.model_validate({"group_size": 16})}
    allocate.check(budgeted(QuantConfig(overrides=other), average_bits=3))


# ---------------------------------------------------------------------------------------------------------- estimators


def units_with(loaded: LoadedModel) -> list[Unit]:
    return units_of(loaded, budgeted(average_bits=8.5))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_estimators_rank_a_planted_unit_above_a_harmless_one(estimator, family, tmp_path, tokens) -> None:
    loaded = tiny.load(tiny.FAMILIES[family](tmp_path / family))
    loud, quiet = {
        "llama": ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"),
        "gpt2": ("transformer.h.1.mlp.c_proj", "transformer.h.0.attn.c_proj"),
    }[family]
    for name, factor in ((loud, 30), (quiet, 1e-3)):
        weight = weight_of(loaded.model.get_submodule(name))
        weight.data = weight.data * factor  # not in place: it lies in a mapped file, whose pages may be dropped
    units = units_with(loaded)
    costs = ESTIMATORS[estimator].measure(loaded, units, Calibration(tokens), nearest)
    by_name = {unit.targets[0].name: cost for unit, cost in zip(units, costs, strict=True)}
    for bits in (2, 3, 4):
        assert by_name[loud][bits] > 100 * by_name[quiet][bits]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_more_bits_cost_less_and_the_model_stays_what_it_was(estimator, llama, tokens) -> None:
    before = copy.deepcopy(llama.model.state_dict())
    costs = ESTIMATORS[estimator].measure(llama, units_with(llama), Calibration(tokens), nearest)
    assert all(c[2] > c[3] > c[4] > c[8] > 0 for c in costs)
    after = llama.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad or p.grad is not None for p in llama.model.parameters())


def error_of(target: Target, bits: int) -> torch.Tensor:
    spec = target.spec.model_copy(update={"num_bits": bits})
    grid = search_qparams(target.weight, spec)
    return dequantize(codes_of(target.weight, *grid, spec), *grid, spec) - target.weight


def test_hessian_is_the_trace_times_the_error(llama, tokens) -> None:
    units = units_with(llama)
    read: dict[str, torch.Tensor] = {}
    for target in llama.targets(QuantConfig(group_size=32)):
        target.linear.register_forward_pre_hook(lambda _, args, name=target.name: read.__setitem__(name, args[0]))
    costs = ESTIMATORS["hessian"].measure(llama, units, Calibration(tokens), nearest)
    llama.model(tokens)
    for unit, cost in zip(units, costs, strict=True):
        expected = sum(float(read[t.name].square().mean() * error_of(t, 3).square().sum()) for t in unit.targets)
        assert cost[3] == pytest.approx(expected, rel=1e-4)


def test_fisher_is_the_mean_square_of_gradients_times_the_error(llama, tokens) -> None:
    units = units_with(llama)
    costs = ESTIMATORS["fisher"].measure(llama, units, Calibration(tokens), nearest)
    target = units[3].targets[0]
    weight = weight_of(llama.model.get_submodule(target.name)).requires_grad_(True)
    squares = torch.zeros_like(weight)
    for window in tokens:
        logits = llama.model(window[None]).logits[0, :-1]
        squares += torch.autograd.grad(F.cross_entropy(logits, window[1:]), weight)[0].square() / len(tokens)
    expected = float((squares * error_of(target, 2).square()).sum()) * tokens.shape[1] / 2
    assert costs[3][2] == pytest.approx(expected, rel=1e-4)


def test_loss_is_the_divergence_when_one_unit_is_rounded(llama, tokens) -> None:
    units, reference = units_with(llama)[:2], copy.deepcopy(llama.model)
    costs = ESTIMATORS["loss"].measure(llama, units, Calibration(tokens), nearest)
    for unit, cost in zip(units, costs, strict=True):
        with rounded_unit(llama, unit, 2):
            for target in unit.targets:
                moved = dense_weight(llama.model.get_submodule(target.name)) - target.weight
                assert moved.abs().max() == 0  # the target's own linear is rounded here, too
            expected, _ = evaluate.divergence(llama.model, reference, tokens, "auto")
        assert cost[2] == pytest.approx(expected.value, rel=1e-3)


def test_compensated_weights_are_those_of_gptq(make_llama, tokens) -> None:
    """In the first block, whose first linears read the same in a model that is quantized and in one that is not."""
    loaded, text = make_llama(), Calibration(tokens)
    units = units_with(loaded)
    weights = compensated(loaded, units, text)
    quantized = make_llama()
    gptq.run(quantized, tokens, QuantConfig(num_bits=3, group_size=32), gptq.Config(), 0)
    layers = packed_linears(quantized.model)
    for target in units[0].targets:
        same = weights(target, 3) == dequantize(*layers[target.name].quantized)
        assert same.float().mean() > 0.99  # there q, k and v are solved in one product, whose sums have another order
    nearer = ESTIMATORS["block"].measure(loaded, units, text, weights)
    for cost, plain in zip(nearer, ESTIMATORS["block"].measure(loaded, units, text, nearest), strict=True):
        assert cost[3] < plain[3]


def test_delta_loss_is_the_gradient_at_the_rounded_weight_times_the_error(llama, tokens) -> None:
    unit = units_with(llama)[3]
    cost = ESTIMATORS["delta-loss"].measure(llama, [unit], Calibration(tokens), nearest)[0][3]
    target = unit.targets[0]
    error, weight = error_of(target, 3), weight_of(llama.model.get_submodule(target.name))
    weight.data += error
    weight.requires_grad_(True)
    logits = llama.model(tokens).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert cost == pytest.approx(float((torch.autograd.grad(loss, weight)[0] * error).abs().sum()), rel=1e-3)


def test_only_learned_tokens_count(llama, tokens) -> None:
    """Labels that leave out a window's tokens give what the other windows give alone."""
    labels = tokens.clone()
    labels[2:] = -100
    units = units_with(llama)[:1]
    for name in ("loss", "delta-loss"):
        masked = ESTIMATORS[name].measure(llama, units, Calibration(tokens, labels), nearest)
        alone = ESTIMATORS[name].measure(llama, units, Calibration(tokens[:2]), nearest)
        assert masked[0][2] == pytest.approx(alone[0][2], rel=1e-4)


def test_a_cost_that_is_no_number_ends_the_run(llama, tokens, monkeypatch) -> None:
    broken = sensitivity.Estimator(
        lambda _, units, *rest: [dict.fromkeys(u.choices, math.nan) for u in units], False, False
    )
    monkeypatch.setitem(ESTIMATORS, "variance", broken)
    with pytest.raises(RunError, match=r"layers\.0\.self_attn: q_proj, k_proj, v_proj: estimator variance found"):
        planned(llama, budgeted(average_bits=3, estimator="variance"), tokens)


# ------------------------------------------------------------------------------------------------------ plans and runs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A float model of three blocks and text for it."""
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "float", blocks=3, tied=True)
    (folder / "text.txt").write_text("\n".join(tiny.PROSE * 40), encoding="utf-8")
    return folder


METHODS = {
    "rtn": {"name": "rtn"},
    "gptq": {"name": "gptq"},
    "efficientqat": {"name": "efficientqat", "min_steps": 4, "epochs": 0.1, "e2e": {"steps": 3}},
    "lrqat": {"name": "lrqat", "rank": 4, "steps": 3, "tracker": "none"},
}


def make(models, output, method="gptq", budget=None, **sections):
    """The recipe of a run, as a file."""
    raw = {
        "model": {"path": str(models / "float")},
        "method": METHODS[method],
        "quant": {"group_size": 32, "budget": budget or {"average_bits": 3.5, "estimator": "loss"}},
        "data": {"source": str(models / "text.txt"), "num_samples": 8, "seq_len": 32},
        "output": {"path": str(output)},
    } | sections
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def manifest_of(output):
    return json.loads((output / "qtool.json").read_text())


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """Files and plan of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    quantize(recipe.load(make(models, output)))
    return hashes(output), Plan.model_validate(manifest_of(output)["plan"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_plan_and_its_result_is_evaluated_and_exported(models, tmp_path, method) -> None:
    exports = [{"format": name, "path": str(tmp_path / name)} for name in ("compressed-tensors", "dense")]
    sections = {"export": exports, "eval": {"tasks": ["generated", "kl"], "limit": 2, "context": 32}}
    budget = {"average_bits": 3.4, "estimator": "hessian"}
    outcome = quantize(recipe.load(make(models, tmp_path / "out", method, budget, **sections)))
    plan = Plan.model_validate(manifest_of(tmp_path / "out")["plan"])
    specs = Source(tmp_path / "out").specs
    assert {name: spec.num_bits for name, spec in specs.items()} == {
        name: each.num_bits for each in plan.allotments for name in each.linears
    }
    assert len({spec.num_bits for spec in specs.values()}) > 1
    assert outcome.report.bits_per_weight == plan.bits_per_weight <= 3.4
    assert outcome.report.label.startswith("mixed ")
    assert all(row.value is not None and math.isfinite(row.value) for row in outcome.report.results)
    assert [path.name for path in outcome.exports] == ["compressed-tensors", "dense"]


@pytest.mark.parametrize("method", ["rtn", "gptq", "efficientqat"])
def test_the_files_of_a_run_are_within_a_size(models, tmp_path, method) -> None:
    size = 110_000
    outcome = quantize(recipe.load(make(models, tmp_path / "out", method, {"size": size, "estimator": "variance"})))
    plan = Plan.model_validate(manifest_of(tmp_path / "out")["plan"])
    assert folder_bytes(tmp_path / "out") == outcome.report.quantized_bytes <= plan.num_bytes <= size
    assert plan.num_bytes - folder_bytes(tmp_path / "out") < 0.03 * size
    assert len({each.num_bits for each in plan.allotments}) > 1


def test_formats_of_one_grid_refuse_a_budget_before_any_width_is_measured(models, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ESTIMATORS, "loss", None)
    file = make(models, tmp_path / "out", export=[{"format": "gptq", "path": str(tmp_path / "gptq")}])
    with pytest.raises(InputError, match="it has 2 different grids"):
        quantize(recipe.load(file))


def test_a_run_chooses_what_qtool_plan_shows(models, tmp_path, whole) -> None:
    """The run streams the model, and ``plan`` does not."""
    for estimator in ("loss", "hessian"):
        file = make(models, tmp_path / estimator, budget={"average_bits": 3.5, "estimator": estimator})
        shown = run.plan(recipe.load(file))
        if estimator == "loss":
            made = whole[1]
        else:
            quantize(recipe.load(file))
            made = Plan.model_validate(manifest_of(tmp_path / estimator)["plan"])
        assert shown == made


def test_a_plan_file_given_to_a_recipe_makes_the_same_bytes(models, tmp_path, whole, capsys) -> None:
    plan = tmp_path / "plan.yaml"
    assert cli.main(["plan", str(make(models, tmp_path / "out")), "-o", str(plan), "-q"]) == 0
    assert "model.layers.0.self_attn: q_proj, k_proj, v_proj" in capsys.readouterr().out
    again = ["--set", f"quant.overrides={plan}", "--set", "quant.budget=null"]
    assert cli.main(["ptq", str(make(models, tmp_path / "out")), "-q", *again]) == 0
    assert hashes(tmp_path / "out") == whole[0]
    assert "plan" not in manifest_of(tmp_path / "out")
    assert cli.main(["plan", str(make(models, tmp_path / "out")), "-o", str(plan), "-q"]) == 2


def test_a_plan_file_keeps_the_overrides_of_its_recipe(llama, tokens, tmp_path) -> None:
    own = {"*.down_proj": {"group_size": 16}, "*.0.self_attn.o_proj": {"skip": True}}
    quant = budgeted(QuantConfig(group_size=32, overrides=own), average_bits=4, estimator="variance")
    plan = planned(llama, quant, tokens)
    (tmp_path / "plan.yaml").write_text(plan.yaml(quant))
    raw = {"model": {"path": "x"}, "method": {"name": "rtn"}, "output": {"path": "y"}}
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(raw | {"quant": {"group_size": 32, "overrides": str(tmp_path / "plan.yaml")}})
    )
    read = recipe.load(tmp_path / "r.yaml").quant
    assert read == plan.applied(quant)
    specs = {target.name: target.spec for target in llama.targets(read)}
    assert "model.layers.0.self_attn.o_proj" not in specs
    assert specs["model.layers.1.mlp.down_proj"].group_size == 16


def test_a_plan_file_without_overrides_is_refused(tmp_path) -> None:
    raw = {"model": {"path": "x"}, "method": {"name": "rtn"}, "output": {"path": "y"}}
    (tmp_path / "plan.yaml").write_text("quant: {num_bits: 3}\n")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(InputError, match=r"plan\.yaml has no overrides"):
        recipe.load(tmp_path / "r.yaml", [f"quant.overrides={tmp_path / 'plan.yaml'}"])


def test_patterns_with_dots_can_be_set(tmp_path) -> None:
    raw = {"model": {"path": "x"}, "method": {"name": "rtn"}, "output": {"path": "y"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    given = ["quant.budget.average_bits=3", "quant.budget.floors.*.down_proj=3", "quant.budget.pins.model.layers.0.*=4"]
    budget = recipe.load(tmp_path / "r.yaml", given).quant.budget
    assert budget is not None
    assert (budget.floors, budget.pins) == ({"*.down_proj": 3}, {"model.layers.0.*": 4})


def test_plan_prints_json_and_asks_for_a_budget(models, tmp_path, capsys) -> None:
    file = str(make(models, tmp_path / "out", budget={"average_bits": 3, "estimator": "variance"}))
    assert cli.main(["plan", file, "-q", "--json"]) == 0
    found = Plan.model_validate_json(capsys.readouterr().out)
    assert found.bits_per_weight <= 3
    assert cli.main(["plan", file, "-q", "--set", "quant.budget=null"]) == 2


@pytest.mark.parametrize(("number", "after"), [(1, True), (2, False), (2, True), (4, False)])
def test_a_killed_run_with_a_budget_goes_on_to_the_same_bytes(models, tmp_path, whole, number, after) -> None:
    """Killed where tokens, the plan (2) and the first block get their names."""
    checked = recipe.load(make(models, tmp_path / "out"))
    assert killed_at_rename(checked, number, after) < 0
    assert (tmp_path / "out.partial" / "state" / "plan.json").exists() == ((number, after) >= (2, True))
    quantize(checked)
    assert hashes(tmp_path / "out") == whole[0]


def test_a_run_that_goes_on_measures_nothing_again(models, tmp_path, whole, monkeypatch) -> None:
    checked = recipe.load(make(models, tmp_path / "out"))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Killed):
            quantize(checked)
    monkeypatch.setitem(ESTIMATORS, "loss", None)
    quantize(checked)
    assert hashes(tmp_path / "out") == whole[0]


def test_another_budget_does_not_go_on(models, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Killed):
            quantize(recipe.load(make(models, tmp_path / "out")))
    other = make(models, tmp_path / "out", budget={"average_bits": 3.6, "estimator": "loss"})
    with pytest.raises(InputError, match=r"quant\.budget\.average_bits: 3\.5 -> 3\.6"):
        quantize(recipe.load(other))
