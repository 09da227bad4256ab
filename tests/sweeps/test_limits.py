"""A sweep of somebody else: it cannot grow without end, run commands, or bring results that are none."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool.cli import main
from qtool.config.sweep import BenchConfig, LauncherConfig
from qtool.sweeps import cell as cells
from qtool.sweeps import grid
from qtool.sweeps.cell import Cell, KeptBench
from qtool.system.errors import InputError
from qtool.system.paths import path_text

RECIPE = {"model": {"path": "builtin:wiki-llama-3m"}, "method": {"name": "rtn"}}


def saved(folder: Path, **sections: object) -> Path:
    (folder / "s.yaml").write_text(yaml.safe_dump({"recipe": RECIPE, **sections}, sort_keys=False))
    return folder / "s.yaml"


def load(folder: Path, sections: dict[str, Any], **options: Any) -> grid.Sweep:
    return grid.load(saved(folder, **sections), (), folder / "out", **options)


AXES = {key: list(range(1, 101)) for key in ("seed", "data.num_samples", "data.seq_len", "eval.limit", "eval.context")}


def test_a_grid_of_too_many_cells_is_refused_before_any_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the sweep has 10,000,000,000 cells; at most 1,000 are taken, or pass --max"):
        load(tmp_path, {"grid": AXES})


def test_cells_and_exclusions_count_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the sweep has 3 cells; at most 2"):
        load(tmp_path, {"grid": {"seed": [1, 2]}, "cells": {"a": {"seed": 3}}}, max_cells=2)
    with pytest.raises(InputError, match=r"the sweep has 3 entries in exclude; at most 2"):
        load(tmp_path, {"grid": {"seed": [1, 2]}, "exclude": [{"seed": 1}] * 3}, max_cells=2)


def test_the_command_line_may_take_more_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, grid={"seed": [1, 2, 3], "quant.num_bits": [5]})
    assert main.main(["sweep", str(file), "--max-cells", "2"]) == 2
    assert "the sweep has 3 cells; at most 2 are taken" in capsys.readouterr().err
    assert main.main(["sweep", str(file), "--max-cells", "3"]) == 2
    assert "quant.num_bits: should be 2, 3, 4 or 8" in capsys.readouterr().err


UNSAFE = [
    ("submitit", {"local_setup": ["touch PWNED"]}),
    ("submitit", {"slurm_setup": ["touch PWNED"]}),
    ("submitit", {"setup": ["touch PWNED"]}),
    ("submitit", {"slurm_srun_args": ["--task-prolog=x"]}),
    ("submitit", {"slurm_additional_parameters": {"wrap": "touch PWNED"}}),
    ("submitit", {"slurm_python": "x"}),
    ("submitit", {"slurm_partition": "gpu\ntouch PWNED"}),
    ("submitit", {"name": "a\u2028b"}),
    ("submitit", {"timeout_min": {"a": 1}}),
    ("ray", {"runtime_env": {"pip": ["evil"]}}),
    ("ray", {"slurm_partition": "gpu"}),
]


@pytest.mark.parametrize(("name", "parameters"), UNSAFE)
def test_parameters_that_may_run_commands_are_refused_but_for_a_flag(
    tmp_path: Path, name: str, parameters: dict[str, Any]
) -> None:
    sections = {"grid": {"seed": [1]}, "launcher": {"name": name, "parameters": parameters}}
    with pytest.raises(
        InputError, match=rf"launcher\.parameters\.{next(iter(parameters))}: .*--allow-launcher-commands"
    ):
        load(tmp_path, sections)
    assert load(tmp_path, sections, allow_launcher_commands=True).config.launcher.parameters == parameters


def test_a_cluster_elsewhere_is_refused_but_for_a_flag(tmp_path: Path) -> None:
    sections = {"grid": {"seed": [1]}, "launcher": {"name": "ray", "address": "ray://evil:10001"}}
    with pytest.raises(InputError, match=r"launcher\.address: ray://evil:10001 may be another machine"):
        load(tmp_path, sections)
    assert load(tmp_path, sections, allow_launcher_commands=True).cells


def test_no_file_can_allow_commands(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"launcher\.allow_launcher_commands: unknown key"):
        load(tmp_path, {"grid": {"seed": [1]}, "launcher": {"name": "ray", "allow_launcher_commands": True}})


def test_parameters_of_daily_use_are_taken() -> None:
    slurm = {
        "timeout_min": 600,
        "gpus_per_node": 1,
        "slurm_partition": "gpu",
        "slurm_array_parallelism": 4,
        "mem_gb": 64,
    }
    assert LauncherConfig(name="submitit", parameters=slurm).commands() == []
    assert LauncherConfig(name="ray", parameters={"num_cpus": 1, "num_gpus": 0.5}, address="auto").commands() == []


def test_a_base_recipe_is_a_name_or_sections(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe: should be a name, a path or sections; found 3"):
        load(tmp_path, {"cells": {"a": {"recipe": 3}}})


def test_a_folder_with_a_dollar_sign_is_named_in_recipes_and_commands(tmp_path: Path) -> None:
    folder = tmp_path / "a$b"
    folder.mkdir()
    made = grid.load(path_text(saved(folder, grid={"seed": [1]})), (), folder / "out")
    assert made.cells[0].recipe.output.path == folder / "out" / "seed=1"
    assert Cell(made.cells[0], folder / "out", "run").command()[4] == path_text(folder / "out" / "seed=1.yaml")


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    made = Cell(load(tmp_path, {"grid": {"seed": [1]}}).cells[0], tmp_path / "out")
    made.folder.mkdir(parents=True)
    return made


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"model": 3}', '{"model": "m", "results": {}}', '{"model": "m", "float_bytes": -1}']
)
def test_a_damaged_report_of_a_cell_is_no_result(cell: Cell, content: str) -> None:
    (cell.folder / "report.json").write_text(content)
    assert cells._report(cell) is None
    assert cells.result(cell).status == "not run"


@pytest.mark.parametrize("content", ["{}", '{"plan": {}}', '{"plan": {}, "report": {}}', '{"plan": [], "report": 1}'])
def test_damaged_speeds_of_a_cell_are_measured_again(cell: Cell, content: str) -> None:
    (cell.folder / cells.BENCH).write_text(content)
    assert cells.benched(cell, BenchConfig()) is None


def test_speeds_without_what_the_table_shows_are_measured_again() -> None:
    report = {"path": "x", "label": "x", "dtype": "x", "device": "cpu", "threads": 1, "prompt_tokens": 2, "energy": ""}
    with pytest.raises(ValueError, match="report has no speeds of dense and fast"):
        KeptBench.model_validate_json(json.dumps({"plan": {}, "report": {**report, "variants": []}}))


@pytest.mark.parametrize("name", ["report.json", "qtool.json", "bench.json"])
def test_a_fifo_in_a_cell_is_not_waited_for(cell: Cell, name: str) -> None:
    os.mkfifo(cell.folder / name)
    assert cells.result(cell).status == "not run"
    assert cells.benched(cell, None) is None
