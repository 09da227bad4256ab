"""Runs of a method by blocks in two processes: started, refused, killed, and continued."""

import subprocess
import sys
from pathlib import Path

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


def test_fewer_windows_than_processes_are_refused_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.several(0, 3, monkeypatch)
    checked = make(folder, tmp_path / "out", data__num_samples=2)
    with pytest.raises(InputError, match=r"found 2 calibration window.s. for 3 processes.*start at most 2"):
        quantize(checked)
    assert not list(tmp_path.glob("*.partial"))


def test_a_step_of_fewer_windows_than_processes_is_refused_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block-AP may have fewer windows in a step than processes; E2E-QP, which comes hours later, may not."""
    tiny.several(0, 3, monkeypatch)
    checked = make(folder, tmp_path / "out", "efficientqat", method__e2e={"steps": 3, "batch_size": 2})
    with pytest.raises(InputError, match=r"method.e2e.batch_size 2 is less than the 3 processes that share a step"):
        quantize(checked)
    assert not list(tmp_path.glob("*.partial"))


def test_a_model_that_is_not_loaded_is_quantized_in_one_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.several(0, 2, monkeypatch)
    checked = make(folder, tmp_path / "out", "rtn", model__free=True)
    with pytest.raises(InputError, match=r"model.free runs in one process, but 2 were started"):
        quantize(checked)
