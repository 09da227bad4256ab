"""A run whose last block trains on predictions: streamed or whole, killed or not, it gives the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.stopped_runs import METHODS, Killed, hashes, make, quantize, stop_after

from qtool.blocks.job import Job, load_method
from qtool.blocks.tables import pack_embeddings
from qtool.checkpoints import files, native
from qtool.config.recipe import Recipe
from qtool.data import windows
from qtool.models.loading import load_model

KEYS: dict[str, dict[str, Any]] = {
    "signround": {"iterations": 8},
    "efficientqat": {"min_steps": 8, "epochs": 0.1, "e2e": {"steps": 0}},
}
PACKED = {"quant__embedding": {"num_bits": 8, "group_size": -1}}


def recipe_of(folder: Path, output: Path, name: str, loss: str = "kl", **changes: Any) -> Recipe:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "last", {"name": name, "last_block_loss": loss, **KEYS[name]})
        return make(folder, output, "last", quant__num_bits=2, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.llama(tmp_path / "float", tied=True)
    (tmp_path / "text.txt").write_text(" ".join(tiny.PROSE * 40), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize(("dtype", "tables"), [("auto", {}), ("float32", {}), ("float32", PACKED)], ids=str)
def test_a_streamed_run_gives_what_a_whole_model_gives(
    name: str, dtype: str, tables: dict[str, Any], folder: Path
) -> None:
    checked = recipe_of(folder, folder / "out", name, model__dtype=dtype, **tables)
    quantize(checked)
    loaded = load_model(checked.model)
    tokens = windows.calibration(checked.data, loaded, checked.seed).tokens
    job = pack_embeddings(Job.select(loaded, checked.quant, tokens, seed=checked.seed))
    load_method(name).run(job, checked.method)
    (folder / "library").mkdir()
    native.save(folder / "library", loaded, tiny.specs(loaded), job.tables)
    streamed, whole = files.SafetensorsFolder(folder / "out"), files.SafetensorsFolder(folder / "library")
    assert set(streamed.names) == set(whole.names)
    for each in whole.names:
        assert torch.equal(streamed.tensor(each), whole.tensor(each)), each


@pytest.mark.parametrize("name", KEYS)
def test_only_the_last_block_differs_and_a_stopped_run_gives_the_same_bytes(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loss in ("mse", "kl"):
        quantize(recipe_of(folder, folder / loss, name, loss))
    ours, theirs = (files.SafetensorsFolder(folder / loss) for loss in ("kl", "mse"))
    differ = {key.split(".")[2] for key in ours.names if not torch.equal(ours.tensor(key), theirs.tensor(key))}
    assert differ == {"1"}
    checked = recipe_of(folder, folder / "stopped", name)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Killed):
            quantize(checked)
    quantize(checked)
    assert hashes(folder / "stopped") == hashes(folder / "kl")
