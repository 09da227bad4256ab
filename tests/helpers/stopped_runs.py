"""Recipes of runs that are stopped, and functions that stop them."""

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool.blocks.job import FinishedBlock
from qtool.checkpoints.files import file_hashes
from qtool.config import recipe
from qtool.config.recipe import Recipe
from qtool.pipelines import quantize as pipeline
from qtool.pipelines import workspace
from qtool.pipelines.outcome import Outcome

Whole = Callable[[str], dict[str, str]]  # the hashes of an uninterrupted run, by method
QUANT = {"num_bits": 4, "group_size": 32, "scale_dtype": "float16"}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"name": "rtn"},
    "gptq": {"name": "gptq"},
    "gptaq": {"name": "gptq", "gptaq": 0.25},
    "guided": {"name": "gptq", "guided": {"power": 1.0}},
    "awq": {"name": "awq", "num_ratios": 3, "clip_steps": 2, "search_samples": 4},
    "smoothquant": {"name": "smoothquant", "weights": "gptq"},
    "signround": {"name": "signround", "iterations": 8},
    "gsq": {"name": "gsq", "epochs": 0.1, "min_steps": 8},
    "hqq": {"name": "hqq"},
    "lsq": {"name": "lsq", "steps": 4, "save_every": 1, "validation_samples": 2, "validate_every": 2},
    "efficientqat": {"name": "efficientqat", "min_steps": 4, "epochs": 0.1, "e2e": {"steps": 3, "save_every": 1}},
}


def make(folder: Path, output: Path, method: str = "gptq", **changes: object) -> Recipe:
    """Write and load the recipe of a run; ``section__key`` changes one of its keys."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "float")},
        "method": METHODS[method],
        "quant": QUANT,
        "data": {"source": str(folder / "text.txt"), "num_samples": 8, "seq_len": 32},
        "output": {"path": str(output)},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section] = raw[section] | {name: value}
        if key == "quant__budget":  # it chooses the bits
            raw[section].pop("num_bits", None)
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return recipe.load(str(file))


def quantize(checked: Recipe, *, fresh: bool = False) -> Outcome:
    """Run a recipe in this process, which is the first one and so gets an outcome."""
    outcome = pipeline.quantize(checked, fresh)
    assert outcome is not None
    return outcome


def hashes(output: Path) -> dict[str, str]:
    return file_hashes(output, "*.safetensors")


class Killed(Exception):
    """Ends a run where a signal would also end the test."""


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child and return its process id."""
    child = os.fork()
    if child:
        return child
    shown = sys.stderr
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads that load are not safe in a fork of a threaded process
        work()
    except BaseException:
        traceback.print_exc(file=shown)  # pytest shows it when the test fails
        shown.flush()
        os._exit(1)
    os._exit(0)


def wait(child: int) -> int:
    """Return the exit status of ``child``, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_rename(checked: Recipe, number: int, after: bool) -> int:
    """Run a recipe in a child that SIGKILL ends before or after rename ``number`` (a file or folder gets its name)."""
    rename = Path.rename
    count = 0

    def deadly(path: Path, target: Path) -> Path:
        nonlocal count
        if count == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = rename(path, target)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return result

    def work() -> None:
        pytest.MonkeyPatch().setattr(Path, "rename", deadly)  # for as long as the child lives
        quantize(checked)

    return wait(in_child(work))


def after_each_kill(make_at: Callable[[Path], Recipe], folder: Path, after: bool, expected: object) -> Iterator[Path]:
    """Kill a run at its first rename, another at its second and so on, and let each go on to the ``expected`` hashes.

    Yield the output of each, until a run has no such rename any more. ``make_at`` returns the recipe for an output.
    """
    for number in itertools.count():
        output = folder / f"out-{number}"
        checked = make_at(output)
        status = killed_at_rename(checked, number, after)
        if status == 0:
            return
        assert status == -signal.SIGKILL
        quantize(checked)
        assert hashes(output) == expected, number
        yield output


def stop_after(monkeypatch: pytest.MonkeyPatch, blocks: int, error: type[BaseException] = Killed) -> None:
    """Let a run fail with ``error`` when it has kept ``blocks`` blocks."""
    write = workspace.RunWorkspace.write

    def limited(self: workspace.RunWorkspace, index: int, block: FinishedBlock) -> None:
        write(self, index, block)
        if index + 1 == blocks:
            raise error

    monkeypatch.setattr(workspace.RunWorkspace, "write", limited)
