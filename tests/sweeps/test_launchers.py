"""Launchers run commands as processes or cluster jobs, report how each ended, and leave none running."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import qtool
from qtool.config.sweep import LauncherConfig
from qtool.sweeps import launchers
from qtool.sweeps.launchers import Command, Ended


def command(folder: Path, code: str, name: str = "c") -> Command:
    return Command([sys.executable, "-c", code], folder / f"{name}.log", {"QTOOL_TEST": "7"})


def test_how_a_command_ended_is_told(tmp_path: Path) -> None:
    good = launchers.execute(
        command(tmp_path, "import os, sys; print(os.environ['QTOOL_TEST']); print('x', file=sys.stderr)")
    )
    assert good == ("7\n", "")
    assert (tmp_path / "c.log").read_text() == "x\n"
    said = 'import sys; print(\'{"error": "bad", "kind": "run"}\'); sys.exit(1)'
    assert launchers.execute(command(tmp_path, said)).error == "bad"
    assert launchers.execute(
        command(tmp_path, "import sys; print('no\\nmore', file=sys.stderr); sys.exit(3)")
    ).error == ("no\nmore")
    assert launchers.execute(command(tmp_path, "import sys; sys.exit(3)")).error == "ended with exit code 3"
    killed = launchers.execute(command(tmp_path, "import os; os.kill(os.getpid(), 9)")).error
    assert killed == "ended by SIGKILL (perhaps the system was out of memory)"


def test_commands_run_side_by_side_and_come_as_they_end(tmp_path: Path) -> None:
    """The first command ends only after the second has been reported."""
    there = tmp_path / "there"
    waits = f"import os, time\nwhile not os.path.exists({str(there)!r}): time.sleep(0.01)"
    commands = [command(tmp_path, waits, "a"), command(tmp_path, "", "b")]
    with closing(launchers.launch(LauncherConfig(), commands, 2, tmp_path)) as ends:
        assert next(ends) == (1, Ended("", ""))
        there.touch()
        assert list(ends) == [(0, Ended("", ""))]


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
    with closing(launchers.launch(LauncherConfig(), commands, 2, tmp_path)) as ends:
        assert next(ends) == (0, Ended("", ""))
    assert asked.exists()


def test_what_an_earlier_sweep_started_is_waited_for(tmp_path: Path) -> None:
    slow = command(tmp_path, f"import time; time.sleep(0.3); open({str(tmp_path / 'there')!r}, 'w')")
    other = threading.Thread(target=launchers.execute, args=(slow,))
    other.start()
    while not slow.log.exists() or not slow.log.parent.exists():
        time.sleep(0.001)
    time.sleep(0.05)
    launchers.settle(slow.log)
    assert (tmp_path / "there").exists()
    other.join()


def cluster_of(config: LauncherConfig, tmp_path: Path) -> Iterator[tuple[int, Ended]]:
    commands = [command(tmp_path, "print(1)", "a"), command(tmp_path, "import sys; sys.exit(4)", "b")]
    return launchers.launch(config, commands, None, tmp_path / "jobs")


def test_submitit_runs_the_same_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(Path(qtool.__file__).parents[1]))
    monkeypatch.setattr(launchers, "POLL", 0.05)
    config = LauncherConfig(name="submitit", cluster="local", parameters={"timeout_min": 2})
    config.check()
    assert dict(cluster_of(config, tmp_path)) == {0: ("1\n", ""), 1: ("", "ended with exit code 4")}


def test_ray_runs_the_same_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(qtool.__file__).parents[1]))
    monkeypatch.setattr(launchers, "POLL", 0.05)
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
    with closing(launchers._polled(commands, 2, submit=submit, **functions)) as ends:
        assert next(ends) == (0, ("0", ""))
        assert submitted == [0, 1]
        assert next(ends) == (1, ("", "the cluster's job failed: node down"))
        assert next(ends) == (2, ("2", ""))
    assert cancelled == [3]
