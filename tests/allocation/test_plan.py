"""Widths under a budget: what is a unit, what a budget counts, and what a run makes of a plan."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny
from helpers.architectures import write
from helpers.bit_plans import budgeted, planned
from helpers.stopped_runs import Killed, hashes, killed_at_rename, quantize, stop_after
from pydantic import ValidationError
from torch import Tensor

from qtool.allocation.plan import BitPlan, check, units_of
from qtool.allocation.sensitivity import COST_ESTIMATORS
from qtool.allocation.solvers import SOLVERS
from qtool.allocation.units import fused, merged
from qtool.checkpoints.files import folder_bytes
from qtool.checkpoints.native import NativeCheckpoint
from qtool.cli import main
from qtool.config import recipe
from qtool.config.budget import BudgetConfig
from qtool.config.quant import QuantConfig, QuantOverride, QuantSpec
from qtool.models.linears import Target
from qtool.models.loaded import LoadedModel
from qtool.models.targets import select_targets
from qtool.pipelines import plan as planning
from qtool.reports.forecast import Forecast
from qtool.system.errors import InputError

MIXED = ("auto-round", "compressed-tensors", "dense", "gguf", "mlx")  # formats that hold several widths
Whole = tuple[dict[str, str], BitPlan]  # file hashes and plan of an uninterrupted run
BLOCK = ["self_attn: q_proj, k_proj, v_proj", "self_attn: o_proj", "mlp: gate_proj, up_proj", "mlp: down_proj"]


def test_units_are_what_engines_fuse(llama: LoadedModel) -> None:
    names = [unit.name for unit in units_of(llama, budgeted(average_bits=4))]
    assert names == [f"model.layers.{i}.{part}" for i in range(2) for part in BLOCK]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_units_of_other_architectures(family: str, tmp_path: Path) -> None:
    loaded = tiny.load(tiny.FAMILIES[family](tmp_path / family))
    units = units_of(loaded, budgeted(average_bits=4))
    assert len(units) == 2 * 4
    shared = "attn: c_attn" if family == "gpt2" else "self_attn: q_proj, k_proj, v_proj"
    assert units[0].name.endswith(shared)


def test_experts_of_a_layer_are_one_unit() -> None:
    spec = QuantSpec()
    names = [f"model.layers.{i}.mlp.experts.{e}.{p}" for i in (0, 1) for e in (0, 1) for p in ("up_proj", "down_proj")]
    linear = torch.nn.Linear(1, 1)
    groups = [[Target.of(name, linear, spec, 0)] for name in ["model.layers.0.mlp.gate", *names]]
    assert [len(unit) for unit in merged(groups)] == [1, 4, 4]


def test_the_stacked_experts_of_a_layer_are_one_unit(tmp_path: Path) -> None:
    loaded = tiny.load(write("qwen3_moe", tmp_path / "model"))
    units = fused(loaded, select_targets(loaded, QuantConfig(group_size=16)))
    names = [[target.name.rpartition(".")[2] for target in unit] for unit in units]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_up_proj", "down_proj"]] * 2


@pytest.mark.parametrize("average_bits", [2.6, 3.0, 3.7, 5.0])
@pytest.mark.parametrize("quant", [QuantConfig(group_size=32), QuantConfig(group_size=16, symmetric=False)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_average_bits_count_scales_and_zero_points(
    llama: LoadedModel, tokens: Tensor, average_bits: float, quant: QuantConfig, solver: str
) -> None:
    if quant.group_size == 16 and average_bits < 3.2:
        average_bits += 0.7
    plan = planned(llama, budgeted(quant, average_bits=average_bits, estimator="variance", solver=solver), tokens)
    assert average_bits - 0.7 < plan.bits_per_weight <= average_bits
    targets = select_targets(llama, plan.applied(quant))
    stored = sum(t.spec.bits_per_weight(t.weight_shape[1]) * t.weight.numel() for t in targets)
    assert stored / sum(t.weight.numel() for t in targets) == plan.bits_per_weight


def test_more_bits_never_raise_the_predicted_cost(llama: LoadedModel, tokens: Tensor) -> None:
    budgets = [2.5 + i / 10 for i in range(30)]
    plans = [planned(llama, budgeted(average_bits=bits, estimator="variance"), tokens) for bits in budgets]
    assert all(later.cost <= before.cost for before, later in itertools.pairwise(plans))
    assert {each.num_bits for each in plans[0].allotments} == {2}
    assert len({plan.bits_per_weight for plan in plans}) > 10


def test_pins_and_floors_hold_for_all_that_is_fused(llama: LoadedModel, tokens: Tensor) -> None:
    quant = budgeted(
        average_bits=3.6,
        estimator="variance",
        choices=[2, 3, 4],
        floors={"*.down_proj": 3},
        pins={"*.1.*.q_proj": 8},
    )
    plan = planned(llama, quant, tokens)
    found = {target.name: target.spec.num_bits for target in select_targets(llama, plan.applied(quant))}
    assert all(bits >= 3 for name, bits in found.items() if name.endswith("down_proj"))
    assert {found[f"model.layers.1.self_attn.{p}_proj"] for p in "qkv"} == {8}
    assert set(found.values()) >= {2, 8}
    assert all(bits in (2, 3, 4, 8) for bits in found.values())


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"pins": {"*.w_proj": 4}}, r"quant\.budget\.pins: no quantized linear or table matches '\*\.w_proj'"),
        ({"floors": {"*.w_proj": 4}}, r"quant\.budget\.floors: no quantized linear or table matches"),
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
def test_what_cannot_be_is_refused(llama: LoadedModel, budget: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        units_of(llama, budgeted(**{"average_bits": 6} | budget))


def test_a_share_is_that_of_the_bytes_of_the_float_model(llama: LoadedModel, tokens: Tensor) -> None:
    whole = sum(parameter.nbytes for parameter in llama.model.parameters())
    common: dict[str, Any] = {"estimator": "variance", "choices": [2, 3, 4, 8]}
    by_share = planned(llama, budgeted(share=0.5, **common), tokens)
    by_size = planned(llama, budgeted(size=int(0.5 * whole), **common), tokens)
    assert by_share.allotments == by_size.allotments
    assert 0.45 * whole < by_share.num_bytes <= 0.5 * whole
    written = by_share.yaml(budgeted(share=0.5))
    assert "within 0.5 of the float model's bytes" in written
    for text in (written, by_share.table()):
        assert "squared error of outputs, modelled" in text  # the unit of this estimator's costs
    with pytest.raises(InputError, match=r"share is 0\.01, so the size is [0-9,]+, and the least that is possible is"):
        planned(llama, budgeted(share=0.01, **common), tokens)


def test_a_size_below_the_least_is_refused_with_the_least(llama: LoadedModel, tokens: Tensor) -> None:
    with pytest.raises(InputError, match=r"the least that is possible is [0-9,]+ bytes, of which") as found:
        units_of(llama, budgeted(size=50_000))
    least = int(str(found.value).split("possible is ")[1].split(" bytes")[0].replace(",", ""))
    with pytest.raises(InputError):
        units_of(llama, budgeted(size=least - 1))
    plan = planned(llama, budgeted(size=least, estimator="variance"), tokens)
    assert {each.num_bits for each in plan.allotments} == {2}
    assert plan.num_bytes <= least


def test_a_budget_is_one_number() -> None:
    for wrong in (
        {},
        {"average_bits": 3, "size": "1GB"},
        {"size": "1GB", "share": 0.5},
        {"average_bits": 3, "choices": [3, 2]},
    ):
        with pytest.raises(ValidationError):
            BudgetConfig.model_validate(wrong)
    assert BudgetConfig.model_validate({"size": "2.1GB"}).size == 2_100_000_000


def test_widths_come_from_one_place() -> None:
    with pytest.raises(InputError, match=r"no quant\.budget"):
        check(QuantConfig())
    fixed = {"*.q_proj": QuantOverride.model_validate({"num_bits": 8})}
    with pytest.raises(InputError, match=r"gives num_bits to '\*\.q_proj'.*quant\.budget\.pins"):
        check(budgeted(QuantConfig(overrides=fixed), average_bits=3))
    other = {"*.q_proj": QuantOverride.model_validate({"group_size": 16})}
    check(budgeted(QuantConfig(overrides=other), average_bits=3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model of three blocks and text for it."""
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "float", blocks=3, tied=True)
    (folder / "text.txt").write_text("\n".join(tiny.PROSE * 40), encoding="utf-8")
    return folder


METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"name": "rtn"},
    "gptq": {"name": "gptq"},
    "efficientqat": {"name": "efficientqat", "min_steps": 4, "epochs": 0.1, "e2e": {"steps": 3}},
    "lrqat": {"name": "lrqat", "rank": 4, "steps": 3},
}


def make(
    models: Path, output: Path, method: str = "gptq", budget: dict[str, Any] | None = None, **sections: Any
) -> Path:
    """Write the recipe of a run."""
    raw: dict[str, Any] = {
        "model": {"path": str(models / "float")},
        "method": METHODS[method],
        "quant": {"group_size": 32, "budget": budget or {"average_bits": 3.5, "estimator": "loss"}},
        "data": {"source": str(models / "text.txt"), "num_samples": 8, "seq_len": 32},
        "output": {"path": str(output)},
    } | sections
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def manifest_of(output: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((output / "qtool.json").read_text())
    return manifest


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Files and plan of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    quantize(recipe.load(make(models, output)))
    return hashes(output), BitPlan.model_validate(manifest_of(output)["plan"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_plan_and_its_result_is_evaluated_and_exported(
    models: Path, tmp_path: Path, method: str
) -> None:
    exports = [{"format": name, "path": str(tmp_path / name)} for name in MIXED]
    sections = {"export": exports, "eval": {"tasks": ["generated", "kl"], "limit": 2, "context": 32}}
    budget = {"average_bits": 3.4, "estimator": "hessian"}
    outcome = quantize(recipe.load(make(models, tmp_path / "out", method, budget, **sections)))
    plan = BitPlan.model_validate(manifest_of(tmp_path / "out")["plan"])
    specs = NativeCheckpoint(tmp_path / "out").specs
    assert {name: spec.num_bits for name, spec in specs.items()} == {
        name: each.num_bits for each in plan.allotments for name in each.linears
    }
    assert len({spec.num_bits for spec in specs.values()}) > 1
    assert outcome.report.bits_per_weight == plan.bits_per_weight <= 3.4
    assert (outcome.report.label or "").startswith("mixed ")
    assert all(row.value is not None and math.isfinite(row.value) for row in outcome.report.results)
    assert [path.name for path in outcome.exports] == list(MIXED)


@pytest.mark.parametrize("method", ["rtn", "gptq", "efficientqat"])
def test_the_files_of_a_run_are_within_a_size(models: Path, tmp_path: Path, method: str) -> None:
    size = 110_000
    outcome = quantize(recipe.load(make(models, tmp_path / "out", method, {"size": size, "estimator": "variance"})))
    plan = BitPlan.model_validate(manifest_of(tmp_path / "out")["plan"])
    written = folder_bytes(tmp_path / "out")
    assert written == outcome.report.quantized_bytes
    assert written <= plan.num_bytes <= size
    assert plan.num_bytes - written < 0.03 * size
    assert len({each.num_bits for each in plan.allotments}) > 1


def test_formats_of_one_grid_refuse_a_budget_before_any_width_is_measured(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COST_ESTIMATORS, "loss", None)
    file = make(models, tmp_path / "out", export=[{"format": "gptq", "path": str(tmp_path / "gptq")}])
    with pytest.raises(InputError, match="its linears have 2 different grids"):
        quantize(recipe.load(file))


def test_a_run_chooses_what_qtool_plan_shows(models: Path, tmp_path: Path, whole: Whole) -> None:
    """The run streams the model, and ``plan`` does not."""
    for estimator in ("loss", "hessian"):
        file = make(models, tmp_path / estimator, budget={"average_bits": 3.5, "estimator": estimator})
        shown = planning.plan(recipe.load(file))
        if estimator == "loss":
            made = whole[1]
        else:
            quantize(recipe.load(file))
            made = BitPlan.model_validate(manifest_of(tmp_path / estimator)["plan"])
        assert shown == made


def test_a_plan_file_given_to_a_recipe_makes_the_same_bytes(
    models: Path, tmp_path: Path, whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    assert main.main(["plan", str(make(models, tmp_path / "out")), "-o", str(plan), "-q"]) == 0
    assert "model.layers.0.self_attn: q_proj, k_proj, v_proj" in capsys.readouterr().out
    again = ["--set", f"quant.overrides={plan}", "--set", "quant.budget=null"]
    assert main.main(["ptq", str(make(models, tmp_path / "out")), "-q", *again]) == 0
    assert hashes(tmp_path / "out") == whole[0]
    assert "plan" not in manifest_of(tmp_path / "out")
    assert main.main(["plan", str(make(models, tmp_path / "out")), "-o", str(plan), "-q"]) == 2


def test_a_plan_file_keeps_the_overrides_of_its_recipe(llama: LoadedModel, tokens: Tensor, tmp_path: Path) -> None:
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
    specs = {target.name: target.spec for target in select_targets(llama, read)}
    assert "model.layers.0.self_attn.o_proj" not in specs
    assert specs["model.layers.1.mlp.down_proj"].group_size == 16


def test_a_plan_file_without_overrides_is_refused(tmp_path: Path) -> None:
    raw = {"model": {"path": "x"}, "method": {"name": "rtn"}, "output": {"path": "y"}}
    (tmp_path / "plan.yaml").write_text("quant: {num_bits: 3}\n")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(InputError, match=r"plan\.yaml has no overrides"):
        recipe.load(tmp_path / "r.yaml", [f"quant.overrides={tmp_path / 'plan.yaml'}"])


def test_patterns_with_dots_can_be_set(tmp_path: Path) -> None:
    raw = {"model": {"path": "x"}, "method": {"name": "rtn"}, "output": {"path": "y"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    given = ["quant.budget.average_bits=3", "quant.budget.floors.*.down_proj=3", "quant.budget.pins.model.layers.0.*=4"]
    budget = recipe.load(tmp_path / "r.yaml", given).quant.budget
    assert budget is not None
    assert (budget.floors, budget.pins) == ({"*.down_proj": 3}, {"model.layers.0.*": 4})


def test_plan_prints_json_and_the_forecast_of_a_recipe_without_a_budget(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(make(models, tmp_path / "out", budget={"average_bits": 3, "estimator": "variance"}))
    assert main.main(["plan", file, "-q", "--json"]) == 0
    found = BitPlan.model_validate_json(capsys.readouterr().out)
    assert found.bits_per_weight <= 3
    assert main.main(["plan", file, "-q", "--json", "--set", "quant.budget=null", "--no-probe"]) == 0
    assert Forecast.model_validate_json(capsys.readouterr().out).label == "w4g32"


@pytest.mark.parametrize(("number", "after"), [(1, True), (2, False), (2, True), (4, False)])
def test_a_killed_run_with_a_budget_goes_on_to_the_same_bytes(
    models: Path, tmp_path: Path, whole: Whole, number: int, after: bool
) -> None:
    """Killed where tokens, the plan (2) and the first block get their names."""
    checked = recipe.load(make(models, tmp_path / "out"))
    assert killed_at_rename(checked, number, after) < 0
    assert (tmp_path / "out.partial" / "state" / "plan.json").exists() == ((number, after) >= (2, True))
    quantize(checked)
    assert hashes(tmp_path / "out") == whole[0]


def test_a_run_that_goes_on_measures_nothing_again(
    models: Path, tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = recipe.load(make(models, tmp_path / "out"))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Killed):
            quantize(checked)
    monkeypatch.setitem(COST_ESTIMATORS, "loss", None)
    quantize(checked)
    assert hashes(tmp_path / "out") == whole[0]


def test_another_budget_does_not_go_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Killed):
            quantize(recipe.load(make(models, tmp_path / "out")))
    other = make(models, tmp_path / "out", budget={"average_bits": 3.6, "estimator": "loss"})
    with pytest.raises(InputError, match=r"quant\.budget\.average_bits: 3\.5 -> 3\.6"):
        quantize(recipe.load(other))
