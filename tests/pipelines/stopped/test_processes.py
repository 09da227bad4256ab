"""Runs of a method by blocks in two processes: started, refused, killed, and continued."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.stopped_runs import hashes, make, quantize

from qtool.system.errors import InputError

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]


def launch(module: str, recipe: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in two processes."""
    tests = Path(tiny.__file__).parents[1]
    return subprocess.run([*LAUNCH, module, "ptq", str(recipe)], cwd=tests, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_same_number_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    checked = make(folder, output, data__num_samples=9)
    killed = launch("helpers.killed_rank", output.with_suffix(".yaml"))
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    state = output.with_name("out.partial") / "state"
    assert (state / "block-00000.json").exists()
    assert not (state / "block-00001.json").exists()
    with pytest.raises(InputError, match=r"out.partial holds an unfinished run that differs.*\n.*processes: 2 -> 1"):
        quantize(checked)
    again = launch("qtool", output.with_suffix(".yaml"))
    assert again.returncode == 0, again.stderr
    assert "1 block(s) are finished" in again.stderr
    assert again.stdout.splitlines()[-1] == str(output)
    make(folder, tmp_path / "whole", data__num_samples=9)
    assert launch("qtool", tmp_path / "whole.yaml").returncode == 0
    assert hashes(output) == hashes(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("processes", "method", "changes", "expected"),
    [
        (3, "gptq", {"data__num_samples": 2}, r"found 2 calibration window.s. for 3 processes.*start at most 2"),
        # Block-AP may have fewer windows in a step than processes; E2E-QP, which comes hours later, may not
        (
            3,
            "efficientqat",
            {"method__e2e": {"steps": 3, "batch_size": 2}},
            r"method\.e2e\.batch_size 2 is less than the 3 processes that share a step",
        ),
        (2, "rtn", {"model__free": True}, r"model\.free runs in one process, but 2 were started"),
    ],
    ids=["windows", "batch_size", "model.free"],
)
def test_what_processes_cannot_share_is_refused_before_any_work(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    method: str,
    changes: dict[str, Any],
    expected: str,
) -> None:
    tiny.several(0, processes, monkeypatch)
    checked = make(folder, tmp_path / "out", method, **changes)
    with pytest.raises(InputError, match=expected):
        quantize(checked)
    assert not list(tmp_path.glob("*.partial"))
