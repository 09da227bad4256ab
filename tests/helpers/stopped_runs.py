"""Runs that are stopped: their recipes, and how one ends early."""

import os
import signal
import sys
import traceback
from pathlib import Path

import yaml

from qtool.checkpoints.files import file_hashes
from qtool.config import recipe
from qtool.pipelines import quantize as pipeline
from qtool.pipelines import workspace

QUANT = {"num_bits": 4, "group_size": 32}
METHODS = {
    "rtn": {"name": "rtn"},
    "gptq": {"name": "gptq"},
    "gptaq": {"name": "gptq", "gptaq": 0.25},
    "awq": {"name": "awq", "num_ratios": 3, "clip_steps": 2, "search_samples": 4},
    "signround": {"name": "signround", "iterations": 8},
    "hqq": {"name": "hqq"},
    "lsq": {"name": "lsq", "steps": 4, "save_every": 1, "validation_samples": 2, "validate_every": 2},
    "efficientqat": {"name": "efficientqat", "min_steps": 4, "epochs": 0.1, "e2e": {"steps": 3, "save_every": 1}},
}


def make(folder, output, method="gptq", **changes):
    """The recipe of a run."""
    raw = {
        "model": {"path": str(folder / "float")},
        "method": METHODS[method],
        "quant": QUANT,
        "data": {"source": str(folder / "text.txt"), "num_samples": 8, "seq_len": 32},
        "output": {"path": str(output)},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section] = raw[section] | {name: value}
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return recipe.load(str(file))


def quantize(checked, **options):
    return pipeline.quantize(checked, **options)


def hashes(output):
    return file_hashes(output, "*.safetensors")


class Killed(Exception):
    """Raised instead of a signal where the process is to live."""


def in_child(work):
    """Run ``work`` in a forked child; returns its process id."""
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


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_rename(checked, number, after):
    """Run, and die by SIGKILL at the given rename (a file or folder gets its name), before or after it."""
    rename = Path.rename
    count = 0

    def deadly(path, target):
        nonlocal count
        if count == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = rename(path, target)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return result

    def work():
        Path.rename = deadly
        quantize(checked)

    return wait(in_child(work))


def stop_after(monkeypatch, blocks):
    """Let the run fail when it has kept so many blocks."""
    write = workspace.RunWorkspace.write

    def limited(self, index, block):
        write(self, index, block)
        if index + 1 == blocks:
            raise Killed

    monkeypatch.setattr(workspace.RunWorkspace, "write", limited)
