"""Fixtures for tests of whole commands: models, an empty folder, and a run that is done."""

from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.whole_runs import Result, offline, whole_run, write_recipe

from qtool.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with float models, and a text file; only read them."""
    at = tmp_path_factory.mktemp("models")
    tiny.llama(at / "llama")
    tiny.gpt2(at / "gpt2")
    tiny.text(at)
    return at


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QTOOL_DEBUG", raising=False)
    offline(monkeypatch)
    return tmp_path


@pytest.fixture
def qtool_(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``qtool`` in this process."""

    def run(*args: str | Path) -> Result:
        capsys.readouterr()
        code = main.main([str(arg) for arg in args])
        printed = capsys.readouterr()
        print(printed.err)  # for a person who reads the messages: pytest -rP
        return Result(code, printed.out, printed.err)

    return run


@pytest.fixture
def recipe(models: Path) -> Callable[..., str]:
    return partial(write_recipe, models)


@pytest.fixture
def gptq(models: Path) -> dict[str, Any]:
    return whole_run(models)


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder in which a whole run was made, and what it printed."""
    at = tmp_path_factory.mktemp("finished")
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        chdir(at),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
    ):
        offline(monkeypatch)
        code = main.main(["ptq", write_recipe(models, **whole_run(models)), "--json"])
    assert code == 0, err.getvalue()
    return at, Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def whole(finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> Result:
    """A whole run, in the current folder; only read it."""
    monkeypatch.chdir(finished[0])
    return finished[1]
