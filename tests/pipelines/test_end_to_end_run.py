"""Training of the whole model as a run does it: processes that share it, and starts from a checkpoint."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny
from helpers.methods import W4, recorded, train
from torch import Tensor

from qtool.blocks.job import load_method
from qtool.checkpoints import native, output_folder
from qtool.config import recipe
from qtool.config.sections import ModelConfig
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.pipelines import quantize
from qtool.system import distributed
from qtool.system.errors import InputError


def written_recipe(folder: Path, name: str, **method: Any) -> Path:
    """A run on a tiny model in ``folder``."""
    if not (folder / "float").exists():
        tiny.llama(folder / "float")
        tiny.text(folder)
    raw = {
        "model": {"path": str(folder / "float"), "device": "cpu", "dtype": "float32"},
        "method": {"name": "lsq", "min_steps": 0, "batch_size": 5, "epochs": 3} | method,
        "quant": {"num_bits": 2, "group_size": 16, "symmetric": False},
        "data": {"source": str(folder / "prose.txt"), "num_samples": 8, "seq_len": 32},
        "output": {"path": str(folder / name)},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def test_more_processes_than_windows_in_a_step_are_refused(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.several(0, 3, monkeypatch)
    with pytest.raises(InputError, match="batch_size 2 is less than the 3 processes"):
        train(load_method("lsq"), llama, tokens)


def test_sharding_that_a_launcher_asks_for_is_refused_and_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="fully sharded training, which qtool does not use"):
        distributed.start(torch.device("cpu"))


def test_a_process_alone_is_the_first_and_waits_for_nobody() -> None:
    assert (distributed.world_size(), distributed.rank(), distributed.is_first(), distributed.active()) == (
        1,
        0,
        True,
        False,
    )
    value = torch.ones(2)
    distributed.all_reduce_mean(value)
    distributed.barrier()
    assert value.tolist() == [1.0, 1.0]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a run in two processes, and what they said."""
    folder = tmp_path_factory.mktemp("processes")
    file = written_recipe(folder, "two", validation_samples=3, validate_every=2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qtool"]
    return folder, subprocess.run([*launch, "qat", str(file)], capture_output=True, text=True)


def test_two_processes_have_the_losses_of_one(two_processes: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Three windows for one of them and two for the other."""
    folder, done = two_processes
    assert done.returncode == 0, done.stderr
    quantize.quantize(recipe.load(written_recipe(folder, "one", validation_samples=3, validate_every=2)))
    two, one = (recorded(folder / name / "qtool.json") for name in ("two", "one"))
    assert len(one["loss"]) == 3
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["validation"] == pytest.approx(one["validation"], abs=1e-5)


def test_only_the_first_process_writes_and_talks(two_processes: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = two_processes
    assert done.stdout.splitlines()[-1] == str(folder / "two")
    assert done.stdout.count("* bits per weight") == 1
    assert done.stderr.count("training on 5 windows: 0/3") == 1
    assert not list(folder.glob("*.partial"))
    restored = load_model(ModelConfig(path=str(folder / "two"), device="cpu"), quantized=True)
    assert len(packed_linears(restored.model)) == 14


def test_a_start_brings_the_biases_of_its_linears(tmp_path: Path, tokens: Tensor) -> None:
    """AWQ folds scales into them."""
    source = tiny.llama(tmp_path / "float", dtype=torch.float32, bias=True)
    first = tiny.packed(source, W4)
    for layer in packed_linears(first.model).values():
        if layer.bias is not None:
            layer.bias.data += 1
    with output_folder.atomic_folder(tmp_path / "start", overwrite=False) as partial:
        native.save(partial, first, tiny.specs(first))
    again = tiny.load(source)
    train(load_method("lsq"), again, tokens, W4, steps=0, init_from=str(tmp_path / "start"))
    assert torch.equal(tiny.logits(again.model), tiny.logits(first.model))
