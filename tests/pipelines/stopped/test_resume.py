"""A run that was stopped goes on with its finished blocks, and never with those of another run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.methods import recorded
from helpers.stopped_runs import METHODS, Killed, Whole, hashes, make, quantize, stop_after
from torch import Tensor

from qtool.blocks.job import FinishedBlock, Job, load_method
from qtool.blocks.task import BlockTask
from qtool.config.recipe import Recipe
from qtool.pipelines import quantize as pipeline
from qtool.pipelines import workspace
from qtool.system.errors import InputError, RunError
from qtool.training import end_to_end


def test_finished_blocks_are_not_done_again(
    half_done: Recipe, tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.methods import gptq

    done: list[int] = []
    solve = gptq.quantize_group

    def counted(task: BlockTask, *rest: Any) -> None:
        done.append(task.index)
        solve(task, *rest)

    monkeypatch.setattr(gptq, "quantize_group", counted)
    quantize(half_done)
    assert set(done) == {2}
    assert hashes(tmp_path / "out") == whole("gptq")
    assert len(recorded(tmp_path / "out" / "qtool.json")["block_error"]) == 3
    assert not (tmp_path / "out.partial").exists()


def test_finished_training_is_not_done_again(
    folder: Path, tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps are not done again, and once all are done the model runs no forward either."""
    checked = make(folder, tmp_path / "out", "lsq")
    done: list[int] = []
    losses = end_to_end._Training.losses

    def counted(self: end_to_end._Training, step: int) -> Iterator[Tensor]:
        done.append(step)
        return losses(self, step)

    monkeypatch.setattr(end_to_end._Training, "losses", counted)
    write = end_to_end._Kept.write

    def stopping(kept: end_to_end._Kept, state: dict[str, Tensor]) -> None:
        write(kept, state)
        if int(state["steps"][0]) in (2, 4):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(end_to_end._Kept, "write", stopping)
        for _ in range(2):
            with pytest.raises(Killed):
                quantize(checked)
        assert done == [0, 1, 2, 3]
        quantize(checked)
    assert done == [0, 1, 2, 3]
    assert hashes(tmp_path / "out") == whole("lsq")
    series = recorded(tmp_path / "out" / "qtool.json")
    assert (len(series["loss"]), len(series["validation"])) == (4, 3)


def test_how_often_a_training_is_kept_changes_nothing(folder: Path, tmp_path: Path, whole: Whole) -> None:
    quantize(make(folder, tmp_path / "out", "lsq", method__save_every=3))
    assert hashes(tmp_path / "out") == whole("lsq")


def test_a_changed_recipe_is_refused_with_the_difference(half_done: Recipe, folder: Path, tmp_path: Path) -> None:
    changed = make(folder, tmp_path / "out", quant__num_bits=3)
    with pytest.raises(InputError, match=r"--fresh to start over:\n  quant\.num_bits: 4 -> 3$"):
        quantize(changed)
    assert (tmp_path / "out.partial" / "state" / "block-00001.json").exists(), "what is done was lost"


def test_a_changed_model_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "models"
    other.mkdir()
    tiny.llama(other / "float", blocks=3)
    (other / "text.txt").write_text("\n".join(tiny.PROSE * 40), encoding="utf-8")
    checked = make(other, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Killed):
            quantize(checked)
    tiny.llama(other / "float", blocks=3, tied=True)
    with pytest.raises(InputError, match=r"model_files\.config\.json: "):
        quantize(checked)


def test_changed_text_is_refused(half_done: Recipe, folder: Path, tmp_path: Path) -> None:
    text = folder / "text.txt"
    before = text.read_text()
    try:
        text.write_text("Something else entirely. " * 400)
        with pytest.raises(InputError, match="the calibration text has changed"):
            quantize(half_done)
    finally:
        text.write_text(before)
    quantize(half_done)


def test_fresh_starts_over(half_done: Recipe, folder: Path, tmp_path: Path) -> None:
    changed = make(folder, tmp_path / "out", quant__num_bits=3)
    quantize(changed, fresh=True)
    assert json.loads((tmp_path / "out" / "qtool.json").read_text())["label"].startswith("w3")


def test_a_damaged_shard_is_made_again(half_done: Recipe, tmp_path: Path, whole: Whole) -> None:
    shard = sorted((tmp_path / "out.partial" / "model").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    quantize(half_done)
    assert hashes(tmp_path / "out") == whole("gptq")


def test_what_does_not_change_the_result_may_change(
    half_done: Recipe, folder: Path, tmp_path: Path, whole: Whole
) -> None:
    quantize(make(folder, tmp_path / "out", data__memory_budget="1kB"))
    assert hashes(tmp_path / "out") == whole("gptq")


def sharded(folder: Path, target: Path) -> Path:
    """Write the float model in one file for each block."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(folder / "float").save_pretrained(target / "float", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(folder / "float").save_pretrained(target / "float")
    (target / "text.txt").write_text((folder / "text.txt").read_text())
    assert len(list((target / "float").glob("*.safetensors"))) > 2
    return target


def test_sharded_files_give_the_same_weights(folder: Path, tmp_path: Path, whole: Whole) -> None:
    quantize(make(sharded(folder, tmp_path), tmp_path / "out"))
    assert hashes(tmp_path / "out") == whole("gptq")


def test_a_shard_deleted_in_mid_run_is_named_and_the_run_goes_on_when_it_is_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole
) -> None:
    models = sharded(folder, tmp_path)
    shard = sorted((models / "float").glob("*.safetensors"))[-1]
    kept = shard.read_bytes()
    checked = make(models, tmp_path / "out")
    write = workspace.RunWorkspace.write

    def losing(self: workspace.RunWorkspace, index: int, block: FinishedBlock) -> None:
        write(self, index, block)
        shard.unlink(missing_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(workspace.RunWorkspace, "write", losing)
        with pytest.raises(RunError, match=r"is no longer in .*; put its file back"):
            quantize(checked)
    with pytest.raises(InputError, match=f"lists {shard.name}, which is not there"):
        quantize(checked)
    shard.write_bytes(kept)
    quantize(checked)
    assert hashes(tmp_path / "out") == whole("gptq")


def test_a_full_disk_ends_the_run_and_what_is_done_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole
) -> None:
    from safetensors.torch import save_file

    from qtool.checkpoints import files

    count = 0

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:  # tokens and two blocks are written
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)

    checked = make(folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        with pytest.raises(RunError, match=r"the disk is full; .*out\.partial holds what is done"):
            quantize(checked)
    assert len(list((tmp_path / "out.partial" / "state").glob("block-*.json"))) == 2
    quantize(checked)
    assert hashes(tmp_path / "out") == whole("gptq")


def test_two_runs_do_not_write_one_folder(half_done: Recipe, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / "out.partial" / "qtool.lock"), pytest.raises(InputError, match="another run is writing"):
        quantize(half_done)


def test_an_interrupted_run_that_has_done_nothing_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(make(folder, tmp_path / "out"))
    assert not list(tmp_path.glob("out*/"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["0", "40kB"], ids=["disk", "memory without pausing"])
def test_a_memory_budget_changes_no_bit(folder: Path, tmp_path: Path, whole: Whole, method: str, budget: str) -> None:
    quantize(make(folder, tmp_path / "out", method, data__memory_budget=budget))
    assert hashes(tmp_path / "out") == whole(method)


def test_the_same_recipe_gives_the_same_bytes(folder: Path, tmp_path: Path, whole: Whole) -> None:
    quantize(make(folder, tmp_path / "out"))
    assert hashes(tmp_path / "out") == whole("gptq")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", ["float32", "auto"])
def test_a_streamed_run_gives_what_a_whole_model_gives(
    folder: Path, tmp_path: Path, dtype: torch.dtype, compute: str
) -> None:
    """The comparison is the same method on a model that is whole in memory, saved by the library call."""
    from qtool.checkpoints import files, native
    from qtool.data import windows
    from qtool.models.loading import load_model

    models = tmp_path / "models"
    models.mkdir()
    tiny.llama(models / "float", blocks=2, dtype=dtype)
    (models / "text.txt").write_text((folder / "text.txt").read_text())
    checked = make(models, tmp_path / "out", model__dtype=compute)
    quantize(checked)
    loaded = load_model(checked.model)
    tokens = windows.calibration(checked.data, loaded, checked.seed).tokens
    load_method("gptq").run(Job.select(loaded, checked.quant, tokens, seed=checked.seed), checked.method)
    (tmp_path / "library").mkdir()
    native.save(tmp_path / "library", loaded, tiny.specs(loaded))
    streamed, whole = files.SafetensorsFolder(tmp_path / "out"), files.SafetensorsFolder(tmp_path / "library")
    assert set(streamed.names) == set(whole.names)
    for name in whole.names:
        assert torch.equal(streamed.tensor(name), whole.tensor(name)), name
