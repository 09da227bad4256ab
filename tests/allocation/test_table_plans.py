"""Plans that choose the widths of embeddings and heads: sizes, pins, files of plans, and runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny
from helpers.bit_plans import TABLE, budgeted, planned
from helpers.stopped_runs import Killed, hashes, make, quantize, stop_after
from torch import Tensor

from qtool.allocation.plan import BitPlan, units_of
from qtool.allocation.sensitivity import COST_ESTIMATORS
from qtool.checkpoints.files import SafetensorsFolder, folder_bytes
from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.sizes import bits_per_weight, planned_bytes
from qtool.cli import main
from qtool.config import recipe
from qtool.config.quant import QuantConfig
from qtool.models.loaded import LoadedModel
from qtool.models.tables import select_tables
from qtool.models.targets import select_targets
from qtool.pipelines import plan as planning
from qtool.system.errors import InputError

QUANT = QuantConfig(group_size=32, embedding=TABLE)
GRID = TABLE.model_dump(mode="json")
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folders with a float32 model and text: its head untied, tied to the embedding, or tied and with positions."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("untied", "tied", "positions")}
    for name in ("untied", "tied"):
        tiny.llama(found[name] / "float", dtype=torch.float32, tied=name == "tied")
    tiny.gpt2(found["positions"] / "float")
    for folder in found.values():
        (folder / "text.txt").write_text("\n".join(tiny.PROSE * 40), encoding="utf-8")
    return found


@pytest.fixture
def load(folders: Folders) -> Callable[[str], LoadedModel]:
    return lambda name: tiny.load(folders[name] / "float")


Load = Callable[[str], LoadedModel]


def plan_in(output: Path) -> BitPlan:
    return BitPlan.model_validate(json.loads((output / "qtool.json").read_text())["plan"])


def widths(plan: BitPlan) -> dict[str, int]:
    """Return the bits of each weight."""
    return {name: each.num_bits for each in plan.allotments for name in each.linears}


@pytest.mark.parametrize(
    ("name", "quant", "tables"),
    [
        ("untied", QUANT, {"embedding": ["model.embed_tokens"], "head": ["lm_head"]}),
        ("untied", QuantConfig(group_size=32, head=TABLE), {"head": ["lm_head"]}),
        ("untied", QuantConfig(group_size=32, embedding=TABLE, head="float"), {"embedding": ["model.embed_tokens"]}),
        ("tied", QUANT, {"embedding": ["model.embed_tokens"]}),
        ("positions", QUANT, {"embedding": ["transformer.wte", "transformer.wpe"]}),
        ("tied", QuantConfig(group_size=32), {}),
    ],
)
def test_the_embeddings_are_a_unit_and_so_is_an_untied_head(
    name: str, quant: QuantConfig, tables: dict[str, list[str]], load: Load, tokens: Tensor
) -> None:
    loaded = load(name)
    budget = budgeted(quant, average_bits=5, estimator="variance")
    units = units_of(loaded, budget)
    assert {unit.name: [target.name for target in unit.targets] for unit in units if unit.table} == tables
    plan = planned(loaded, budget, tokens)
    applied, bits = plan.applied(budget), widths(plan)
    assert applied.budget is None
    found = (*select_targets(loaded, applied), *select_tables(loaded, applied).targets)
    assert {target.name: target.spec.num_bits for target in found} == bits
    rows = plan.table().splitlines()[1 : len(units) + 1]
    assert all(row.startswith(each.unit) for row, each in zip(rows, plan.allotments, strict=True))


def test_widths_and_group_sizes_of_embedding_and_head_are_their_own(load: Load, tokens: Tensor) -> None:
    loaded, head = load("untied"), TABLE.model_copy(update={"group_size": 16, "symmetric": False})
    quant = budgeted(
        QUANT.model_copy(update={"head": head}),
        average_bits=5,
        estimator="variance",
        pins={"lm_head": 3, "model.embed_tokens": 8},
    )
    specs = select_tables(loaded, planned(loaded, quant, tokens).applied(quant)).specs
    labels = {name: spec.label() for name, spec in specs.items()}
    assert labels == {"model.embed_tokens": "w8pc", "lm_head": "w3g16 asym"}


@pytest.mark.parametrize(
    ("name", "budget", "expected"),
    [
        ("untied", {"pins": {"model.embed_tokens": 8}}, {"embedding": (8,), "head": (2, 3, 4, 8)}),
        ("untied", {"floors": {"lm_head": 4}}, {"embedding": (2, 3, 4, 8), "head": (4, 8)}),
        ("tied", {"pins": {"lm_head": 8}}, {"embedding": (8,)}),
        ("positions", {"floors": {"*.wpe": 8}}, {"embedding": (8,)}),
        ("untied", {"pins": {"*": 4}}, {"embedding": (4,), "head": (4,)}),
    ],
)
def test_pins_and_floors_name_tables(name: str, budget: dict[str, Any], expected: dict[str, Any], load: Load) -> None:
    units = units_of(load(name), budgeted(QUANT, average_bits=8.9, **budget))
    assert {unit.name: unit.choices for unit in units if unit.table} == expected


@pytest.mark.parametrize(
    ("name", "quant", "budget", "message"),
    [
        ("positions", QUANT, {"pins": {"*.wte": 4, "*.wpe": 8}}, r"embedding: .*wte, .*wpe, lm_head share one width"),
        ("tied", QUANT, {"pins": {"*.embed_tokens": 4, "lm_head": 8}}, r"embed_tokens, lm_head share one width"),
        ("untied", QUANT, {"pins": {"lm_head": 3}, "floors": {"lm_head": 4}}, r"head: lm_head have a floor of 4 bits"),
        (
            "untied",
            QuantConfig(group_size=32),
            {"pins": {"lm_head": 8}},
            r"or table matches 'lm_head'; lm_head stays in floating point without a grid in quant\.head",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, quant: QuantConfig, budget: dict[str, Any], message: str, load: Load
) -> None:
    with pytest.raises(InputError, match=message):
        units_of(load(name), budgeted(quant, average_bits=8.9, **budget))


def test_one_width_is_chosen_for_a_tied_pair_whose_grids_are_both_given(load: Load, tokens: Tensor) -> None:
    """Their num_bits differ, and are not used."""
    both = QUANT.model_copy(update={"head": TABLE.model_copy(update={"num_bits": 4})})
    loaded, quant = load("tied"), budgeted(both, average_bits=4.5, estimator="variance")
    plan = planned(loaded, quant, tokens)
    assert plan.applied(quant).head == "same"
    assert "\n  head: same\n" in plan.yaml(quant)


@pytest.mark.parametrize("average_bits", [2.8, 4.0, 6.5])
def test_average_bits_count_tables(average_bits: float, load: Load, tokens: Tensor) -> None:
    loaded = load("untied")
    quant = budgeted(QUANT, average_bits=average_bits, estimator="hessian")
    plan = planned(loaded, quant, tokens)
    applied = plan.applied(quant)
    found = (*select_targets(loaded, applied), *select_tables(loaded, applied).targets)
    numbers = [target.weight.numel() for target in found]
    bits = sum(t.spec.bits_per_weight(t.weight_shape[1]) * n for t, n in zip(found, numbers, strict=True))
    assert bits / sum(numbers) == pytest.approx(plan.bits_per_weight, rel=1e-12)
    assert average_bits - 0.7 < plan.bits_per_weight <= average_bits


@pytest.mark.parametrize("name", ["untied", "tied", "positions"])
@pytest.mark.parametrize("table", [TABLE, "float"])
def test_the_files_of_a_run_have_the_planned_bytes(name: str, table: Any, folders: Folders, tmp_path: Path) -> None:
    """Norms and biases are float32 already, and RTN changes none: only the headers are not known exactly."""
    grid = table if table == "float" else GRID
    packed = {"untied": 80_000, "tied": 70_000, "positions": 110_000}[name]
    size = packed + {"untied": 120_000, "tied": 60_000, "positions": 80_000}[name] * (table == "float")
    budget = {"size": size, "estimator": "variance"}
    quantize(make(folders[name], tmp_path / "out", "rtn", quant__embedding=grid, quant__budget=budget))
    plan, written = plan_in(tmp_path / "out"), SafetensorsFolder(tmp_path / "out")
    num_files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert folder_bytes(tmp_path / "out") <= plan.num_bytes <= size
    assert plan.num_bytes - folder_bytes(tmp_path / "out") <= 64 * num_files + 20 * len(written.names)
    assert len(set(widths(plan).values())) > 1


def test_a_tied_table_is_counted_once(load: Load) -> None:
    loaded = load("tied")
    target = select_tables(loaded, QUANT).targets[0]
    float_bytes = planned_bytes(loaded, {}, {})
    packed_bytes = planned_bytes(loaded, {target.name: target.spec}, {target.name: target.weight_shape})
    rows, columns = target.weight_shape
    # the headers of the files differ
    assert float_bytes - packed_bytes == pytest.approx(rows * (4 * columns - columns - 2), abs=400)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (QuantConfig(group_size=32), r"\(model\.embed_tokens, lm_head: 163,840 bytes .* quant\.embedding: \{num_bits"),
        (QuantConfig(group_size=32, embedding=TABLE, head="float"), r"\(lm_head: 81,920 bytes .* quant\.head: \{num"),
        (QUANT, r"for all tensors but the packed weights; raise the budget"),
    ],
)
def test_the_least_possible_size_names_the_tables_in_floating_point(
    quant: QuantConfig, message: str, load: Load
) -> None:
    with pytest.raises(InputError, match=message):
        units_of(load("untied"), budgeted(quant, size=10_000))


@pytest.mark.parametrize("estimator", COST_ESTIMATORS)
def test_a_run_chooses_widths_of_tables_by_every_estimator(estimator: str, folders: Folders, tmp_path: Path) -> None:
    """The run streams the model, and ``plan`` does not. No table has the least width, by which targets are checked."""
    floors = {"lm_head": 3, "model.embed_tokens": 3}
    budget = {"average_bits": 4.4, "estimator": estimator, "floors": floors}
    checked = make(folders["untied"], tmp_path / "out", "gptq", quant__embedding=GRID, quant__budget=budget)
    shown = planning.plan(checked)
    quantize(checked)
    assert plan_in(tmp_path / "out") == shown
    written = NativeCheckpoint(tmp_path / "out")
    assert {name: written.quantized(name).spec.num_bits for name in written.specs} == widths(shown)
    assert bits_per_weight(written.specs, written.shapes) == pytest.approx(shown.bits_per_weight, rel=1e-12)


@pytest.mark.parametrize("name", ["untied", "positions"])
def test_a_plan_file_given_to_a_recipe_makes_the_same_bytes(name: str, folders: Folders, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"quant__embedding": GRID, "quant__budget": {"average_bits": 4.4, "estimator": "hessian"}}
    make(folders[name], tmp_path / "out", **keys)
    command, plan = str(tmp_path / "out.yaml"), str(tmp_path / "plan.yaml")
    assert main.main(["plan", command, "-o", plan, "-q"]) == 0
    assert main.main(["ptq", command, "-q"]) == 0
    whole = hashes(tmp_path / "out")
    again = ["--set", f"quant.overrides={plan}", "--set", "quant.budget=null", "--set", f"output.path={tmp_path}/again"]
    assert main.main(["ptq", command, "-q", *again]) == 0
    assert hashes(tmp_path / "again") == whole


def test_a_plan_file_gives_no_grid_to_a_table_that_the_recipe_keeps_float(tmp_path: Path) -> None:
    raw = {"model": {"path": "x"}, "method": {"name": "rtn"}, "output": {"path": "y"}}
    quant = {"embedding": "float", "overrides": str(tmp_path / "plan.yaml")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw | {"quant": quant}))
    (tmp_path / "plan.yaml").write_text("quant: {embedding: {num_bits: 4}, overrides: {}}\n")
    with pytest.raises(InputError, match=r"quant\.embedding is float, and .*plan\.yaml gives it the grid"):
        recipe.load(tmp_path / "r.yaml")
    (tmp_path / "plan.yaml").write_text("quant: {embedding: float, overrides: {}}\n")
    assert recipe.load(tmp_path / "r.yaml").quant.embedding == "float"


def test_a_run_that_goes_on_keeps_the_widths_of_its_tables(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"quant__embedding": GRID, "quant__budget": {"average_bits": 4.4, "estimator": "hessian"}}
    quantize(make(folders["untied"], tmp_path / "whole", **keys))
    checked = make(folders["untied"], tmp_path / "out", **keys)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Killed):
            quantize(checked)
    monkeypatch.setitem(COST_ESTIMATORS, "hessian", None)
    quantize(checked)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_an_export_that_cannot_hold_a_chosen_width_is_refused_before_the_first_block(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the least and the most bits, with which exports are checked before the plan is made."""
    monkeypatch.setattr(
        "qtool.exporters._base.refusal",
        lambda _, source, entry: "no 3 bits" if 3 in {spec.num_bits for spec in source.specs.values()} else None,
    )
    monkeypatch.setattr("qtool.pipelines.quantize.run_method", None)
    checked = make(
        folders["untied"],
        tmp_path / "out",
        quant__budget={"average_bits": 3.5, "estimator": "variance", "choices": [2, 3, 4]},
    )
    entry = recipe.check_export({"format": "dense", "path": str(tmp_path / "dense")})
    with pytest.raises(InputError, match="cannot be exported as dense: no 3 bits"):
        quantize(checked.model_copy(update={"export": (entry,)}))
