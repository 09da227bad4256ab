"""The table of a sweep, and the packaged sweeps."""

import runpy
import statistics
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import qtool
from qtool.cli import main
from qtool.config import files, recipe
from qtool.methods import efficientqat
from qtool.reports.records import Metric, task_result
from qtool.sweeps import grid, runner
from qtool.sweeps.results import CellResult, Mean, groups
from qtool.sweeps.table import SweepReport
from qtool.system.errors import InputError

FOLDER = Path(qtool.__file__).parent / "recipes" / "tables"
GENERATOR = Path(__file__).parents[2] / "scripts" / "make_paper_tables.py"


def result(name: str, columns: dict[str, str], value: float | None, **fields: Any) -> CellResult:
    metric = Metric(value=value or 0.0, stderr=0.5, n=10)
    rows = () if value is None else (task_result("wikitext2", "perplexity", metric, Metric(value=9.0, n=10)),)
    known = {"status": "done" if value is not None else "failed", "model": "m", "method": "rtn", "results": rows}
    return CellResult(name=name, columns=columns, **(known | fields))


@given(values=st.lists(st.floats(0.1, 1e4), min_size=1, max_size=6))
def test_means_and_deviations_are_those_of_statistics(values: list[float]) -> None:
    cells = [
        result(f"{bits}-{seed}", {"bits": bits, "seed": str(seed)}, value * int(bits), seconds={"quantize": value})
        for bits in ("2", "3")
        for seed, value in enumerate(values)
    ]
    found = groups(cells, ["seed"])
    assert [group.columns for group in found] == [{"bits": "2"}, {"bits": "3"}]
    for group in found:
        bits = int(group.columns["bits"])
        mean = group.metrics["wikitext2 perplexity"]
        assert mean.mean == pytest.approx(statistics.mean(value * bits for value in values))
        if len(values) > 1:
            assert mean.deviation == pytest.approx(statistics.stdev(value * bits for value in values), abs=1e-9)
        else:
            assert mean.deviation is None
        assert group.seconds is not None
        assert group.seconds.mean == pytest.approx(statistics.mean(values))


def test_a_mean_tells_of_how_many_cells_it_is() -> None:
    cells = (
        result("a", {"bits": "2", "seed": "0"}, 10.0, bits_per_weight=2.25, quantized_bytes=3_000_000),
        result("b", {"bits": "2", "seed": "1"}, 12.0, bits_per_weight=2.25, quantized_bytes=3_000_000),
        result("c", {"bits": "2", "seed": "2"}, None, reason="no memory"),
    )
    made = SweepReport(name="s", over=("seed",), cells=cells, groups=groups(cells, ["seed"]))
    text = made.markdown()
    assert "## Over seed\n\n| bits | cells | bits/weight | size | wikitext2 perplexity | quantize |" in text
    assert "| 2 | 2 of 3 | 2.250 | 3.00 MB | 11.00 ± 1.41 |  |" in text
    assert "| 2 | 0 | 2.250 | 3.00 MB | 10.00 ± 0.50 |  | done |" in text
    assert "| 2 | 2 |  |  |  |  | failed [1] |" in text
    assert "1. no memory" in text
    assert "| float |  |  |  | 9 |  |  |" in text
    assert made.groups[0].metrics["wikitext2 perplexity"] == Mean(mean=11.0, deviation=statistics.stdev([10.0, 12.0]))
    assert SweepReport.model_validate_json(made.model_dump_json()) == made
    file = StringIO()
    made.render(Console(file=file, width=110))
    for part in ("Over seed", "11.00 ± 1.41", "failed [1]", "1. no memory", "2 of 3 cells done, 1 failed"):
        assert part in file.getvalue()


def test_the_bits_of_whole_files_have_a_column_where_they_are_known() -> None:
    known = {"bits_per_weight": 2.25, "quantized_bytes": 3_000_000}
    cells = (
        result("a", {"bits": "2", "seed": "0"}, 10.0, **known, file_bits_per_weight=4.0),
        result("b", {"bits": "2", "seed": "1"}, 12.0, **known, file_bits_per_weight=5.0),
        result("c", {"bits": "3", "seed": "0"}, 12.0, **known),
    )
    made = SweepReport(name="s", over=("seed",), cells=cells, groups=groups(cells, ["seed"]))
    text = made.markdown()
    assert "| bits | cells | bits/weight | of file | size | wikitext2 perplexity | quantize |" in text
    assert "| 2 | 2 | 2.250 | 4.500 | 3.00 MB | 11.00 ± 1.41 |" in text
    assert "| 3 | 1 | 2.250 |  | 3.00 MB | 12 |" in text
    assert "| 2 | 1 | 2.250 | 5.000 | 3.00 MB | 12.00 ± 0.50 |" in text
    assert "| float |  |  |  |  | 9 |  |" in text
    assert SweepReport.model_validate_json(made.model_dump_json()) == made


def test_float_models_and_other_machines_are_told_apart() -> None:
    cells = (
        result("a", {"model": "x"}, 10.0, model="x", machine="one, 1 threads"),
        result("b", {"model": "y"}, 10.0, model="y", machine="two, 1 threads"),
    )
    made = SweepReport(name="s", cells=cells)
    assert [made.cell_table().columns[0], *(row[0] for row in made.cell_table().rows)] == [
        *("model", "float x", "float y", "x", "y")
    ]
    assert "cells ran on different machines: one, 1 threads; two, 1 threads" in made.notes()


CELLS = {
    "builtin-corners": 2 * 2 * 5,
    "builtin-calibration": 2 * 2 * 3,
    "builtin-group-size": 4 * 2,
    "builtin-lrqat-parts": 2 * 7,
    "builtin-ptq-qat": 8 * 3,
    "builtin-range-factor": 3 * 6 + 2,
    "builtin-samples": 1 + 4,
    "continuous-approximation": 3 * 2 * 2,
    "efficientqat": 5 * 4 + 1 + (5 + 5 + 5 + 3) + (3 + 3),
    "efficientqat-ablation": 8 + 3 + 6 + 6,
    "efficientqat-alpaca": 2 * 4 * 3,
    "efficientqat-instruct": 2 * 4 * 2,
    "lrqat-4": 5 * 6 * 3 + 3 * 6 + 3 * 5 + 4 * 4,
    "lrqat-5": 3 * 3 * 3,
    "ptq-qat": 8 * 4,
    "range-factor": 3 * (3 * 6 + 2),
}


@pytest.fixture(scope="module")
def tables() -> dict[str, grid.Sweep]:
    return {name: grid.load(name) for name in files.tables()}


def test_every_packaged_table_loads_with_all_its_cells(tables: dict[str, grid.Sweep]) -> None:
    assert {name.removeprefix("tables/"): len(plan.cells) for name, plan in tables.items()} == CELLS
    for name, plan in tables.items():
        what, how = files.tables()[name].read_text().splitlines()[:2]
        assert what == f"# {plan.title}"
        assert how == f"#   qtool sweep {name}"
        assert name.startswith("tables/builtin") or plan.config.missing_models == "skip"
        for cell in plan.cells:
            assert set(cell.columns) == set(plan.columns)
            assert cell.recipe.model.path.startswith("builtin:") == name.startswith("tables/builtin")
    assert not files.packaged().keys() & files.tables().keys()


def test_papers_tables_are_what_their_numbers_make() -> None:
    made = runpy.run_path(str(GENERATOR))["tables"]()
    assert {name: (FOLDER / name).read_text(encoding="utf-8") for name in made} == made


@pytest.mark.parametrize(
    ("table", "cell", "published"),
    [
        ("efficientqat", "llama-2-7b-w2g64", [6.86, 8.50, 0.6014]),
        ("efficientqat", "llama-3-8b-w3g128", [7.09, 10.06, 0.6735]),
        ("efficientqat", "llama-2-70b-w3g128-gptq", [3.85, 5.85, 0.7147]),
        ("efficientqat", "llama-2-13b-w3g128-awq", [5.32, 6.94, 0.6614]),
        ("efficientqat", "llama-2-70b-w2g128-signround", [0.6770]),
        ("efficientqat", "llama-3-70b-w2g64", [6.07, 9.23, 0.6789]),
        ("efficientqat", "llama-3-70b-w3g128-awq", [4.69, 7.91, 0.7365]),
        ("efficientqat", "mistral-large-123b-w2g64", [5.58, 0.7354]),
        ("efficientqat-alpaca", "llama-13b-w2g64-peqa", [0.322]),
        ("efficientqat-alpaca", "llama-7b-w3g64-efficientqat", [0.400]),
        ("efficientqat-instruct", "llama-3-8b-instruct-w2g64", [11.19, 0.6066]),
        ("efficientqat-instruct", "llama-3-70b-instruct-w2g128", [8.14, 0.6754]),
        ("efficientqat-instruct", "llama-3-70b-instruct-w2g128-block-ap", []),
        ("efficientqat-ablation", "block-ap", [8.53, 0.5899]),
        ("efficientqat-ablation", "block-ap-grid", [10.26, 0.5520]),
        ("efficientqat-ablation", "group-256", [8.18, 0.5867]),
        ("efficientqat-ablation", "e2e-windows-32764", [7.50, 0.6031]),
        ("efficientqat-ablation", "text-c4-w3g128", [5.92, 7.38, 0.6382]),
        ("lrqat-4", "mistral-7b-w4g128", [5.37, 0.7528]),
        ("lrqat-4", "llama-3-8b-w3pc-rtn", [34.10, 0.4746]),
        ("lrqat-4", "llama-2-13b-w2g128-gptq", [28.14]),
        ("lrqat-4", "mistral-7b-w3g128-lsq", [5.90, 0.7196]),
        ("lrqat-4", "llama-3-8b-w3pc-peqa", [26.20, 0.5105]),
        ("lrqat-4", "llama-7b-w2g128-rtn", [708, 0.3974]),
        ("lrqat-4", "llama-7b-w4pc-awq", [6.08]),
        ("lrqat-5", "llama-7b-w4a8kv4-peqa", [6.15, 0.6654]),
        ("lrqat-5", "llama-2-13b-w4a4kv4-lrqat", [7.15, 0.6265]),
        ("lrqat-5", "llama-2-7b-w4a8kv4-rtn", [6.85, 0.6516]),
    ],
)
def test_published_numbers_are_the_papers(
    tables: dict[str, grid.Sweep], table: str, cell: str, published: list[float]
) -> None:
    found = {each.name: each.recipe for each in tables[f"tables/{table}"].cells}[cell]
    assert [each.value for each in found.expected] == published


def test_a_cell_of_a_paper_s_own_method_is_its_packaged_recipe(tables: dict[str, grid.Sweep]) -> None:
    for table, method, count in (("efficientqat", "efficientqat", 21), ("lrqat-4", "lrqat", 30)):
        cells = [cell for cell in tables[f"tables/{table}"].cells if cell.columns["method"] == method]
        assert len(cells) == count
        for cell in cells:
            own = recipe.load(f"papers/{method}/{cell.name}")
            assert cell.recipe == own.model_copy(update={"output": cell.recipe.output})


@pytest.mark.parametrize(
    "table", ["efficientqat-instruct", "efficientqat-alpaca", "efficientqat-ablation", "builtin-samples"]
)
def test_a_second_phase_starts_from_a_cell_of_the_first(tables: dict[str, grid.Sweep], table: str) -> None:
    plan = tables[f"tables/{table}"]
    named = {cell.name: cell.recipe for cell in plan.cells}
    chained = [cell for cell in plan.cells if cell.start is not None]
    assert len(chained) >= 4
    for cell in chained:
        assert cell.start is not None
        own, first = cell.recipe.method, named[cell.start].method
        assert isinstance(own, efficientqat.Config)
        assert isinstance(first, efficientqat.Config)
        assert (named[cell.start].model, named[cell.start].quant) == (cell.recipe.model, cell.recipe.quant)
        assert (first.e2e.steps, own.epochs) == (0, 0)
        assert own.e2e.steps != 0


def test_peqa_trains_scales_alone_in_the_recipes_and_the_tables(tables: dict[str, grid.Sweep]) -> None:
    cells = [cell for name in ("lrqat-4", "lrqat-5") for cell in tables[f"tables/{name}"].cells]
    found = {cell.name: cell.recipe for cell in cells if cell.columns["method"] == "peqa"}
    for name, made in found.items():
        assert isinstance(made.method, efficientqat.Config)
        assert (made.method.init, made.method.epochs, made.method.e2e.trains) == ("minmax", 0, ("scales",)), name
    for path in files.packaged():
        if path.startswith("papers/peqa/"):
            own = recipe.load(path)
            same = found[f"{path.removeprefix('papers/peqa/')}-peqa"]
            assert own == same.model_copy(update={"output": own.output})


def test_activations_of_table_5_are_on_the_grids_it_says(tables: dict[str, grid.Sweep]) -> None:
    for cell in tables["tables/lrqat-5"].cells:
        quant = cell.recipe.quant
        assert cell.columns["grid"] == f"w{quant.num_bits}a{quant.activations}kv{quant.kv_cache}"
        assert (quant.group_size, quant.symmetric) == (-1, True)


def test_a_table_without_its_models_is_not_run_and_says_so(
    tables: dict[str, grid.Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "resolve", lambda path, fetch: (_ for _ in ()).throw(InputError("not here")))
    assert main.main(["sweep", "tables/efficientqat", "-o", str(tmp_path / "o"), "-q"]) == 0
    text = capsys.readouterr().out
    assert "0 of 45 cells done, 45 not run." in text
    assert "meta-llama/Llama-2-7b-hf is not on this machine" in text
    assert "| llama-2-7b | w2g64 | efficientqat | wikitext2 perplexity | 6.86 | not run |  | arXiv 2407.11062" in text
