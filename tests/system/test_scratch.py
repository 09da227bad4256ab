"""Temporary folders vanish with their process, however it ends."""

import os
import signal
from pathlib import Path

import pytest

from qtool.system import scratch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def killed_with_a_folder(parent: Path) -> None:
    """Let a process make a temporary folder and be killed."""
    child = os.fork()
    if not child:
        with scratch.temporary_folder(parent) as folder:
            (folder / "file").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_folder_is_there_inside_the_block_and_gone_after_it(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "file").touch()
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"), scratch.temporary_folder(tmp_path) as folder:
        fail(folder)
    assert not list(tmp_path.iterdir())


def test_the_next_folder_clears_that_of_a_killed_process_and_not_that_of_a_live_one(tmp_path: Path) -> None:
    killed_with_a_folder(tmp_path)
    (tmp_path / f"{scratch.PREFIX}empty").mkdir()  # killed before it made its lock
    assert len(list(tmp_path.iterdir())) == 2
    with scratch.temporary_folder(tmp_path) as one, scratch.temporary_folder(tmp_path) as other:
        assert len(list(tmp_path.iterdir())) == 2
        assert one.exists()
        assert other.exists()
    assert not list(tmp_path.iterdir())


def test_folders_that_look_alike_stay(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / scratch.LOCK).touch()
    (tmp_path / f"{scratch.PREFIX}link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"{scratch.PREFIX}mine").mkdir()
    (tmp_path / f"{scratch.PREFIX}mine" / "thesis.txt").touch()
    with scratch.temporary_folder(tmp_path):
        pass
    assert (tmp_path / "elsewhere" / scratch.LOCK).exists()
    assert (tmp_path / f"{scratch.PREFIX}mine" / "thesis.txt").exists()
