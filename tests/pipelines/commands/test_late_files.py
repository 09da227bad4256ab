"""What a run writes at its end is tried at its beginning: a file that cannot be written costs no block."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from helpers import tiny
from helpers.whole_runs import Result, left, own, refused
from transformers import GenerationConfig, PreTrainedConfig

from qtool.blocks.job import Job
from qtool.checkpoints.files import file_hashes
from qtool.exporters import gguf
from qtool.methods import rtn

Run = Callable[..., Result]


@pytest.fixture
def no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(job: Job, config: rtn.Config) -> NoReturn:
        pytest.fail("a block was quantized")

    monkeypatch.setattr(rtn, "METHOD", replace(rtn.METHOD, run=quantize))


def model(models: Path) -> Path:
    return own(models / "llama")


@pytest.mark.usefixtures("no_block")
def test_a_side_file_that_is_a_link_elsewhere_is_refused_before_the_first_block(
    qtool_: Run, recipe: Callable[..., str], models: Path, work: Path
) -> None:
    folder = model(models)
    (work / "secret").write_text('{"TOP": "SECRET"}')
    (folder / "preprocessor_config.json").symlink_to(work / "secret")
    message = refused(qtool_("ptq", recipe(model={"path": str(folder), "device": "cpu"})))
    assert "preprocessor_config.json is a link to" in message
    assert not [path for path in left() if path.startswith("out")]


@pytest.mark.usefixtures("no_block")
def test_an_export_whose_tokenizer_cannot_be_written_is_found_before_the_first_block(
    qtool_: Run, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(gguf.tokenizer, "add", fail)
    result = qtool_("ptq", recipe(export=[{"format": "gguf", "path": "out/g"}]))
    assert result.code == 1
    assert "the disk is full" in result.message


def test_a_generation_config_that_transformers_would_not_save_travels_as_it_is(
    qtool_: Run, recipe: Callable[..., str], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, *args: object, **kwargs: Any) -> None:
        raise ValueError("GenerationConfig is invalid")

    folder = model(models)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    monkeypatch.setattr(PreTrainedConfig, "save_pretrained", refuse)
    exports = [{"format": "dense", "path": "out/d"}]
    assert qtool_("ptq", recipe(model={"path": str(folder), "device": "cpu"}, export=exports)).code == 0
    expected = file_hashes(folder, "generation_config.json")
    assert file_hashes(Path("out/q"), "generation_config.json") == expected
    assert file_hashes(Path("out/d"), "generation_config.json") == expected


def test_nothing_of_the_trial_is_left(qtool_: Run, recipe: Callable[..., str]) -> None:
    assert qtool_("ptq", recipe(export=[{"format": "mlx", "path": "out/m"}])).code == 0
    assert not list(Path("out").rglob("trial*"))
    assert {path.name for path in Path("out").iterdir()} == {"q", "m"}


@pytest.mark.usefixtures("no_block")
def test_a_dtype_of_an_export_that_a_norm_exceeds_is_refused_before_the_first_block(
    qtool_: Run, recipe: Callable[..., str], models: Path
) -> None:
    folder = model(models)
    name = "model.layers.0.input_layernorm.weight"
    norm = tiny.stored(folder)[name]
    norm[0] = 1e5
    tiny.change(folder, **{name: norm})
    asked = recipe(
        model={"path": str(folder), "device": "cpu"},
        export=[{"format": "dense", "path": "out/d", "dtype": "float16"}],
    )
    assert f"{name} has values of up to 99840, and float16 holds none above 65504" in refused(qtool_("ptq", asked))
