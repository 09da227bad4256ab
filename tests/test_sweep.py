"""A sweep: which cells it has, what it refuses, what it runs again and what not, and what its table says."""

import json
import os
import re
import runpy
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qtool import cli, grid, launch, progress, recipe, sweep
from qtool.endtoend import TRAINING
from qtool.errors import InputError
from qtool.grid import SweepConfig, expand
from qtool.launch import Command, Ended, LauncherConfig
from qtool.results import Metric, task_result
from qtool.summary import CellResult, Mean, SweepReport, groups

FOLDER = Path(recipe.__file__).parent / "recipes" / "tables"
GENERATOR = Path(__file__).parents[1] / "scripts" / "make_paper_tables.py"

# ---------------------------------------------------------------------------------------------- which cells


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


def checked(**sections: Any) -> tuple[grid.Planned, ...]:
    cells, wrong = expand(SweepConfig(**sections))
    assert not wrong
    return grid.check(cells, [], Path("out"), "test")


def test_a_method_replaces_the_one_before_and_other_sections_are_merged() -> None:
    base = {
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
    assert base["method"]["optim"] == {"schedule": "linear"}  # what all cells start from is not changed by one


# ---------------------------------------------------------------------------------------------- what is refused


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
        ({"grid": {"quan.num_bits": [2]}}, "grid.quan.num_bits: no key of a recipe.*nearest section is quant"),
        ({"grid": {"quant": [{"num_bits": 2}]}}, "needs a label: write {label: value, ...}"),
        ({"grid": {"size": {"small": 3}}}, "grid.size.small: should be changes"),
        ({"grid": {"seed": []}}, "grid.seed: no values"),
        ({"grid": {"seed": [1, 1]}}, "grid.seed: 2 values are called 1; give them labels"),
        ({"grid": {"seed": [1]}, "exclude": [{"sed": 1}]}, "exclude: no axis is called 'sed'; there are seed"),
        ({"grid": {"seed": [1]}, "exclude": [{"seed": 2}]}, 'exclude: no cell has {"seed": 2}'),
        ({"grid": {"seed": [1]}, "exclude": [{"seed": 1}]}, "there is no cell"),
        ({}, "there is no cell; give grid, or cells"),
        ({"grid": {"seed": [1]}, "over": ["sed"]}, "over: no column is called 'sed'; there are seed"),
        ({"cells": {"../x": {}}}, "'../x' cannot be the name of a cell's folder"),
        ({"cells": {"sweep": {}}}, "'sweep' cannot be the name"),
        ({"cells": {"x.partial": {}}}, "'x.partial' cannot be the name"),
        ({"cells": {"x": {"output.path": "y"}}}, "cells.x: output.path: each cell writes into a folder of its own"),
        ({"cells": {"x": {"sede": 1}}}, "cells.x: sede: no section of a recipe; the nearest is seed"),
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
    assert head.endswith("s.yaml has 1 fault(s):")
    (line,) = lines
    assert re.search(fault, line)


def test_what_a_cell_may_not_have_and_what_may_not_be_set(tmp_path: Path) -> None:
    exporting = BASE | {"export": [{"format": "dense", "path": "d"}]}
    (line,) = faults(tmp_path, {"recipe": exporting, "cells": {"x": {}, "y": {}}})[1:]
    assert "export: a sweep writes no exports" in line
    whole = {"recipe": BASE, "grid": {"quant.num_bits": [2, 4]}}
    assert "--set quant: it varies" in faults(tmp_path, whole, "quant={}")[1]
    assert "--set quant.num_bits: it varies" in faults(tmp_path, whole, "quant.num_bits=3")[1]
    assert "--set x: write section.key=value" in faults(tmp_path, whole, "x")[1]
    listed = {"recipe": BASE, "set": {"seed": 1}, "cells": {"x": {"quant.symmetric": False}, "y": {}}}
    assert faults(tmp_path, listed, "quant.symmetric=true", "seed=2")[1:] == [
        "  --set quant.symmetric: it varies from cell to cell"
    ]
    assert {cell.recipe.seed for cell in grid.load(tmp_path / "s.yaml", ["seed=2"]).cells} == {2}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(whole))
    plan = grid.load(tmp_path / "s.yaml", ["quant.group_size=32", "keep=reports"], tmp_path / "o")
    assert {cell.recipe.quant.group_size for cell in plan.cells} == {32}
    assert (plan.config.keep, plan.output) == ("reports", tmp_path / "o")
    with pytest.raises(InputError, match="did you mean the packaged sweep tables/efficientqat"):
        grid.load("tables/eficientqat")


def test_help_and_schema_have_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "--help"]) == 0
    text = capsys.readouterr().out
    for key in grid.keys():  # noqa: SIM118 (a function)
        assert f"    {key.name}" in text
    assert "launcher.parameters" in text
    assert cli.main(["schema", "--sweep"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["properties"]) == list(SweepConfig.model_fields)
    assert found["properties"]["keep"]["enum"] == ["all", "reports"]


def test_a_launcher_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package submitit.*pip install 'qtool\[cluster\]'"):
        LauncherConfig(name="submitit").check()
    with pytest.raises(InputError, match="pip install 'ray'"):
        LauncherConfig(name="ray").check()
    LauncherConfig().check()


# ---------------------------------------------------------------------------------------------- what is run


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of cells run in this process, which has torch already; and are listed here."""
    commands: list[list[str]] = []

    def execute(command: Command, running: object = None) -> Ended:
        assert command.arguments[:3] == [sys.executable, "-m", "qtool"]
        commands.append(command.arguments[3:])
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()), progress.use(progress.Sink()):
            code = cli.main(command.arguments[3:])
        return Ended(out.getvalue(), launch._error(code, out.getvalue(), command.log))

    monkeypatch.setattr(launch, "execute", execute)
    return commands


@pytest.fixture
def base(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe that takes a moment."""
    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    monkeypatch.chdir(tmp_path)
    return {
        "model": {"path": str(llama_folder), "dtype": "float32", "device": "cpu"},
        "method": {"name": "rtn"},
        "quant": {"group_size": 32},
        "data": {"source": str(tiny.text(tmp_path)), "num_samples": 2, "seq_len": 16},
        "eval": {"tasks": ["generated", "kl"], "limit": 1, "context": 16},
    }


@pytest.fixture
def run(ran: list[list[str]]) -> Callable[..., sweep.Outcome]:
    """Runs a sweep in ``out``."""

    def run(whole: dict[str, Any], *overrides: str, **options: Any) -> sweep.Outcome:
        Path("s.yaml").write_text(f"# A title.\n{yaml.safe_dump(whole, sort_keys=False)}")
        return sweep.sweep(grid.load("s.yaml", overrides, Path("out")), **options)

    return run


def hashes() -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in Path("out").glob("*/*.safetensors")}


def test_what_is_done_is_not_run_again_and_what_changed_is(
    base: dict[str, Any], run: Callable[..., sweep.Outcome], ran: list[list[str]]
) -> None:
    whole = {"recipe": base, "cells": {"a": {"quant.num_bits": 4}, "b": {"method.name": "gptq"}}}
    first = run(whole)
    assert (first.ran, first.cached, first.failed) == (["a", "b"], [], [])
    assert "2 runs of" in Path("out/compare.html").read_text()
    assert ran == [["ptq", f"out/{name}.yaml", "--json"] for name in ("a", "b")]
    again = run(whole)
    assert (again.ran, again.cached, len(ran)) == ([], ["a", "b"], 2)
    assert again.report.cells == first.report.cells
    # another grid: that cell only, and its folder is replaced
    whole["cells"]["a"] = {"quant.num_bits": 3}
    changed = run(whole)
    assert (changed.ran, changed.cached) == (["a"], ["b"])
    assert ran[2:] == [["ptq", "out/a.yaml", "--json", "--overwrite"]]
    assert [cell.bits_per_weight for cell in changed.report.cells] == [3.5, 4.5]
    # another evaluation: nothing is quantized again
    before = hashes()
    evaluated = run(whole, "eval.tasks=[generated]")
    assert evaluated.ran == ["a", "b"]
    assert ran[3:] == [["eval", f"out/{n}.yaml", "--output", f"out/{n}", "--json"] for n in ("a", "b")]
    assert hashes() == before
    assert evaluated.report.metrics() == ["generated perplexity"]
    values = [[row.value for row in cell.shown()] for cell in evaluated.report.cells]
    assert values == [[cell.shown()[0].value] for cell in changed.report.cells]
    assert evaluated.report.cells[1].seconds["quantize"] == first.report.cells[1].seconds["quantize"]
    # a report that is gone, or half written, is made again; --fresh makes all again
    Path("out/a/report.json").write_text('{"model"')
    assert run(whole, "eval.tasks=[generated]").ran == ["a"]
    assert ran[-1][0] == "eval"
    assert run(whole, "eval.tasks=[generated]", fresh=True).ran == ["a", "b"]
    assert ran[-1] == ["ptq", "out/b.yaml", "--json", "--overwrite", "--fresh"]


def test_a_report_is_never_taken_for_another_evaluation_s(
    base: dict[str, Any], run: Callable[..., sweep.Outcome], ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that dies between writing what a cell asks for and doing it leaves no old report to be believed."""
    whole = {"recipe": base, "cells": {"a": {}}}
    run(whole)
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(whole, "eval.tasks=[generated]")
    outcome = run(whole, "eval.tasks=[generated]")
    assert outcome.ran == ["a"]
    assert outcome.report.metrics() == ["generated perplexity"]


def test_a_failed_cell_stops_no_other_and_is_run_again(
    base: dict[str, Any],
    run: Callable[..., sweep.Outcome],
    ran: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = {"recipe": base, "grid": {"quant.num_bits": [4, 3, 2]}}
    good, broken = launch.execute, ["out/num_bits=4.yaml", "out/num_bits=3.yaml"]

    def sometimes(command: Command, running: object = None) -> Ended:
        return Ended("", "it broke\nin two lines") if command.arguments[4] in broken else good(command)

    monkeypatch.setattr(launch, "execute", sometimes)
    outcome = run(whole)
    assert (outcome.ran, outcome.failed) == ([f"num_bits={n}" for n in (4, 3, 2)], ["num_bits=4", "num_bits=3"])
    assert [cell.status for cell in outcome.report.cells] == ["failed", "failed", "done"]
    assert "1 of 3 cells done, 2 failed." in Path("out/sweep.md").read_text()
    assert "1. it broke; in two lines\n" in Path("out/sweep.md").read_text()
    broken.pop()
    assert cli.main(["sweep", "s.yaml", "-o", "out", "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["ran"], found["cached"], found["failed"]) == (
        ["num_bits=4", "num_bits=3"],
        ["num_bits=2"],
        ["num_bits=4"],
    )
    assert found["report"] == json.loads(Path("out/sweep.json").read_text())
    assert "error: 1 cell(s) failed, and the same command runs them again: num_bits=4" in err
    broken.clear()
    assert cli.main(["sweep", "s.yaml", "-o", "out", "-q"]) == 0
    assert "3 of 3 cells done." in capsys.readouterr().out


def test_what_a_run_would_refuse_is_said_before_any_cell_runs(
    base: dict[str, Any], run: Callable[..., sweep.Outcome], ran: list[list[str]], tmp_path: Path
) -> None:
    cells = {
        "good": {},
        "size": {"quant.group_size": 48},
        "data": {"data.source": "enwik", "method.name": "gptq"},
        "size-too": {"quant.group_size": 48, "seed": 1},
        "task": {"eval.tasks": ["kl", "kl"]},
    }
    (tmp_path / "out" / "good").mkdir(parents=True)
    (tmp_path / "out" / "good" / "letters.txt").touch()
    with pytest.raises(InputError) as caught:
        run({"recipe": base, "cells": cells})
    assert str(caught.value).startswith("s cannot be run:\n  [")
    for part in (
        "is not a model folder, so it will not be replaced",
        "group_size 48",
        "did you mean enwiki",
        "kl named",
    ):
        assert part in str(caught.value)
    assert "[size, size-too] " in str(caught.value)
    assert not ran
    assert not list(Path("out").glob("*.yaml"))


def test_a_missing_model_is_an_error_or_not_run_as_the_sweep_says(
    base: dict[str, Any], run: Callable[..., sweep.Outcome], ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expected = [{"tasks": ["generated"], "metric": "perplexity", "value": 5.25, "source": "a paper"}]
    whole = {
        "recipe": base | {"expected": expected},
        "grid": {
            "model.path": {"here": base["model"]["path"], "gone": "./nowhere", "hub": "nobody/qtool-no-such-model"}
        },
    }
    with pytest.raises(InputError, match=r"(?s)\[gone\] model.path: there is no folder ./nowhere\n.*\[hub\]"):
        run(whole)
    assert not ran
    outcome = run(whole, "missing_models=skip")
    assert (outcome.ran, outcome.cached, outcome.failed) == (["here"], [], [])
    assert [cell.status for cell in outcome.report.cells] == ["done", "not run", "not run"]
    assert outcome.report.cells[2].reason == "nobody/qtool-no-such-model is not at hand"
    text = outcome.report.markdown()
    assert "1 of 3 cells done, 2 not run." in text
    assert "2. nobody/qtool-no-such-model is not at hand" in text
    assert "| hub | generated perplexity | 5.25 | not run |  | a paper |" in text
    ours = outcome.report.cells[0].expected[0]
    assert ours.difference == pytest.approx(outcome.report.cells[0].results[0].value - 5.25)


def test_reports_alone_are_enough_for_what_is_done(
    base: dict[str, Any], run: Callable[..., sweep.Outcome], ran: list[list[str]]
) -> None:
    whole = {"recipe": base, "cells": {"a": {}}, "keep": "reports"}
    first = run(whole)
    assert not hashes()
    again = run(whole)
    assert (again.cached, again.report.cells) == (["a"], first.report.cells)
    assert run(whole, "eval.tasks=[generated]").ran == ["a"]  # the weights are needed for it, so they are made again
    assert ran[-1][0] == "ptq"


def test_speed_is_measured_once_and_stands_in_the_table(
    base: dict[str, Any], run: Callable[..., sweep.Outcome], ran: list[list[str]]
) -> None:
    bench = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "dtype": "float32"}
    whole = {"recipe": base, "cells": {"a": {}}, "keep": "reports", "bench": bench}
    outcome = run(whole)
    assert [command[0] for command in ran] == ["ptq", "bench"]
    assert not hashes()
    assert run(whole).cached == ["a"]
    assert len(ran) == 2
    header, _, row = outcome.report.cell_rows()
    cells = dict(zip(header, row, strict=True))
    speed = outcome.report.cells[0].bench.variant("fast").speeds["decode, batch 1"].tokens_per_second
    assert cells["decode tokens/s"].startswith(f"{speed:.4g} (")
    assert cells["decode J/token"] == "not measured"
    assert any(line.startswith("energy") for line in outcome.report.notes())


def without_times(folder: str) -> Any:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(each) for key, each in value.items() if key not in ("date", "seconds")}
        return [strip(each) for each in value] if isinstance(value, list) else value

    return strip(json.loads(Path(folder, "sweep.json").read_text()))


def test_a_sweep_that_was_killed_goes_on_to_the_same_result(
    base: dict[str, Any], run: Callable[..., sweep.Outcome], ran: list[list[str]]
) -> None:
    train = {"name": "lsq", "steps": 40, "batch_size": 1, "save_every": 2, "tracker": "none"}
    whole = {"recipe": base, "cells": {"first": {}, "second": {"method": train}, "third": {"seed": 1}}}
    reference = run(whole)
    weights = hashes()
    shutil.copytree("out", "reference")
    shutil.rmtree("out")
    ran.clear()
    child = os.fork()
    if child == 0:
        try:
            run(whole)
        finally:
            os._exit(3)
    begun = Path("out/second.partial/state")
    while not list(begun.glob(f"*/{TRAINING}")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert begun.exists()
    assert [cell["status"] for cell in json.loads(Path("out/sweep.json").read_text())["cells"]] == [
        *("done", "not run", "not run")
    ]
    outcome = run(whole)
    assert (outcome.cached, outcome.ran) == (["first"], ["second", "third"])
    assert ran[0] == ["qat", "out/second.yaml", "--json"]
    assert hashes() == weights
    assert without_times("out") == without_times("reference")
    assert outcome.report.cells[0] != reference.report.cells[0]  # it was measured anew, at another time


def test_what_was_begun_with_other_keys_starts_over(
    base: dict[str, Any], run: Callable[..., sweep.Outcome], ran: list[list[str]]
) -> None:
    Path("out/a.partial/state").mkdir(parents=True)
    Path("out/a.partial/state/lock.json").write_text('{"seed": 1}')
    assert run({"recipe": base, "cells": {"a": {}}}).failed == []
    assert ran == [["ptq", "out/a.yaml", "--json", "--fresh"]]


def test_two_sweeps_do_not_work_in_one_folder(base: dict[str, Any], run: Callable[..., sweep.Outcome]) -> None:
    with sweep._alone(Path("out")), pytest.raises(InputError, match="another sweep is at work in out"):
        run({"recipe": base, "cells": {"a": {}}})


# ---------------------------------------------------------------------------------------------- processes


def command(folder: Path, code: str, name: str = "c") -> Command:
    return Command([sys.executable, "-c", code], folder / f"{name}.log", {"QTOOL_TEST": "7"})


def test_how_a_command_ended_is_told(tmp_path: Path) -> None:
    good = launch.execute(
        command(tmp_path, "import os, sys; print(os.environ['QTOOL_TEST']); print('x', file=sys.stderr)")
    )
    assert good == ("7\n", "")
    assert (tmp_path / "c.log").read_text() == "x\n"
    said = 'import sys; print(\'{"error": "bad", "kind": "run"}\'); sys.exit(1)'
    assert launch.execute(command(tmp_path, said)).error == "bad"
    assert launch.execute(command(tmp_path, "import sys; print('no\\nmore', file=sys.stderr); sys.exit(3)")).error == (
        "no\nmore"
    )
    assert launch.execute(command(tmp_path, "import sys; sys.exit(3)")).error == "ended with exit code 3"
    killed = launch.execute(command(tmp_path, "import os; os.kill(os.getpid(), 9)")).error
    assert killed == "ended by SIGKILL, as a system out of memory does"


def test_commands_run_side_by_side_and_come_as_they_end(tmp_path: Path) -> None:
    """The first can only end after the second."""
    waits = "import os, time\nwhile not os.path.exists('there'): time.sleep(0.01)"
    commands = [
        command(tmp_path, f"import os; os.chdir({str(tmp_path)!r})\n{waits}", "a"),
        command(tmp_path, f"open({str(tmp_path / 'there')!r}, 'w')", "b"),
    ]
    assert [index for index, _ in launch.launch(LauncherConfig(), commands, 2, tmp_path)] == [1, 0]


def test_what_runs_is_asked_to_end_when_a_sweep_is_left(tmp_path: Path) -> None:
    begun, asked = tmp_path / "begun", tmp_path / "asked"
    waits = f"import os, time\nwhile not os.path.exists({str(begun)!r}): time.sleep(0.01)"
    works = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (open({str(asked)!r}, "w"), sys.exit(1)))
open({str(begun)!r}, "w")
time.sleep(30)
"""
    commands = [command(tmp_path, waits, "a"), command(tmp_path, works, "b")]
    with closing(launch.launch(LauncherConfig(), commands, 2, tmp_path)) as ends:
        assert next(ends) == (0, Ended("", ""))
    assert asked.exists()


def test_what_an_earlier_sweep_started_is_waited_for(tmp_path: Path) -> None:
    slow = command(tmp_path, f"import time; time.sleep(0.3); open({str(tmp_path / 'there')!r}, 'w')")
    other = threading.Thread(target=launch.execute, args=(slow,))
    other.start()
    while not slow.log.exists() or not slow.log.parent.exists():
        time.sleep(0.001)
    time.sleep(0.05)
    launch.settle(slow.log)
    assert (tmp_path / "there").exists()
    other.join()


def test_a_cell_is_a_process_of_its_own(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The one test that starts a whole qtool; every other one runs its commands here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    Path("s.yaml").write_text(yaml.safe_dump({"recipe": base, "cells": {"a": {}}}))
    outcome = sweep.sweep(grid.load("s.yaml", [], Path("out")))
    assert (outcome.ran, outcome.failed) == (["a"], [])
    assert outcome.report.cells[0].status == "done"
    assert "evaluating" in Path("out/a.log").read_text()


def cluster_of(config: LauncherConfig, tmp_path: Path) -> Iterator[tuple[int, Ended]]:
    commands = [command(tmp_path, "print(1)", "a"), command(tmp_path, "import sys; sys.exit(4)", "b")]
    return launch.launch(config, commands, None, tmp_path / "jobs")


def test_submitit_runs_the_same_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    monkeypatch.setattr(launch, "POLL", 0.05)
    config = LauncherConfig(name="submitit", cluster="local", parameters={"timeout_min": 2})
    config.check()
    assert dict(cluster_of(config, tmp_path)) == {0: ("1\n", ""), 1: ("", "ended with exit code 4")}


def test_ray_runs_the_same_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    monkeypatch.setattr(launch, "POLL", 0.05)
    config = LauncherConfig(name="ray", parameters={"num_cpus": 1})
    assert dict(cluster_of(config, tmp_path)) == {0: ("1\n", ""), 1: ("", "ended with exit code 4")}


def test_a_job_that_the_cluster_loses_is_a_failed_cell_and_the_window_is_kept() -> None:
    submitted: list[int] = []
    cancelled: list[int] = []

    def submit(command: Command) -> int:
        submitted.append(len(submitted))
        return submitted[-1]

    def result(job: int) -> Ended:
        if job == 1:
            raise RuntimeError("node down")
        return Ended(str(job), "")

    functions: dict[str, Any] = {"is_done": lambda job: True, "result": result, "cancel": cancelled.append}
    commands = [Command([], Path("x"), {})] * 4
    with closing(launch._polled(commands, 2, submit=submit, **functions)) as ends:
        assert next(ends) == (0, ("0", ""))
        assert submitted == [0, 1]
        assert next(ends) == (1, ("", "the cluster's job failed: node down"))
        assert next(ends) == (2, ("2", ""))
    assert cancelled == [3]


# ---------------------------------------------------------------------------------------------- the table


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
    assert "## Over seed\n\n| bits | cells | bits/weight | MB | wikitext2 perplexity | quantize s |" in text
    assert "| 2 | 2 of 3 | 2.250 | 3.00 | 11.00 ± 1.41 |  |" in text
    assert "| 2 | 0 | 2.250 | 3.00 | 10.00 ± 0.50 |  | done |" in text
    assert "| 2 | 2 |  |  |  |  | failed [1] |" in text
    assert "1. no memory" in text
    assert "| float |  |  |  | 9 |  |  |" in text
    assert made.groups[0].metrics["wikitext2 perplexity"] == Mean(mean=11.0, deviation=statistics.stdev([10.0, 12.0]))
    assert SweepReport.model_validate_json(made.model_dump_json()) == made
    file = StringIO()
    made.render(Console(file=file, width=110))
    for part in ("Over seed", "11.00 ± 1.41", "failed [1]", "1. no memory", "2 of 3 cells done, 1 failed"):
        assert part in file.getvalue()


def test_float_models_and_other_machines_are_told_apart() -> None:
    cells = (
        result("a", {"model": "x"}, 10.0, model="x", machine="one, 1 threads"),
        result("b", {"model": "y"}, 10.0, model="y", machine="two, 1 threads"),
    )
    made = SweepReport(name="s", cells=cells)
    assert [row[0] for row in made.cell_rows()] == ["model", "float x", "float y", "x", "y"]
    assert "cells ran on different machines: one, 1 threads; two, 1 threads" in made.notes()


# ---------------------------------------------------------------------------------------------- the packaged tables


CELLS = {
    "builtin-corners": 2 * 2 * 5,
    "builtin-ptq-qat": 8 * 3,
    "continuous-approximation": 3 * 2 * 2,
    "efficientqat": 4 * 4 + (4 + 4 + 4 + 3) + (3 + 3),
    "efficientqat-ablation": 8,
    "lrqat-4": 4 * 6 * 2 + 2 * 6 + 2 * 5 + 3 * 4,
    "lrqat-5": 3 * 2 * 2,
    "ptq-qat": 8 * 4,
}


@pytest.fixture(scope="module")
def tables() -> dict[str, grid.Plan]:
    return {name: grid.load(name) for name in recipe.tables()}


def test_every_packaged_table_loads_with_all_its_cells(tables: dict[str, grid.Plan]) -> None:
    assert {name.removeprefix("tables/"): len(plan.cells) for name, plan in tables.items()} == CELLS
    for name, plan in tables.items():
        what, how = recipe.tables()[name].read_text().splitlines()[:2]
        assert what == f"# {plan.title}"
        assert how == f"#   qtool sweep {name}"
        assert name.startswith("tables/builtin") or plan.config.missing_models == "skip"
        for cell in plan.cells:
            assert set(cell.columns) == set(plan.columns)
            assert cell.recipe.model.path.startswith("builtin:") == name.startswith("tables/builtin")
    assert not recipe.packaged().keys() & recipe.tables().keys()


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
        ("efficientqat-ablation", "block-ap", [8.53, 0.5899]),
        ("efficientqat-ablation", "block-ap-grid", [10.26, 0.5520]),
        ("lrqat-4", "mistral-7b-w4g128", [5.37, 0.7528]),
        ("lrqat-4", "llama-3-8b-w3pc-rtn", [34.10, 0.4746]),
        ("lrqat-4", "llama-2-13b-w2g128-gptq", [28.14]),
        ("lrqat-4", "mistral-7b-w3g128-lsq", [5.90, 0.7196]),
        ("lrqat-5", "llama-2-13b-w4a4kv4-lrqat", [7.15, 0.6265]),
        ("lrqat-5", "llama-2-7b-w4a8kv4-rtn", [6.85, 0.6516]),
    ],
)
def test_published_numbers_are_the_papers(
    tables: dict[str, grid.Plan], table: str, cell: str, published: list[float]
) -> None:
    found = {each.name: each.recipe for each in tables[f"tables/{table}"].cells}[cell]
    assert [each.value for each in found.expected] == published


def test_a_cell_of_a_paper_s_own_method_is_its_packaged_recipe(tables: dict[str, grid.Plan]) -> None:
    for table, method, count in (("efficientqat", "efficientqat", 16), ("lrqat-4", "lrqat", 24)):
        cells = [cell for cell in tables[f"tables/{table}"].cells if cell.columns["method"] == method]
        assert len(cells) == count
        for cell in cells:
            own = recipe.load(f"papers/{method}/{cell.name}")
            assert cell.recipe == own.model_copy(update={"output": cell.recipe.output})


def test_activations_of_table_5_are_on_the_grids_it_says(tables: dict[str, grid.Plan]) -> None:
    for cell in tables["tables/lrqat-5"].cells:
        quant = cell.recipe.quant
        assert cell.columns["grid"] == f"w{quant.num_bits}a{quant.activations}kv{quant.kv_cache}"
        assert (quant.group_size, quant.symmetric) == (-1, True)


def test_a_table_without_its_models_is_not_run_and_says_so(
    tables: dict[str, grid.Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "resolve", lambda path, fetch: (_ for _ in ()).throw(InputError("not here")))
    assert cli.main(["sweep", "tables/efficientqat", "-o", str(tmp_path / "o"), "-q"]) == 0
    text = capsys.readouterr().out
    assert "0 of 37 cells done, 37 not run." in text
    assert "meta-llama/Llama-2-7b-hf is not at hand" in text
    assert "| llama-2-7b | w2g64 | efficientqat | wikitext2 perplexity | 6.86 | not run |  | arXiv 2407.11062" in text
