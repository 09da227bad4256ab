"""A running sweep: which cells run again, and the state after a failed cell or a kill."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import tiny
from helpers.records import locked

import qtool
from qtool.cli import main
from qtool.sweeps import grid, launchers, runner
from qtool.sweeps.launchers import Command, Ended
from qtool.system import progress
from qtool.system.errors import InputError
from qtool.training.end_to_end import TRAINING


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of cells in order; each runs in this process, which has loaded torch already."""
    commands: list[list[str]] = []

    def execute(command: Command, running: object = None) -> Ended:
        assert command.arguments[:3] == [sys.executable, "-m", "qtool"]
        commands.append(command.arguments[3:])
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()), progress.use(progress.Sink()):
            code = main.main(command.arguments[3:])
        return Ended(out.getvalue(), launchers._error(code, out.getvalue(), command.log))

    monkeypatch.setattr(launchers, "execute", execute)
    return commands


@pytest.fixture
def base(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe that runs in a moment."""
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
def run(ran: list[list[str]]) -> Callable[..., runner.SweepOutcome]:
    """A function that runs a sweep in ``out``."""

    def run(whole: dict[str, Any], *overrides: str, **options: Any) -> runner.SweepOutcome:
        Path("s.yaml").write_text(f"# A title.\n{yaml.safe_dump(whole, sort_keys=False)}")
        return runner.sweep(grid.load("s.yaml", overrides, Path("out")), **options)

    return run


def hashes() -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in Path("out").glob("*/*.safetensors")}


def test_what_is_done_is_not_run_again_and_what_changed_is(
    base: dict[str, Any], run: Callable[..., runner.SweepOutcome], ran: list[list[str]]
) -> None:
    whole = {"recipe": base, "cells": {"a": {"quant.num_bits": 4}, "b": {"method.name": "gptq"}}}
    first = run(whole)
    assert (first.ran, first.cached, first.failed) == (["a", "b"], [], [])
    assert "2 runs of" in Path("out/compare.html").read_text()
    assert ran == [["ptq", f"out/{name}.yaml", "--json"] for name in ("a", "b")]
    again = run(whole)
    assert (again.ran, again.cached, len(ran)) == ([], ["a", "b"], 2)
    assert again.report.cells == first.report.cells
    # another grid: only that cell runs, and its folder is replaced
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
    # a missing or half written report is made again; --fresh runs every cell again
    Path("out/a/report.json").write_text('{"model"')
    assert run(whole, "eval.tasks=[generated]").ran == ["a"]
    assert ran[-1][0] == "eval"
    assert run(whole, "eval.tasks=[generated]", fresh=True).ran == ["a", "b"]
    assert ran[-1] == ["ptq", "out/b.yaml", "--json", "--overwrite", "--fresh"]


def test_a_cell_that_starts_from_another_runs_after_it_and_again_with_it(
    base: dict[str, Any], run: Callable[..., runner.SweepOutcome], ran: list[list[str]]
) -> None:
    start = {"start": "rounded", "method": {"name": "efficientqat", "epochs": 0, "e2e": {"steps": 0}}}
    whole = {"recipe": base | {"eval": None}, "cells": {"tuned": start, "rounded": {"quant.num_bits": 4}}}
    first = run(whole)
    assert [command[1] for command in ran] == ["out/rounded.yaml", "out/tuned.yaml"]
    assert not first.failed
    assert len({file.read_bytes() for file in Path("out").glob("*/*00001*.safetensors")}) == 1  # the same codes
    assert run(whole).ran == []
    shutil.rmtree("out/rounded")
    assert run(whole).ran == ["tuned", "rounded"]
    assert [command[1] for command in ran[2:]] == ["out/rounded.yaml", "out/tuned.yaml"]


def test_each_cell_has_its_own_run_in_the_tracker(
    base: dict[str, Any], run: Callable[..., runner.SweepOutcome], ran: list[list[str]]
) -> None:
    """In one folder, which ``tensorboard --logdir out`` shows; another tracker makes no cell again."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    whole = {"recipe": base, "grid": {"quant.num_bits": [3, 4]}}
    assert not run(whole, "tracker=tensorboard").failed
    sizes = {}
    for folder in Path("out").glob("*.logs/*"):
        read = reader.EventAccumulator(str(folder))
        read.Reload()
        (event,) = read.Scalars("size/bits_per_weight")
        sizes[folder.parent.name] = event.value
    assert sizes == {"num_bits=3.logs": 3.5, "num_bits=4.logs": 4.5}
    assert run(whole).ran == []


def test_a_report_is_never_taken_for_another_evaluation_s(
    base: dict[str, Any], run: Callable[..., runner.SweepOutcome], ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that dies after it recorded a cell's new request, before running it, leaves no outdated report."""
    whole = {"recipe": base, "cells": {"a": {}}}
    run(whole)
    with monkeypatch.context() as patched:
        patched.setattr(runner, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(whole, "eval.tasks=[generated]")
    outcome = run(whole, "eval.tasks=[generated]")
    assert outcome.ran == ["a"]
    assert outcome.report.metrics() == ["generated perplexity"]


def test_a_failed_cell_stops_no_other_and_is_run_again(
    base: dict[str, Any],
    run: Callable[..., runner.SweepOutcome],
    ran: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = {"recipe": base, "grid": {"quant.num_bits": [4, 3, 2]}}
    good, broken = launchers.execute, ["out/num_bits=4.yaml", "out/num_bits=3.yaml"]

    def sometimes(command: Command, running: object = None) -> Ended:
        return Ended("", "it broke\nin two lines") if command.arguments[4] in broken else good(command)

    monkeypatch.setattr(launchers, "execute", sometimes)
    outcome = run(whole)
    assert (outcome.ran, outcome.failed) == ([f"num_bits={n}" for n in (4, 3, 2)], ["num_bits=4", "num_bits=3"])
    assert [cell.status for cell in outcome.report.cells] == ["failed", "failed", "done"]
    assert "1 of 3 cells done, 2 failed." in Path("out/sweep.md").read_text()
    assert "1. it broke; in two lines\n" in Path("out/sweep.md").read_text()
    broken.pop()
    assert main.main(["sweep", "s.yaml", "-o", "out", "--json"]) == 1
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
    assert main.main(["sweep", "s.yaml", "-o", "out", "-q"]) == 0
    assert "3 of 3 cells done." in capsys.readouterr().out


def test_what_a_run_would_refuse_is_said_before_any_cell_runs(
    base: dict[str, Any], run: Callable[..., runner.SweepOutcome], ran: list[list[str]], tmp_path: Path
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
        "out/good exists and was not written by qtool",
        "group_size 48",
        "did you mean enwiki",
        "kl is named",
    ):
        assert part in str(caught.value)
    assert "[size, size-too] " in str(caught.value)
    assert not ran
    assert not list(Path("out").glob("*.yaml"))


def test_a_missing_model_is_an_error_or_not_run_as_the_sweep_says(
    base: dict[str, Any], run: Callable[..., runner.SweepOutcome], ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
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
    assert outcome.report.cells[2].reason == "nobody/qtool-no-such-model is not on this machine"
    text = outcome.report.markdown()
    assert "1 of 3 cells done, 2 not run." in text
    assert "2. nobody/qtool-no-such-model is not on this machine" in text
    assert "| hub | generated perplexity | 5.25 | not run |  | a paper |" in text
    ours = outcome.report.cells[0].expected[0]
    measured = outcome.report.cells[0].results[0].value
    assert measured is not None
    assert ours.difference == pytest.approx(measured - 5.25)


def test_reports_alone_are_enough_for_what_is_done(
    base: dict[str, Any], run: Callable[..., runner.SweepOutcome], ran: list[list[str]]
) -> None:
    whole = {"recipe": base, "cells": {"a": {}}, "keep": "reports"}
    first = run(whole)
    assert not hashes()
    again = run(whole)
    assert (again.cached, again.report.cells) == (["a"], first.report.cells)
    assert run(whole, "eval.tasks=[generated]").ran == ["a"]  # evaluation needs the weights, so they are made again
    assert ran[-1][0] == "ptq"


def test_speed_is_measured_once_and_stands_in_the_table(
    base: dict[str, Any], run: Callable[..., runner.SweepOutcome], ran: list[list[str]]
) -> None:
    bench = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "dtype": "float32"}
    whole = {"recipe": base, "cells": {"a": {}}, "keep": "reports", "bench": bench}
    outcome = run(whole)
    assert [command[0] for command in ran] == ["ptq", "bench"]
    assert not hashes()
    assert run(whole).cached == ["a"]
    assert len(ran) == 2
    table = outcome.report.cell_table()
    cells = dict(zip(table.columns, table.rows[1], strict=True))
    measured = outcome.report.cells[0].bench
    assert measured is not None
    speed = measured.variant("fast").speeds["decode, batch 1"].tokens_per_second
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
    base: dict[str, Any], run: Callable[..., runner.SweepOutcome], ran: list[list[str]]
) -> None:
    train = {"name": "lsq", "steps": 40, "batch_size": 1, "save_every": 2}
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
    assert outcome.report.cells[0] != reference.report.cells[0]  # a new measurement has another time


def test_what_was_begun_with_other_keys_starts_over(
    base: dict[str, Any], run: Callable[..., runner.SweepOutcome], ran: list[list[str]]
) -> None:
    Path("out/a.partial/state").mkdir(parents=True)
    Path("out/a.partial/state/lock.json").write_text(locked(seed=1).model_dump_json())
    assert run({"recipe": base, "cells": {"a": {}}}).failed == []
    assert ran == [["ptq", "out/a.yaml", "--json", "--fresh"]]


def test_two_sweeps_do_not_work_in_one_folder(base: dict[str, Any], run: Callable[..., runner.SweepOutcome]) -> None:
    with runner._alone(Path("out")), pytest.raises(InputError, match="another sweep is running in out"):
        run({"recipe": base, "cells": {"a": {}}})


def test_a_cell_is_a_process_of_its_own(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this test starts a qtool process; all others run the commands in this process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(qtool.__file__).parents[1]))
    Path("s.yaml").write_text(yaml.safe_dump({"recipe": base, "cells": {"a": {}}}))
    outcome = runner.sweep(grid.load("s.yaml", [], Path("out")))
    assert (outcome.ran, outcome.failed) == (["a"], [])
    assert outcome.report.cells[0].status == "done"
    assert "evaluating" in Path("out/a.log").read_text()
