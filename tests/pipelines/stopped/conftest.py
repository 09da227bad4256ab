"""Fixtures of stopped runs: a model, what an uninterrupted run makes of it, and a run that is half done."""

import pytest
from helpers import tiny
from helpers.stopped_runs import Killed, hashes, make, quantize, stop_after


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A float model of three blocks and text for it."""
    path = tmp_path_factory.mktemp("models")
    tiny.llama(path / "float", blocks=3, tied=True)
    (path / "text.txt").write_text("\n".join(tiny.PROSE * 40), encoding="utf-8")
    return path


@pytest.fixture(scope="package")
def whole(folder, tmp_path_factory):
    """Hashes of an uninterrupted run, by method."""
    made = {}

    def of(method):
        if method not in made:
            output = tmp_path_factory.mktemp("whole") / method
            quantize(make(folder, output, method))
            made[method] = hashes(output)
        return made[method]

    return of


@pytest.fixture
def half_done(folder, tmp_path, monkeypatch):
    """A run of which two of three blocks are done."""
    checked = make(folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            quantize(checked)
    return checked
