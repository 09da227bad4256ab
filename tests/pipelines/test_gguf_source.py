"""Runs, plans and evaluations of a GGUF file are those of the float model that it stands for."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.native_checkpoints import GRIDS, exported

import qtool
from qtool.config.sections import EvalConfig, ModelConfig
from qtool.models.described import described_model
from qtool.models.loading import load_model
from qtool.pipelines.evaluate import evaluate
from qtool.pipelines.manifest import read_manifest
from qtool.reports.report import read_report
from qtool.system.errors import InputError

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of a tiny Llama in 8 bits, alone in a folder."""
    made = tmp_path_factory.mktemp("gguf")
    tiny.quantize(tiny.llama(made / "float"), made / "q", GRIDS["w8g32"])
    (made / "alone").mkdir()
    written = exported(made / "q", "gguf", made / "out") / "model.gguf"
    return written.rename(made / "alone" / "model.gguf")


def recipe(model: Path, out: Path) -> dict[str, object]:
    return {
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "method": {"name": "rtn"},
        "quant": {"num_bits": 4, "group_size": 32, "scale_dtype": "float16"},
        "output": {"path": str(out)},
    }


def test_a_run_writes_what_it_writes_of_the_float_model(file: Path, tmp_path: Path) -> None:
    floats = tiny.copied(load_model(ModelConfig(path=str(file), dtype="float32", device="cpu")).folder, tmp_path / "f")
    qtool.quantize(recipe(floats, tmp_path / "of float"))
    qtool.quantize(recipe(file.parent, tmp_path / "of gguf"))
    ours, theirs = tiny.stored(tmp_path / "of gguf"), tiny.stored(tmp_path / "of float")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "of gguf" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] != "gguf"
    assert not (tmp_path / "of gguf.partial").exists()


def test_the_lock_has_the_hash_of_the_file(file: Path, tmp_path: Path) -> None:
    qtool.quantize(recipe(file, tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.lock.model_files["model.gguf"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest.recorded.model.path == str(file)


def test_an_evaluation_reads_the_file(file: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(file), dtype="float32", device="cpu")
    evaluate(model, EvalConfig(tasks=("generated",), limit=1, context=16, continuations=0), output=tmp_path / "report")
    report = read_report(tmp_path / "report")
    assert report is not None
    assert report.results[0].value is not None


def test_a_plan_needs_no_weights(file: Path) -> None:
    loaded = described_model(ModelConfig(path=str(file)))
    assert loaded.model.config.num_hidden_layers == 2
    assert all(parameter.is_meta for parameter in loaded.model.parameters())


def test_a_run_does_not_replace_the_file_that_it_reads(file: Path) -> None:
    with pytest.raises(InputError, match="overlaps"):
        qtool.quantize(recipe(file, file.parent))


def test_a_run_without_the_class_is_refused(file: Path, tmp_path: Path) -> None:
    asked = recipe(file, tmp_path / "out")
    asked["model"] = {"path": str(file), "free": True}
    with pytest.raises(InputError, match=r"is a GGUF file; leave model\.free out of the recipe"):
        qtool.quantize(asked)
