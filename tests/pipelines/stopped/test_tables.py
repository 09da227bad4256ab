"""Runs with packed tables may be killed before, during and after the head's part, and go on to the same bytes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.methods import recorded
from helpers.stopped_runs import Killed, after_each_kill, hashes, make, quantize, stop_after

from qtool.blocks import tables
from qtool.blocks.job import Job
from qtool.blocks.task import BlockTask
from qtool.config.recipe import Recipe
from qtool.methods import gptq
from qtool.pipelines import reproduce, verify
from qtool.system.errors import InputError

TABLES: dict[str, Any] = {"num_bits": 4, "group_size": 32, "embedding": {"num_bits": 8}}
HEAD: dict[str, Any] = {"num_bits": 3, "group_size": 32, "symmetric": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two blocks with text: a tied model and an untied one."""
    made = {}
    for kind in ("tied", "untied"):
        made[kind] = tmp_path_factory.mktemp(kind)
        tiny.llama(made[kind] / "float", tied=kind == "tied")
        (made[kind] / "text.txt").write_text("\n".join(tiny.PROSE * 40), encoding="utf-8")
    return made


def recipe(models: dict[str, Path], kind: str, output: Path, method: str) -> Recipe:
    quant = TABLES | ({"head": HEAD} if kind == "untied" else {})
    return make(models[kind], output, method, **{f"quant__{key}": value for key, value in quant.items()})


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns the hashes of an uninterrupted run."""
    made: dict[tuple[str, str], dict[str, str]] = {}

    def of(kind: str, method: str) -> dict[str, str]:
        if (kind, method) not in made:
            output = tmp_path_factory.mktemp("whole") / method
            quantize(recipe(models, kind, output, method))
            made[kind, method] = hashes(output)
        return made[kind, method]

    return of


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("method", ["gptq", "lsq", "efficientqat"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_killed_where_any_file_gets_its_name_goes_on_to_the_same_bytes(
    models: dict[str, Path], tmp_path: Path, whole: Any, kind: str, method: str, after: bool
) -> None:
    number = 0
    for output in after_each_kill(
        lambda output: recipe(models, kind, output, method), tmp_path, after, whole(kind, method)
    ):
        verify.verify(output)
        number += 1
    # a record and a shard for the head too
    assert number >= {"gptq": 8, "lsq": 8, "efficientqat": 11}[method] + (
        2 if (kind, method) == ("untied", "gptq") else 0
    )


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("method", ["gptq", "awq", "gptaq"])
def test_a_run_stopped_before_and_after_its_head_goes_on(
    models: dict[str, Path],
    tmp_path: Path,
    whole: Any,
    method: str,
    done: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked = recipe(models, "untied", tmp_path / "out", method)
    with monkeypatch.context() as patch:
        stop_after(patch, done)
        with pytest.raises(Killed):
            quantize(checked)
    assert len(list((tmp_path / "out.partial" / "state").glob("block-*.json"))) == done
    quantize(checked)
    assert hashes(tmp_path / "out") == whole("untied", method)
    verify.verify(tmp_path / "out")


def test_a_run_stopped_in_its_head_does_the_head_again_and_no_block(
    models: dict[str, Path], tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = recipe(models, "untied", tmp_path / "out", "gptq")
    solve, done = gptq.quantize_group, []

    def failing(task: BlockTask, *rest: Any) -> None:
        done.append(task.index)
        solve(task, *rest)
        if task.index == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(gptq, "quantize_group", failing)
        for _ in range(2):
            with pytest.raises(Killed):
                quantize(checked)
    assert done == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    quantize(checked)
    assert hashes(tmp_path / "out") == whole("untied", "gptq")
    assert len(recorded(tmp_path / "out" / "qtool.json")["block_error"]) == 2


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_run_stopped_while_it_packs_embeddings_goes_on(
    models: dict[str, Path], tmp_path: Path, whole: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = recipe(models, kind, tmp_path / "out", "gptq")
    pack = tables.pack_embeddings

    def failing(job: Job) -> Job:
        pack(job)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("qtool.pipelines.quantize.pack_embeddings", failing)
        with pytest.raises(Killed):
            quantize(checked)
    quantize(checked)
    assert hashes(tmp_path / "out") == whole(kind, "gptq")


def test_a_damaged_shard_of_the_head_is_made_again(
    models: dict[str, Path], tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = recipe(models, "untied", tmp_path / "out", "gptq")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            quantize(checked)
    shard = max((tmp_path / "out.partial" / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    quantize(checked)
    assert hashes(tmp_path / "out") == whole("untied", "gptq")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"quant__embedding": {"num_bits": 4}}, r"quant\.embedding\.num_bits: 8 -> 4"),
        ({"quant__head": "float"}, r"quant\.head"),
    ],
)
def test_changed_tables_are_refused_with_the_difference(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], line: str
) -> None:
    checked = recipe(models, "untied", tmp_path / "out", "rtn")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Killed):
            quantize(checked)
    quant = {f"quant__{key}": value for key, value in (TABLES | {"head": HEAD}).items()}
    with pytest.raises(InputError, match=rf"--fresh to start over:\n.*{line}"):
        quantize(make(models["untied"], tmp_path / "out", "rtn", **quant | keys))


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("method", ["gptq", "lsq", "efficientqat"])
def test_a_run_gives_the_same_bytes_again_which_are_verified(
    models: dict[str, Path], tmp_path: Path, whole: Any, kind: str, method: str
) -> None:
    quantize(recipe(models, kind, tmp_path / "out", method))
    assert hashes(tmp_path / "out") == whole(kind, method)
    found = verify.verify(tmp_path / "out")
    assert (found.linears, found.embeddings) == (15 if kind == "untied" else 14, 1)
    if method == "gptq":
        assert reproduce.reproduce(tmp_path / "out") == []
    stored = tiny.stored(tmp_path / "out")
    assert ("lm_head.weight_packed" in stored) == (kind == "untied")
    assert torch.isfinite(stored["model.embed_tokens.weight_scale"]).all()
