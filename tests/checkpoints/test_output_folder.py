"""Output folders: a folder gets its final name only when it is complete, whatever fails on the way."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import tiny

from qtool.checkpoints import native, output_folder
from qtool.checkpoints.output_folder import atomic_folder
from qtool.config.quant import QuantConfig
from qtool.system.errors import InputError, RunError

ONLY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(partial: Path) -> None:
    mark(partial)
    (partial / "data").write_text("new")


def mark(folder: Path) -> Path:
    """Make a folder that looks like one that qtool wrote."""
    folder.mkdir(exist_ok=True)
    (folder / "qtool.json").write_text('{"format_version": 1}')
    return folder


def fail(partial: Path, error: BaseException) -> None:
    fill(partial)
    raise error


def test_a_folder_has_its_name_only_after_the_block_and_parents_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with atomic_folder(path, overwrite=False) as partial:
        fill(partial)
        assert partial.parent.parent == path.parent
        assert not path.exists()
    assert (path / "data").read_text() == "new"
    assert [each.name for each in path.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1), InputError("x")], ids=repr)
@pytest.mark.parametrize("there", [False, True])
def test_nothing_new_is_left_when_the_block_ends_badly(tmp_path: Path, error: BaseException, there: bool) -> None:
    path = tmp_path / "out"
    if there:
        mark(path)
    with pytest.raises(type(error)), atomic_folder(path, overwrite=there) as partial:
        fail(partial, error)
    assert [each.name for each in tmp_path.iterdir()] == (["out"] if there else [])
    assert not (path / "data").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_in_words(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(RunError, match=r"writing .*out failed: the disk is full; (nothing was left|the old folder)"),
        atomic_folder(tmp_path / "out", overwrite=False) as partial,
    ):
        fail(partial, OSError(number, os.strerror(number), str(partial / "x")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_a_file_that_may_not_grow_leaves_nothing_and_keeps_what_was_there(
    folder: Path, tmp_path: Path, there: bool
) -> None:
    loaded = tiny.packed(folder, QuantConfig(group_size=32))
    if there:
        mark(tiny.copied(folder, tmp_path / "out"))
    before = sorted(file.name for file in tmp_path.rglob("*"))
    with (
        pytest.raises(RunError, match=r"writing .*out failed: .*; (nothing was left|the old folder)"),
        tiny.files_up_to(20_000),
        atomic_folder(tmp_path / "out", overwrite=there) as partial,
    ):
        native.save(partial, loaded, tiny.specs(loaded))
    assert sorted(file.name for file in tmp_path.rglob("*")) == before


@ONLY_ROOT
def test_a_disk_that_is_really_full_leaves_nothing_and_keeps_what_was_there(folder: Path, small_disk: Path) -> None:
    loaded = tiny.packed(folder, QuantConfig(group_size=32))
    mark(small_disk / "out")
    with (
        pytest.raises(RunError, match=r"writing .*out failed: the disk is full; (nothing was left|the old folder)"),
        atomic_folder(small_disk / "out", overwrite=True) as partial,
    ):
        native.save(partial, loaded, tiny.specs(loaded))
    assert [str(each.relative_to(small_disk)) for each in small_disk.rglob("*")] == ["out", "out/qtool.json"]


@ONLY_ROOT
def test_too_little_space_is_seen_before_the_work(small_disk: Path) -> None:
    output_folder.check_space(small_disk / "deep" / "out", 1000)
    with pytest.raises(InputError, match=r"out needs about 0 MB, and .*disk has 0 MB free"):
        output_folder.check_space(small_disk / "deep" / "out", 100_000)


def test_an_existing_folder_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    fill(path)
    with (
        pytest.raises(InputError, match=r"out exists; choose another folder, or pass --overwrite to replace it"),
        atomic_folder(path, overwrite=False),
    ):
        pytest.fail("the block must not run")
    assert (path / "data").read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_a_model_folder_with_all_that_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "out"
    mark(path)
    (path / "old").write_text("")
    with atomic_folder(path, overwrite=True) as partial:
        fill(partial)
        assert (path / "old").exists(), "the old folder must stay until the new one is whole"
    assert sorted(each.name for each in path.iterdir()) == ["data", "qtool.json"]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_overwrite_replaces_nothing_but_model_folders(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "folder":
        path.mkdir()
    precious = path / "thesis.tex" if kind == "folder" else path
    precious.write_text("years of work")
    with pytest.raises(InputError, match="was not written by qtool"), atomic_folder(path, overwrite=True):
        pytest.fail("the block must not run")
    assert precious.read_text() == "years of work"


def test_a_parent_that_is_a_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"out cannot be written: .* is a file"),
        atomic_folder(tmp_path / "file" / "out", overwrite=False),
    ):
        pytest.fail("the block must not run")


def test_what_a_killed_run_left_does_not_stop_the_next(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "model").mkdir(parents=True)
    (tmp_path / "out.partial" / "qtool.lock").write_text("")
    (tmp_path / "out.partial" / "model" / "half").write_text("")
    with atomic_folder(tmp_path / "out", overwrite=False) as partial:
        fill(partial)
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["data", "qtool.json"]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_overwrite_leaves_a_neighbour_called_old_alone(tmp_path: Path) -> None:
    for name in ("out", "out.old"):
        mark(tmp_path / name)
    (tmp_path / "out.old" / "mine").write_text("a backup that a person made")
    with atomic_folder(tmp_path / "out", overwrite=True) as partial:
        fill(partial)
    assert (tmp_path / "out" / "data").exists()
    assert (tmp_path / "out.old" / "mine").exists()


def test_the_old_folder_comes_back_when_the_new_one_cannot_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mark(tmp_path / "out")
    (path / "config.json").write_text('{"old": true}')
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "model":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RunError), atomic_folder(path, overwrite=True) as partial:
        fill(partial)
    assert (path / "config.json").read_text() == '{"old": true}'


def test_overwrite_works_through_a_link_to_a_folder(tmp_path: Path) -> None:
    real = mark(tmp_path / "large-disk")
    (tmp_path / "out").symlink_to(real)
    with atomic_folder(tmp_path / "out", overwrite=True) as partial:
        fill(partial)
    assert (tmp_path / "out" / "data").read_text() == "new"
