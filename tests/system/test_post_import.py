"""A function runs after a module was imported, once, and the module is as without the hook."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtool.system.post_import import when_imported

NAME = "module_to_wait_for"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    path = tmp_path / f"{NAME}.py"
    path.write_text("value = 1\n")
    yield path
    sys.modules.pop(NAME, None)
    assert sys.meta_path == finders


def test_it_runs_once_and_after_the_code_of_the_module(module: Path) -> None:
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(sys.modules[NAME].value))
    assert NAME not in sys.modules
    importlib.import_module("colorsys")
    assert seen == []
    found = importlib.import_module(NAME)
    assert seen == [1]
    importlib.reload(found)
    assert seen == [1]


def test_it_runs_at_once_if_the_module_is_there(module: Path) -> None:
    importlib.import_module(NAME)
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(1))
    assert seen == [1]


def test_the_module_keeps_its_own_loader(module: Path) -> None:
    plain = importlib.import_module(NAME)
    del sys.modules[NAME]
    when_imported(NAME, lambda: None)
    hooked = importlib.import_module(NAME)
    assert hooked is not plain
    for found in (hooked.__loader__, hooked.__spec__ and hooked.__spec__.loader):
        assert type(found) is type(plain.__loader__)
    assert inspect.getsource(hooked) == "value = 1\n"


def test_a_module_that_fails_may_be_imported_again(module: Path) -> None:
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(1))
    module.write_text("raise ValueError('half a module')\n")
    with pytest.raises(ValueError, match="half a module"):
        importlib.import_module(NAME)
    assert seen == []
    module.write_text("value = 'whole again'\n")
    assert importlib.import_module(NAME).value == "whole again"
    assert seen == [1]


def test_two_may_wait_for_one_module(module: Path) -> None:
    seen: list[str] = []
    when_imported(NAME, lambda: seen.append("first"))
    when_imported(NAME, lambda: seen.append("second"))
    importlib.import_module(NAME)
    assert sorted(seen) == ["first", "second"]


def test_a_module_that_does_not_exist_is_still_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    when_imported("no_such_module_anywhere", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_anywhere")
