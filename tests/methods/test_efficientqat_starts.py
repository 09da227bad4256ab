"""EfficientQAT: where it starts, from checkpoints and without training."""

from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.efficientqat import W2A, Make, run, same
from torch import Tensor

from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.job import Job, load_method
from qtool.blocks.states import PROBED_WINDOWS
from qtool.blocks.task import BlockTask
from qtool.checkpoints import native, output_folder
from qtool.methods import awq, gptq
from qtool.models.loaded import LoadedModel


def folder(loaded: LoadedModel, path: Path) -> str:
    """``loaded`` as a native checkpoint."""
    with output_folder.atomic_folder(path, overwrite=False) as partial:
        native.save(partial, loaded, tiny.specs(loaded))
    return str(path)


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "smoothquant", "signround"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_starts_from_any_checkpoint(name: str, family: str, tmp_path: Path, tokens: Tensor) -> None:
    """At its very codes, grids, norms and biases."""
    path = tiny.FAMILIES[family](tmp_path / "float")
    theirs, ours = tiny.load(path), tiny.load(path)
    method = load_method(name)
    quick: dict[str, Any] = {"iterations": 4} if name == "signround" else {}
    method.run(Job.select(theirs, W2A, tokens), method.config(name=name, **quick))
    start = folder(theirs, tmp_path / "packed")
    run(ours, tokens, W2A, epochs=0, init_from=start)
    assert same(ours, theirs)


@pytest.mark.parametrize("settings", [{"init": "minmax"}, {"init_from": "gptq"}], ids=str)
def test_a_block_that_is_not_trained_reads_a_few_windows_and_is_the_same(
    make_llama: Make, tokens: Tensor, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEQA, and a second phase alone, may read more text than the hidden states of a block can be kept for."""
    if "init_from" in settings:
        before = make_llama()
        gptq.run(Job.select(before, W2A, tokens), gptq.Config())
        settings = {"init_from": folder(before, tmp_path / "packed")}
    trained, placed = make_llama(), make_llama()
    series = run(trained, tokens, W2A, epochs=1e-9, min_steps=0, **settings)  # no steps, by the code that trains
    read: list[int] = []
    through = BlockTask.through_counted

    def watched(task: BlockTask, states: HiddenStates) -> HiddenStates:
        read.append(sum(len(batch) for batch in states))
        return through(task, states)

    monkeypatch.setattr(BlockTask, "through_counted", watched)
    again = run(placed, tokens, W2A, epochs=0, **settings)
    assert same(trained, placed)
    assert again["block_error"] == pytest.approx(series["block_error"], rel=1e-3)
    assert read == [PROBED_WINDOWS] * 2
    assert len(tokens) > PROBED_WINDOWS


def test_training_goes_on_from_a_checkpoint(make_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    before = make_llama()
    awq.run(Job.select(before, W2A, tokens), awq.Config())
    start = folder(before, tmp_path / "packed")
    trained, again = make_llama(), make_llama()
    series = run(trained, tokens, W2A, init_from=start, travel=0.3)
    untrained = run(again, tokens, W2A, init_from=start, epochs=1e-9, min_steps=0)
    assert series["start_loss"][0] == untrained["loss"][0]
    assert all(ours < theirs for ours, theirs in zip(series["loss"], untrained["loss"], strict=True))
