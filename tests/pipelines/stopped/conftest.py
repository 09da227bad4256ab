"""Fixtures of stopped runs: a model, the files that an uninterrupted run writes, and a run that is half done."""

from pathlib import Path

import pytest
from helpers import tiny
from helpers.stopped_runs import Killed, Whole, hashes, make, quantize, stop_after

from qtool.config.recipe import Recipe


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model of three blocks and text for it."""
    path = tmp_path_factory.mktemp("models")
    tiny.llama(path / "float", blocks=3, tied=True)
    (path / "text.txt").write_text("\n".join(tiny.PROSE * 40), encoding="utf-8")
    return path


@pytest.fixture(scope="package")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A function that returns the hashes of an uninterrupted run of a method."""
    made: dict[str, dict[str, str]] = {}

    def of(method: str) -> dict[str, str]:
        if method not in made:
            output = tmp_path_factory.mktemp("whole") / method
            quantize(make(folder, output, method))
            made[method] = hashes(output)
        return made[method]

    return of


@pytest.fixture
def half_done(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe of a run that was stopped after two of its three blocks."""
    checked = make(folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            quantize(checked)
    return checked


@pytest.fixture
def written(folder: Path, tmp_path: Path) -> Path:
    """The output folder of a finished run."""
    quantize(make(folder, tmp_path / "out"))
    return tmp_path / "out"
