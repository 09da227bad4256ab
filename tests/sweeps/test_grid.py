"""The grid of a sweep: its cells, and the faults that are found before any cell runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qtool.cli import main
from qtool.config.sweep import LauncherConfig, SweepConfig
from qtool.sweeps import grid
from qtool.sweeps.grid import expand
from qtool.system.errors import InputError

AXES = ("model.path", "quant.num_bits", "quant.group_size", "seed")
VALUES = st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True)


@given(
    axes=st.dictionaries(st.sampled_from(AXES), VALUES, min_size=1),
    exclude=st.lists(st.dictionaries(st.sampled_from(AXES), VALUES, min_size=1), max_size=3),
)
def test_cells_are_the_product_without_what_is_excluded(
    axes: dict[str, list[int]], exclude: list[dict[str, list[int]]]
) -> None:
    cells, wrong = expand(SweepConfig(grid=axes, exclude=exclude))
    if unknown := {axis for entry in exclude for axis in entry} - axes.keys():
        assert len([line for line in wrong if "no axis is called" in line]) >= len(unknown)
        return
    whole: list[dict[str, int]] = [{}]
    for axis, values in axes.items():
        whole = [cell | {axis: value} for cell in whole for value in values]
    left = [cell for cell in whole if not any(all(cell[a] in v for a, v in entry.items()) for entry in exclude)]
    assert [cell.columns for cell in cells] == [{axis: str(value) for axis, value in cell.items()} for cell in left]
    assert [dict(cell.changes) for cell in cells] == left
    assert len({cell.name for cell in cells}) == len(cells)
    idle = [entry for entry in exclude if not any(all(cell[a] in v for a, v in entry.items()) for cell in whole)]
    assert len(wrong) == len(idle) + (not left)


def test_names_and_labels_are_what_was_written() -> None:
    config = SweepConfig(
        grid={
            "method": {"gptq": {"name": "gptq"}, "best": {"name": "signround", "preset": "best"}},
            "quant.num_bits": [2, 4],
            "recipe": ["papers/lrqat/llama-2-7b-w4pc"],
            "size": {"a b": {"data.num_samples": 8, "seed": 1}},
            "quant.symmetric": [True],
        },
        cells={"float": {"quant.num_bits": 8}, "named": {"columns": {"size": 3}, "recipe": {"seed": 2}}},
    )
    cells, wrong = expand(config)
    assert not wrong
    assert [cell.name for cell in cells] == [
        *(f"{m}-num_bits={b}-llama-2-7b-w4pc-a_b-symmetric=true" for m in ("gptq", "best") for b in (2, 4)),
        *("float", "named"),
    ]
    assert cells[0].columns["size"] == "a b"
    assert cells[0].base == "papers/lrqat/llama-2-7b-w4pc"
    assert [cell.columns for cell in cells[4:]] == [{"cell": "float"}, {"size": "3"}]
    assert cells[5].base == {"seed": 2}


def checked(**sections: Any) -> tuple[grid.CellRecipe, ...]:
    cells, wrong = expand(SweepConfig(**sections))
    assert not wrong
    return grid.check(cells, [], Path("out"), "test")


def test_a_method_replaces_the_one_before_and_other_sections_are_merged() -> None:
    base: dict[str, Any] = {
        "model": {"path": "x"},
        "method": {"name": "lsq", "optim": {"schedule": "linear"}, "steps": 3},
        "quant": {"num_bits": 3, "group_size": 32, "overrides": {"*.q_proj": {"num_bits": 8}}},
    }
    changes = {
        "rtn": {"method": {"name": "rtn"}, "quant": {"num_bits": 2, "overrides": {"*.k_proj": {"skip": True}}}},
        "lsq": {"method": {"optim": {"eps": 1e-6}}},
        "pattern": {"quant.overrides.*.mlp.up_proj.num_bits": 4},
    }
    rtn, lsq, pattern = checked(recipe=base, cells=changes)
    assert rtn.recipe.method.name == "rtn"
    assert not {"optim", "steps"} & rtn.recipe.method.model_dump().keys()
    assert (rtn.recipe.quant.num_bits, rtn.recipe.quant.group_size) == (2, 32)
    assert set(rtn.recipe.quant.overrides) == {"*.q_proj", "*.k_proj"}
    optim = lsq.recipe.method.model_dump()["optim"]
    assert (optim["schedule"], optim["eps"], lsq.recipe.method.model_dump()["steps"]) == ("linear", 1e-6, 3)
    assert pattern.recipe.quant.overrides["*.mlp.up_proj"].num_bits == 4
    assert [str(cell.recipe.output.path) for cell in (rtn, lsq, pattern)] == ["out/rtn", "out/lsq", "out/pattern"]
    assert base["method"]["optim"] == {"schedule": "linear"}  # no cell changes the base of all cells


def test_a_cell_starts_from_the_folder_of_another() -> None:
    base = {"model": {"path": "x"}, "method": {"name": "efficientqat"}}
    first, second = checked(recipe=base, cells={"blocks": {"method.e2e.steps": 0}, "scales": {"start": "blocks"}})
    assert (first.start, second.start) == (None, "blocks")
    assert second.recipe.method.model_dump()["init_from"] == str(first.recipe.output.path) == "out/blocks"


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ({"cells": {"b": {"start": "c"}}}, "cells.b.start: no cell without a start is called 'c'; there are none"),
        ({"cells": {"a": {}, "b": {"start": "a"}, "c": {"start": "b"}}}, "cells.c.start: .* 'b'; there are a"),
        ({"cells": {"a": {}, "b": {"start": "a"}}, "keep": "reports"}, "keep: reports deletes the weights of a"),
    ],
)
def test_a_start_that_is_not_there_is_a_fault(sections: dict[str, Any], fault: str) -> None:
    _, wrong = expand(SweepConfig(recipe={"model": {"path": "x"}}, **sections))
    assert len(wrong) == 1
    assert re.search(fault, wrong[0])


BASE = {"model": {"path": "x"}, "method": {"name": "rtn"}}


def faults(tmp_path: Path, text: dict[str, Any], *overrides: str) -> list[str]:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(text, sort_keys=False))
    with pytest.raises(InputError) as caught:
        grid.load(path, overrides)
    return str(caught.value).splitlines()


def test_all_faults_of_all_cells_are_said_at_once_and_each_once(tmp_path: Path) -> None:
    whole = {
        "recipe": BASE | {"dta": {}},
        "grid": {"method.name": ["rtn", "gptq"], "quant.num_bits": [4, 5], "method.damp": [0.1]},
    }
    head, *lines = faults(tmp_path, whole)
    assert head.endswith("s.yaml: 4 of 4 cell(s) have faults:")
    assert len(lines) == 3
    starts = ("[all cells] dta: unknown key", "[rtn-num_bits=4-damp=0.1, rtn-num_bits=5-damp=0.1] method.damp: unknown")
    for start in (
        *starts,
        "[rtn-num_bits=5-damp=0.1, gptq-num_bits=5-damp=0.1] quant.num_bits: should be 2, 3, 4 or 8",
    ):
        assert len([line for line in lines if line.strip().startswith(start)]) == 1, start
    whole["recipe"] = BASE
    whole["exclude"] = [{"method.name": "rtn"}, {"quant.num_bits": 5}]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    assert [cell.name for cell in grid.load(tmp_path / "s.yaml").cells] == ["gptq-num_bits=4-damp=0.1"]


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ({"grids": {}}, "grids: unknown key; the nearest is grid"),
        ({"grid": {"quan.num_bits": [2]}}, "grid.quan.num_bits: not a key of a recipe.*nearest section is quant"),
        (
            {"grid": {"quant": [{"num_bits": 2}]}},
            "needs a label: write the axis as a mapping, quant: {label: value, ...}",
        ),
        ({"grid": {"size": {"small": 3}}}, "grid.size.small: should be a mapping of changes"),
        ({"grid": {"seed": []}}, "grid.seed: no values"),
        ({"grid": {"seed": [1, 1]}}, "grid.seed: 2 values are called 1; give them labels"),
        ({"grid": {"seed": [1]}, "exclude": [{"sed": 1}]}, "exclude: no axis is called 'sed'; there are seed"),
        ({"grid": {"seed": [1]}, "exclude": [{"seed": 2}]}, 'exclude: no cell has {"seed": 2}'),
        ({"grid": {"seed": [1]}, "exclude": [{"seed": 1}]}, "the sweep has no cells"),
        ({}, "the sweep has no cells; give grid or cells"),
        ({"grid": {"seed": [1]}, "over": ["sed"]}, "over: no column is called 'sed'; there are seed"),
        ({"cells": {"../x": {}}}, "'../x' cannot be the name of a cell's folder"),
        ({"cells": {"sweep": {}}}, "'sweep' cannot be the name"),
        ({"cells": {"x.partial": {}}}, "'x.partial' cannot be the name"),
        ({"cells": {"x": {"output.path": "y"}}}, "cells.x: output.path: each cell writes into a folder of its own"),
        ({"cells": {"x": {"sede": 1}}}, "cells.x: sede: not a section of a recipe; the nearest is seed"),
        ({"grid": {"recipe": ["a/x", "b/x"]}}, "grid.recipe: 2 values are called x"),
        (
            {"cells": {"x": {}}, "launcher": {"name": "local", "cluster": "slurm"}},
            "cluster acts only with name: submit",
        ),
        ({"cells": {"x": {}}, "launcher": {"parameters": {"a": 1}}}, "parameters act only with a cluster"),
    ],
)
def test_faults_of_the_sweep_itself(tmp_path: Path, part: dict[str, Any], fault: str) -> None:
    head, *lines = faults(tmp_path, {"recipe": BASE, **part})
    assert head.endswith("s.yaml has 1 fault:")
    (line,) = lines
    assert re.search(fault, line)


def test_a_recipe_is_told_from_a_sweep(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {path: x}\nmethod: {name: rtn}\noutput: {path: out}\n")
    with pytest.raises(InputError, match=r"r\.yaml is a recipe, which qtool quantize .* runs; a sweep has"):
        grid.load(file)


def test_what_a_cell_may_not_have_and_what_may_not_be_set(tmp_path: Path) -> None:
    exporting = BASE | {"export": [{"format": "dense", "path": "d"}]}
    (line,) = faults(tmp_path, {"recipe": exporting, "cells": {"x": {}, "y": {}}})[1:]
    assert "export: a sweep writes no exports" in line
    whole = {"recipe": BASE, "grid": {"quant.num_bits": [2, 4]}}
    assert "--set quant: this key varies" in faults(tmp_path, whole, "quant={}")[1]
    assert "--set quant.num_bits: this key varies" in faults(tmp_path, whole, "quant.num_bits=3")[1]
    assert "--set x: write section.key=value" in faults(tmp_path, whole, "x")[1]
    listed = {"recipe": BASE, "set": {"seed": 1}, "cells": {"x": {"quant.symmetric": False}, "y": {}}}
    assert faults(tmp_path, listed, "quant.symmetric=true", "seed=2")[1:] == [
        "  --set quant.symmetric: this key varies from cell to cell"
    ]
    assert {cell.recipe.seed for cell in grid.load(tmp_path / "s.yaml", ["seed=2"]).cells} == {2}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(whole))
    plan = grid.load(tmp_path / "s.yaml", ["quant.group_size=32", "keep=reports"], tmp_path / "o")
    assert {cell.recipe.quant.group_size for cell in plan.cells} == {32}
    assert (plan.config.keep, plan.output) == ("reports", tmp_path / "o")
    with pytest.raises(InputError, match="did you mean the packaged sweep tables/efficientqat"):
        grid.load("tables/eficientqat")


def test_help_and_schema_have_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["sweep", "--help"]) == 0
    text = capsys.readouterr().out
    for key in grid.keys():  # noqa: SIM118 (a function)
        assert f"    {key.name}" in text
    assert "launcher.parameters" in text
    assert main.main(["schema", "--sweep"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["properties"]) == list(SweepConfig.model_fields)
    assert found["properties"]["keep"]["enum"] == ["all", "reports"]


def test_a_launcher_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.config.sweep.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs the package submitit.*pip install "qtool-llm\[cluster\]"'):
        LauncherConfig(name="submitit").check()
    with pytest.raises(InputError, match="pip install ray"):
        LauncherConfig(name="ray").check()
    LauncherConfig().check()
