"""The whole pipeline through the command line: what it leaves on disk, what it prints, and what it does not lose."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import tiny
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qtool
from qtool import card, cli, methods, texts
from qtool import evaluate as evaluation
from qtool import run as pipeline
from qtool.checkpoint import MANIFEST, Planned, Source, write_json
from qtool.config import FORMAT_VERSION, ExportConfig, ModelConfig, QuantConfig
from qtool.data import calibration_tokens, token_hash
from qtool.errors import RunError
from qtool.folders import read_config
from qtool.models import load_model, packed_linears
from qtool.recipe import Recipe
from qtool.report import Report

NATIVE_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "qtool.json",
    "report.html",
    "report.json",
    "report.md",
    "tokenizer.json",
    "tokenizer_config.json",
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error, without the progress lines before it."""
        assert "\nerror: " in f"\n{self.err}", self.err
        return self.err[f"\n{self.err}".rindex("\nerror: ") :].strip()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with float models, and a text file; only read them."""
    at = tmp_path_factory.mktemp("models")
    tiny.llama(at / "llama")
    tiny.gpt2(at / "gpt2")
    tiny.text(at)
    return at


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data on this machine and no hub, whatever there is."""
    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    monkeypatch.setattr(texts, "_hub_answers", lambda: False)


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
        code = cli.main([str(arg) for arg in args])
        printed = capsys.readouterr()
        print(printed.err)  # for a person who reads the messages: pytest -rP
        return Result(code, printed.out, printed.err)

    return run


def weights_digest() -> str:
    """One hash for all weights of ``out/q``."""
    files = sorted(Path("out/q").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def write_recipe(models: Path, **sections: Any) -> str:
    """Write ``r.yaml``: round to nearest, and the sections given as keywords; returns its name."""
    base: dict[str, Any] = {
        "model": {"path": str(models / "llama"), "device": "cpu", "dtype": "float32"},
        "method": {"name": "rtn"},
        "quant": {"num_bits": 4, "group_size": 32},
        "output": {"path": "out/q"},
    }
    for key, value in sections.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    Path("r.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    return "r.yaml"


def whole_run(models: Path) -> dict[str, Any]:
    """Sections of a whole run: calibration from a file, evaluation, two exports."""
    return {
        "method": {"name": "gptq"},
        "data": {"source": str(models / "prose.txt"), "num_samples": 8, "seq_len": 32},
        "eval": {"tasks": ["generated", "kl"], "limit": 2, "context": 32},
        "export": [{"format": "gptq", "path": "out/gptq"}, {"format": "dense", "path": "out/dense"}],
        "seed": 3,
    }


@pytest.fixture
def recipe(models: Path) -> Callable[..., str]:
    return partial(write_recipe, models)


@pytest.fixture
def gptq(models: Path) -> dict[str, Any]:
    return whole_run(models)


def own(folder: Path, to: str = "model") -> Path:
    """A copy of a model, to damage."""
    shutil.copytree(folder, to)
    return Path(to)


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def left() -> list[str]:
    """What is under the output folder, half-written things included."""
    return sorted(str(path) for path in Path("out").rglob("*")) if Path("out").exists() else []


def refused(result: Result, code: int = 2) -> str:
    """The message of a command that failed as it should: in words, short, with nothing left."""
    assert result.code == code, result.err
    message = result.message
    assert "Traceback" not in result.err
    assert "bug in qtool" not in message
    assert len(message.splitlines()) <= 10, message
    assert len(message) < 2000, message
    assert not [path for path in left() if "partial" in path or path.startswith("out/q")]
    return message


# a whole run


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
        code = cli.main(["ptq", write_recipe(models, **whole_run(models)), "--json"])
    assert code == 0, err.getvalue()
    return at, Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def whole(finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> Result:
    """A whole run, in the current folder; only read it."""
    monkeypatch.chdir(finished[0])
    return finished[1]


def test_a_run_leaves_the_checkpoint_and_the_exports_and_nothing_else(whole: Result) -> None:
    assert {path.name for path in Path("out").iterdir()} == {"q", "gptq", "dense"}
    assert {path.name for path in Path("out/q").iterdir()} == NATIVE_FILES
    sharded = {name for name in NATIVE_FILES if name.startswith("model")}
    exported = NATIVE_FILES - {"qtool.json", "report.html", "report.json", "report.md"} - sharded | {
        "model.safetensors"
    }
    assert {path.name for path in Path("out/dense").iterdir()} == exported
    assert {path.name for path in Path("out/gptq").iterdir()} == exported | {"quantize_config.json"}
    assert {path.name for path in Path().iterdir()} == {"out", "r.yaml"}


def test_json_is_one_object_with_paths_and_report(whole: Result) -> None:
    assert len(whole.out.splitlines()) == 1
    printed = json.loads(whole.out)
    assert set(printed) == {"path", "exports", "seconds", "report"}
    assert printed["path"] == "out/q"
    assert printed["exports"] == ["out/gptq", "out/dense"]
    assert printed["report"] == json.loads(Path("out/q/report.json").read_text())
    assert "quantizing blocks" in whole.err


def test_the_manifest_says_how_the_checkpoint_was_made(whole: Result, models: Path, gptq: dict[str, Any]) -> None:
    manifest = json.loads(Path("out/q", MANIFEST).read_text())
    assert set(manifest) == {
        "format_version",
        "recipe",
        "seed",
        "data",
        "label",
        "bits_per_weight",
        "command",
        "files",
        "lock",
        "float_bytes",
        "quantized_bytes",
        "series",
        "weight_errors",
        "seconds",
        "versions",
        "date",
    }
    assert manifest["format_version"] == FORMAT_VERSION
    assert (manifest["seed"], manifest["label"], manifest["bits_per_weight"]) == (3, "w4g32", 4.5)
    resolved = manifest["recipe"]
    written = yaml.safe_load(Path("r.yaml").read_text())
    for section, values in written.items():
        if isinstance(values, dict):
            assert {key: resolved[section][key] for key in values} == values
    assert set(resolved["method"]) == set(methods.get("gptq").config.model_fields)  # defaults are filled in
    assert Recipe.model_validate(resolved).model_dump(mode="json") == resolved
    floats = tiny.load(models / "llama")
    tokens = calibration_tokens(Recipe.model_validate(resolved).data, floats, 3)
    assert manifest["data"] == {"tokens": [8, 32], "sha256": token_hash(tokens)}
    assert list(manifest["series"]) == ["block_error"]
    assert len(manifest["series"]["block_error"]) == 2
    assert all(0 < error < 0.1 for error in manifest["series"]["block_error"])
    assert {"load", "data", "quantize"} <= set(manifest["seconds"])
    assert manifest["quantized_bytes"] == sum(p.stat().st_size for p in Path("out/q").glob("*.safetensors"))
    assert manifest["float_bytes"] == sum(tensor.nbytes for tensor in tiny.stored(models / "llama").values())
    assert {"python", "platform", "qtool", "torch", "transformers"} <= set(manifest["versions"])
    assert manifest["versions"]["qtool"] == qtool.__version__
    assert manifest["versions"]["torch"] == torch.__version__


def test_the_report_is_complete_and_the_model_card_holds_its_numbers(whole: Result) -> None:
    report = Report.model_validate_json(Path("out/q/report.json").read_text())
    assert Path("out/q/report.md").read_text() == report.markdown()
    assert (report.method, report.label, report.seed, report.device) == ("gptq", "w4g32", 3, "cpu")
    assert [(row.task, row.metric) for row in report.results] == [
        ("generated", "perplexity"),
        ("kl", "kl"),
        ("kl", "top-1 agreement"),
    ]
    perplexity, divergence, agreement = report.results
    assert perplexity.value is not None
    assert perplexity.float_value is not None
    assert perplexity.float_value > 1
    assert divergence.value is not None
    assert 0 < divergence.value < 1
    assert agreement.value is not None
    assert 0.3 < agreement.value <= 1
    assert {"load", "data", "quantize", "save", "eval", "export gptq", "export dense"} == set(report.seconds)
    shown = Path("out/q/report.html").read_text()
    assert shown.count("<svg") == 6  # the fixture draws: quality, sizes, bits, two kinds of errors, phases
    readme = Path("out/q/README.md").read_text()
    assert report.markdown().rstrip() in readme
    for number in (f"{perplexity.value:.2f}", f"{divergence.value:.4f}", "4.500 (scales and zero points counted)"):
        assert number in readme
    assert "import qtool" in readme
    assert 'from_pretrained("q")' in readme
    assert ".partial" not in readme
    assert [(export.format, export.path, export.num_bytes) for export in report.exports] == [
        (name, f"out/{name}", sum(p.stat().st_size for p in Path("out", name).glob("*.safetensors")))
        for name in ("gptq", "dense")
    ]
    assert all(export.weight_difference == 0 and export.logit_difference < 1e-5 for export in report.exports)
    header = yaml.safe_load(readme.split("---")[1])
    assert header["tags"] == ["qtool"]
    assert "base_model" not in header  # an absolute path is no name on the hub


def test_a_local_folder_is_not_called_a_base_model_on_the_hub(
    qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path
) -> None:
    own(models / "llama", "models/mine")
    assert qtool_("ptq", recipe(model={"path": "models/mine"})).code == 0
    assert "base_model" not in Path("out/q/README.md").read_text()


def test_the_checkpoint_computes_what_the_exports_compute(whole: Result) -> None:
    native = AutoModelForCausalLM.from_pretrained("out/q", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained("out/dense", dtype=torch.float32)
    assert torch.equal(tiny.logits(native), tiny.logits(dense))
    assert len(packed_linears(native)) == 14
    assert not packed_linears(dense)


def test_eval_measures_the_folder_the_recipe_and_the_exports_alike(
    whole: Result, qtool_: Callable[..., Result], models: Path, tmp_path: Path
) -> None:
    options = ("--tasks", "generated,kl", "--limit", "2", "--context", "32", "--dtype", "float32", "--json")
    expected = json.loads(whole.out)["report"]["results"]

    def numbers(rows: list[dict[str, Any]]) -> list[Any]:
        return [(row["task"], row["metric"], row["value"], row["float_value"], row["n"]) for row in rows]

    by_recipe = qtool_("eval", "r.yaml", "--json")
    assert by_recipe.code == 0, by_recipe.err
    assert numbers(json.loads(by_recipe.out)["report"]["results"]) == numbers(expected)
    # a command line has no seed: 0, and so another text
    native = qtool_("eval", "out/q", *options)
    assert native.code == 0, native.err
    report = json.loads(native.out)["report"]
    assert (report["quantized"], report["label"], report["method"]) == ("out/q", "w4g32", "gptq")
    assert report["bits_per_weight"] == 4.5
    for name in ("gptq", "dense"):
        report_at = tmp_path / name
        other = qtool_("eval", f"out/{name}", *options, "--float-model", models / "llama", "--output", report_at)
        assert other.code == 0, other.err
        assert numbers(json.loads(other.out)["report"]["results"]) == numbers(report["results"])
        assert {path.name for path in report_at.iterdir()} == {"report.html", "report.json", "report.md"}


def test_a_run_without_eval_and_export_has_a_report_with_sizes_only(
    qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    result = qtool_("ptq", recipe(), "--quiet")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "out/q"
    assert {path.name for path in Path("out/q").iterdir()} == NATIVE_FILES
    report = Report.model_validate_json(Path("out/q/report.json").read_text())
    assert report.results == ()
    assert json.loads(Path("out/q", MANIFEST).read_text())["data"] is None


def test_the_same_recipe_gives_the_same_bytes(
    qtool_: Callable[..., Result], recipe: Callable[..., str], gptq: dict[str, Any]
) -> None:
    sums = []
    for _ in range(2):
        assert qtool_("ptq", recipe(method=gptq["method"], data=gptq["data"]), "--overwrite").code == 0
        sums.append(weights_digest())
    assert sums[0] == sums[1]
    assert qtool_("ptq", "r.yaml", "--overwrite", "--set", "quant.num_bits=3").code == 0
    assert weights_digest() != sums[0]


def test_set_changes_one_key_and_the_manifest_says_so(
    qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    pattern = "quant.overrides.*.down_proj.num_bits=8"
    assert qtool_("ptq", recipe(), "--set", pattern, "--set", "quant.symmetric=false").code == 0
    specs = Source(Path("out/q")).specs
    assert {spec.num_bits for name, spec in specs.items() if "down_proj" in name} == {8}
    assert {spec.num_bits for name, spec in specs.items() if "down_proj" not in name} == {4}
    manifest = json.loads(Path("out/q", MANIFEST).read_text())
    assert manifest["recipe"]["quant"]["overrides"] == {"*.down_proj": {"num_bits": 8}}
    assert manifest["label"].startswith("mixed ")


def test_export_writes_beside_the_checkpoint_and_says_where(
    qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    assert qtool_("ptq", recipe()).code == 0
    before = digest(Path("out/q"))
    result = qtool_("export", "out/q", "--format", "compressed-tensors", "-o", "out/ct", "--json")
    assert result.code == 0
    assert json.loads(result.out) == {"path": "out/ct", "format": "compressed-tensors"}
    assert "base_model" not in Path("out/ct/README.md").read_text()
    assert digest(Path("out/q")) == before
    again = qtool_("export", "out/q", "--format", "compressed-tensors", "-o", "out/ct")
    assert again.code == 2
    assert "out/ct exists; choose another folder, or pass --overwrite" in again.message
    assert qtool_("export", "out/q", "-f", "compressed-tensors", "-o", "out/ct", "--overwrite").code == 0


def test_eval_without_the_float_model_says_so_and_goes_on(
    qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path
) -> None:
    model = own(models / "llama")
    assert qtool_("ptq", recipe(model={"path": "./model"})).code == 0
    shutil.rmtree(model)
    result = qtool_("eval", "out/q", "--tasks", "generated,kl", "--limit", "1", "--context", "16", "--device", "cpu")
    assert result.code == 0, result.err
    assert "note: the float model is not measured: model.path: there is no folder ./model" in result.err
    assert "not measured: there is no float model to compare with" in result.out


@pytest.mark.parametrize("family", ["gpt2"])
def test_other_families_go_through_as_well(
    family: str, qtool_: Callable[..., Result], recipe: Callable[..., str], gptq: dict[str, Any], models: Path
) -> None:
    sections = gptq | {"model": {"path": str(models / family)}, "export": [{"format": "dense", "path": "out/dense"}]}
    assert qtool_("ptq", recipe(**sections)).code == 0
    native = AutoModelForCausalLM.from_pretrained("out/q", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained("out/dense", dtype=torch.float32)
    assert torch.equal(tiny.logits(native), tiny.logits(dense))


# what comes after the checkpoint cannot lose it


def complete(folder: str) -> bool:
    loaded = load_model(ModelConfig(path=folder, device="cpu"), quantized=True)
    return bool(packed_linears(loaded.model)) and Path(folder, MANIFEST).exists() and Path(folder, "README.md").exists()


def test_a_failed_evaluation_keeps_the_checkpoint(
    qtool_: Callable[..., Result],
    recipe: Callable[..., str],
    gptq: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise RunError("the evaluation broke")

    monkeypatch.setattr(evaluation, "evaluate", fail)
    result = qtool_("ptq", recipe(**gptq))
    assert result.code == 1
    assert "the evaluation broke" in result.message
    assert complete("out/q")
    assert {path.name for path in Path("out").iterdir()} == {"q"}


def test_a_failed_export_keeps_the_checkpoint_and_the_report_of_its_evaluation(
    qtool_: Callable[..., Result],
    recipe: Callable[..., str],
    gptq: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RunError("it differs after export")

    monkeypatch.setattr(pipeline, "verify", fail)
    result = qtool_("ptq", recipe(**gptq))
    assert result.code == 1
    assert "it differs after export" in result.message
    assert complete("out/q")
    assert {path.name for path in Path("out").iterdir()} == {"q"}
    assert Report.model_validate_json(Path("out/q/report.json").read_text()).results


class Stage(NamedTuple):
    """A place in the run, and what is there after it fails: nothing, finished blocks to go on with, or all."""

    owner: object
    name: str
    kept: Literal["nothing", "blocks", "all"]


STAGES = {
    "loading": Stage(pipeline, "load_model", "nothing"),
    "reading data": Stage(pipeline.data, "calibration", "nothing"),
    "saving": Stage(pipeline.checkpoint, "save", "blocks"),
    "writing the card": Stage(card, "write", "blocks"),
    "evaluating": Stage(evaluation, "evaluate", "all"),
    "exporting": Stage(pipeline, "verify", "all"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_leaves_the_whole_checkpoint_or_nothing_and_says_which(
    stage: str,
    qtool_: Callable[..., Result],
    recipe: Callable[..., str],
    gptq: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(STAGES[stage].owner, STAGES[stage].name, interrupt)
        result = qtool_("ptq", recipe(**gptq))
    assert result.code == 130
    last = result.err.splitlines()[-1]
    kept = STAGES[stage].kept
    if kept == "all":
        assert last == "interrupted; out/q is complete, but not what was to follow it"
        assert complete("out/q")
        assert left()[0] == "out/q"
        assert not [path for path in left() if "partial" in path]
    elif kept == "blocks":
        expected = "interrupted; nothing was written under out/q; the same command goes on from out/q.partial"
        assert last == expected
        assert not Path("out/q").exists()
        assert qtool_("ptq", "r.yaml").code == 0
        assert not Path("out/q.partial").exists()
    else:
        assert last == "interrupted; nothing was written under out/q"
        assert left() == []


@pytest.mark.parametrize("stage", ["saving", "writing the card"])
def test_an_error_while_writing_keeps_what_overwrite_was_to_replace(
    stage: str, qtool_: Callable[..., Result], recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qtool_("ptq", recipe()).code == 0
    before = digest(Path("out/q"))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "out/q.partial/x")

    with monkeypatch.context() as patch:
        patch.setattr(STAGES[stage].owner, STAGES[stage].name, full)
        result = qtool_("ptq", "r.yaml", "--overwrite", "--set", "quant.num_bits=8")
    assert result.code == 1
    assert "writing out/q failed: the disk is full" in result.message
    assert "out/q.partial holds what is done, and the same command goes on" in result.message
    assert digest(Path("out/q")) == before
    assert qtool_("ptq", "r.yaml", "--overwrite", "--set", "quant.num_bits=8").code == 0
    assert {path.name for path in Path("out").iterdir()} == {"q"}
    assert digest(Path("out/q")) != before


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_fills_up_while_writing_leaves_nothing_new(
    there: bool, qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    if there:
        assert qtool_("ptq", recipe()).code == 0
    before = digest(Path("out/q")) if there else {}
    with tiny.files_up_to(25_000):
        result = qtool_("ptq", recipe(), "--json", "--overwrite", "--set", "quant.num_bits=8")
    assert result.code == 1
    assert "Traceback" not in result.err
    printed = json.loads(result.out)
    assert printed["kind"] == "run"
    assert printed["error"].startswith("writing out/q failed: ")
    assert ("; nothing was left under that name;" in printed["error"]) == (not there)
    assert Path("out/q").exists() == there
    if there:
        assert digest(Path("out/q")) == before
    assert qtool_("ptq", "r.yaml", "--overwrite", "--set", "quant.num_bits=8").code == 0
    assert {path.name for path in Path("out").iterdir()} == {"q"}


# refused before the work


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizing is an error: what is wrong has to be found before."""
    for name in ("rtn", "gptq"):
        module = import_module(f"qtool.methods.{name}")

        def run(*args: object) -> None:
            pytest.fail("the model was quantized")

        monkeypatch.setattr(module, "METHOD", replace(module.METHOD, run=run))


MIXED = {"overrides": {"*.down_proj": {"num_bits": 8}}}
SKIPPED = {"overrides": {"*.1.mlp.up_proj": {"skip": True}}}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("model", "quant", "entry", "words"),
    [
        ("llama", MIXED, {"format": "gptq"}, "2 different grids"),
        ("llama", SKIPPED, {"format": "gptq-v2"}, "mlp.up_proj is left in floating point"),
        ("gpt2", {}, {"format": "gptq"}, "is a Conv1D"),
        ("gpt2", {}, {"format": "compressed-tensors"}, "is a Conv1D"),
        ("llama", {"scale_dtype": "float32"}, {"format": "gptq"}, "scale_dtype: float16"),
        ("llama", {"scale_dtype": "float32"}, {"format": "compressed-tensors", "dtype": "bfloat16"}, "scale"),
        ("gpt2", {}, {"format": "dense", "path": "r.yaml/x"}, "cannot be written"),
        ("llama", {}, {"format": "dense", "path": "out/q"}, "named 2 times as an output folder"),
        ("llama", {}, {"format": "dense", "path": "there"}, "there exists"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_quantization(
    model: str,
    quant: dict[str, Any],
    entry: dict[str, str],
    words: str,
    qtool_: Callable[..., Result],
    recipe: Callable[..., str],
    models: Path,
) -> None:
    Path("there").mkdir()
    export = [{"path": "out/e", **entry}]
    message = refused(qtool_("ptq", recipe(model={"path": str(models / model)}, quant=quant, export=export)))
    assert words in message
    assert left() == []


def test_what_is_planned_is_refused_for_the_same_reason_as_what_is_made(models: Path) -> None:
    config = ExportConfig(format="gptq", path=Path("x"))
    for index, changes in enumerate([MIXED, SKIPPED, {"scale_dtype": "float32"}, {}]):
        quant = QuantConfig.model_validate({"num_bits": 4, "group_size": 32, **changes})
        loaded = tiny.load(models / "llama")
        targets = loaded.targets(quant)
        shapes = {target.name: (target.weight.shape[0], target.weight.shape[1]) for target in targets}
        planned = Planned(loaded, {target.name: target.spec for target in targets}, shapes)
        tiny.quantize(models / "llama", Path(f"q{index}"), quant)
        for name in pipeline.formats.names():
            exporter = pipeline.formats.get(name)
            before, after = exporter.refuses(planned, config), exporter.refuses(Source(Path(f"q{index}")), config)
            assert before == after, name


Damage = Callable[[Path], object]


def edit_config(**changes: object) -> Damage:
    return lambda model: write_json(model / "config.json", read_config(model) | changes)


def edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda model: tiny.change(model, **{name: change(tiny.stored(model)[name])})


def put(name: str, content: bytes) -> Damage:
    return lambda model: (model / name).write_bytes(content)


def spoil(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


def without(*names: str) -> Damage:
    def drop(model: Path) -> None:
        tensors = {name: tensor for name, tensor in tiny.stored(model).items() if name not in names}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return drop


def cut(model: Path) -> None:
    os.truncate(model / "model.safetensors", 100_000)


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def index_of(content: bytes) -> Damage:
    return put("model.safetensors.index.json", content)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no config": (lambda model: (model / "config.json").unlink(), r"model has no config\.json"),
    "config is no JSON": (put("config.json", b"{"), r"config\.json is not JSON"),
    "config is a list": (put("config.json", b"[]"), r"config\.json holds a list"),
    "unknown architecture": (edit_config(model_type="nonsense"), r"model cannot be loaded: .*nonsense"),
    "needs code": (edit_config(auto_map={"AutoModelForCausalLM": "x.Y"}), r"needs code from its own folder"),
    "already quantized": (edit_config(quantization_config={"quant_method": "awq"}), r"is already quantized \(awq\)"),
    "mixture of experts": (edit_config(num_experts=8), r"mixture of experts"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), r"model has no \*\.safetensors file"),
    "pickled weights": (pickled, r"only pickled weights \(pytorch_model\.bin\)"),
    "truncated": (cut, r"model\.safetensors is truncated or damaged"),
    "empty file": (put("model.safetensors", b""), r"model\.safetensors is truncated or damaged"),
    "not safetensors": (put("model.safetensors", b"PK\x03\x04" * 100), r"model\.safetensors is truncated or damaged"),
    "index lists a file that is not there": (
        index_of(b'{"weight_map": {"x": "model-00002-of-00002.safetensors"}}'),
        r"lists model-00002-of-00002\.safetensors, which is not there",
    ),
    "index is no JSON": (index_of(b"{"), r"index\.json is not "),
    "index without a map": (index_of(b"{}"), r"index\.json"),
    "wrong shape": (
        edit_tensor(f"{Q_PROJ}.weight", lambda tensor: tensor[:32].contiguous()),
        rf"{Q_PROJ}\.weight has shape \[32, 64\] in the file, and the config asks for \[64, 64\]",
    ),
    "missing tensor": (without(f"{Q_PROJ}.weight"), rf"lacks 1 tensor.*{Q_PROJ}\.weight"),
    "NaN": (edit_tensor(f"{Q_PROJ}.weight", spoil((3, 5), float("nan"))), rf"{Q_PROJ}\.weight holds 1 NaN or inf"),
    "infinity": (edit_tensor(f"{Q_PROJ}.weight", spoil((3, 5), float("-inf"))), rf"{Q_PROJ}\.weight holds 1 NaN or"),
    "NaN in a norm": (edit_tensor("model.norm.weight", spoil((3,), float("nan"))), r"model\.norm\.weight .*NaN"),
    "NaN in embeddings": (
        edit_tensor("model.embed_tokens.weight", spoil((3, 1), float("nan"))),
        r"model\.embed_tokens\.weight .*NaN",
    ),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), r"tokenizer.*[a-z)]$"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_with_the_place_of_the_damage(
    damage: str, qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path
) -> None:
    model = own(models / "llama")
    change, words = DAMAGES[damage]
    change(model)
    before = digest(model)
    message = refused(qtool_("ptq", recipe(model={"path": "./model"})))
    assert re.search(words, message), message
    assert left() == []
    assert digest(model) == before


RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "no such folder": ({"model": {"path": "./nowhere"}}, r"model\.path: there is no folder \./nowhere"),
    "model is a file": ({"model": {"path": "r.yaml"}}, r"model\.path: r\.yaml is a file"),
    "no such built-in": ({"model": {"path": "builtin:gpt-5"}}, r"no model builtin:gpt-5; built in: builtin:wiki"),
    "no such device": ({"model": {"device": "tpu9"}}, r"model\.device: 'tpu9' is no device"),
    "group size": ({"quant": {"group_size": 48}}, r"64 input channels, and group_size 48 does not divide that"),
    "override": ({"quant": {"overrides": {"*q_prj": {"num_bits": 8}}}}, r"no linear matches '\*q_prj'.*q_proj"),
    "all skipped": ({"quant": {"overrides": {"*": {"skip": True}}}}, r"skip every linear"),
    "bits": ({"quant": {"num_bits": 5}}, r"quant\.num_bits: .*2, 3, 4 or 8.*found 5"),
    "method": ({"method": {"name": "gtpq"}}, r"method\.name: no such method; the nearest is gptq"),
    "method key": (
        {"method": {"name": "gptq", "dampp": 1}},
        r"method\.dampp: unknown key; the nearest is method\.damp",
    ),
    "format": (
        {"export": [{"format": "gguff", "path": "x"}]},
        r"export\.0\.format: no such export format; .*known: .*gptq",
    ),
    "task": ({"eval": {"tasks": ["wikitext22"]}}, r"wikitext22"),
    "no text file": ({"data": {"source": "none.txt"}}, r"data\.source: there is no file none\.txt"),
    "unknown source": ({"data": {"source": "wikitex2"}}, r"neither a known name .*did you mean wikitext2\?"),
    "suffix": ({"data": {"source": "r.yaml"}}, r"has a suffix that cannot be read"),
    "empty text": ({"data": {"source": "empty.txt"}}, r"data\.source: empty\.txt is empty"),
    "little text": ({"data": {"source": "little.txt", "num_samples": 4, "seq_len": 64}}, r"too little text: \d+ wind"),
    "windows too long": ({"data": {"source": "little.txt", "seq_len": 4096}}, r"made for at most 128 tokens"),
    "output exists": ({"output": {"path": "there"}}, r"there exists"),
    "output is a file": ({"output": {"path": "r.yaml"}}, r"r\.yaml exists"),
    "output below a file": ({"output": {"path": "r.yaml/q"}}, r"r\.yaml/q cannot be written: .* is a file"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("fault", RECIPES)
def test_a_recipe_that_cannot_run_is_refused_with_what_to_change(
    fault: str, qtool_: Callable[..., Result], recipe: Callable[..., str], gptq: dict[str, Any]
) -> None:
    Path("empty.txt").write_text("")
    Path("little.txt").write_text("Too little text for four windows of this size.\n" * 3)
    Path("there").mkdir()
    Path("there", "mine").write_text("")
    sections, words = RECIPES[fault]
    base = {"method": gptq["method"]} if "data" in sections else {}
    message = refused(qtool_("ptq", recipe(**base | sections)))
    assert re.search(words, message, re.DOTALL), message
    assert left() == []
    assert [path.name for path in Path("there").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: {path: caf\xe9}\n", r"r\.yaml is not UTF-8: byte 0xe9 in line 1"),
        (b"model: {path: [}\n", r"r\.yaml is not YAML: line 1, column"),
        (b"", r"r\.yaml is empty; qtool recipes quickstart"),
        (b"# only a comment\n", r"r\.yaml is empty"),
        (b"- a\n- b\n", r"not sections \(model:, method:"),
        (None, r"r\.yaml does not exist"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(
    content: bytes | None, words: str, qtool_: Callable[..., Result]
) -> None:
    if content is not None:
        Path("r.yaml").write_bytes(content)
    message = refused(qtool_("ptq", "r.yaml"))
    assert re.search(words, message), message


@pytest.mark.usefixtures("no_work")
def test_a_method_under_another_command_is_sent_to_its_own(
    qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    message = refused(qtool_("qat", recipe(method={"name": "gptq"})))
    assert message == "error: method gptq runs as: qtool ptq, not qtool qat"


@pytest.mark.usefixtures("no_work")
def test_one_fault_in_every_block_does_not_hide_another(
    qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path
) -> None:
    model = own(models / "llama")
    edit_tensor("model.layers.1.mlp.down_proj.weight", spoil((3, 5), 1e30))(model)
    quant = {"group_size": 48, "overrides": {"*.down_proj": {"group_size": 32}}}
    message = refused(qtool_("ptq", recipe(model={"path": "./model"}, quant=quant)))
    assert "does not divide" in message
    assert "down_proj.weight has weights up to 1e+30" in message


@pytest.mark.usefixtures("no_work")
def test_all_that_the_walk_finds_is_said_at_once(qtool_: Callable[..., Result], recipe: Callable[..., str]) -> None:
    overrides = {"*q_prj": {"num_bits": 8}, "*.v_proj": {"group_size": 24}}
    result = qtool_("ptq", recipe(quant={"overrides": overrides}))
    assert result.code == 2
    assert "no linear matches '*q_prj'" in result.message
    assert result.message.count("group_size 24 does not divide") == 1
    assert "(and 1 more like it)" in result.message


@pytest.mark.usefixtures("no_work")
def test_an_error_with_json_is_one_object_too(qtool_: Callable[..., Result], recipe: Callable[..., str]) -> None:
    result = qtool_("ptq", recipe(quant={"group_size": 48}), "--json")
    assert result.code == 2
    assert len(result.out.splitlines()) == 1
    assert set(json.loads(result.out)) == {"error", "kind", "exit_code"}
    assert json.loads(result.out)["kind"] == "input"


@pytest.mark.usefixtures("no_work")
def test_the_model_that_is_read_is_never_overwritten(
    qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path
) -> None:
    model = own(models / "llama")
    before = digest(model)
    for path in ("model", "./model", str(model.absolute())):
        result = qtool_("ptq", recipe(model={"path": "./model"}, output={"path": path}), "--overwrite")
        assert digest(model) == before
        assert "model" in refused(result)


def test_an_export_never_replaces_the_checkpoint_it_reads(
    qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    assert qtool_("ptq", recipe()).code == 0
    before = digest(Path("out/q"))
    for path in ("out/q", "./out/../out/q"):
        result = qtool_("export", "out/q", "--format", "dense", "-o", path, "--overwrite")
        assert digest(Path("out/q")) == before
        assert result.code == 2
        assert "out/q" in result.message


def test_tensors_wider_than_the_dtype_of_the_config_go_through_or_are_refused_before_the_work(
    qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    tiny.llama(Path("model"), dtype=torch.float32)
    edit_config(dtype="bfloat16")(Path("model"))  # as many published checkpoints have it
    result = qtool_("ptq", recipe(model={"path": "./model"}))
    assert result.code in (0, 2), result.err
    if result.code == 0:
        floats, ours = tiny.stored(Path("model")), tiny.stored(Path("out/q"))
        assert torch.equal(ours["model.norm.weight"].float(), floats["model.norm.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_computing_in_half_precision_changes_nothing_that_stays_float(
    dtype: str, qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    tiny.llama(Path("model"), dtype=torch.float32)
    result = qtool_("ptq", recipe(model={"path": "./model", "dtype": dtype}))
    assert result.code == 0, result.err
    floats, ours = tiny.stored(Path("model")), tiny.stored(Path("out/q"))
    for name in Source(Path("out/q")).float_names():
        assert torch.equal(ours[name], floats[name]), name


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("export", "nowhere", "-f", "gptq", "-o", "x"), "nowhere is not a folder; give one that qtool ptq wrote"),
        (("export", "model", "-f", "gptq", "-o", "x"), "model is a float model; a qtool checkpoint is needed"),
        (("export", "model", "-f", "gptqq", "-o", "x"), "no such export format; the nearest is gptq"),
        (("eval", "./nowhere"), "there is no folder ./nowhere"),
        (("eval", "model", "--tasks", "generatedd"), "generatedd"),
        (("eval", "model", "--tasks", "generated", "--float-model", "./nowhere"), "there is no folder ./nowhere"),
        (("eval", "model", "--tasks", "generated", "--batch-size", "0"), "batch_size"),
        (("eval", "model", "--tasks", ""), "tasks"),
        (("eval", "model", "--tasks", "generated", "--output", "model/config.json"), "config.json"),
    ],
)
def test_export_and_eval_refuse_what_they_cannot_use(
    args: tuple[str, ...], words: str, qtool_: Callable[..., Result], models: Path
) -> None:
    model = own(models / "llama")
    before = digest(model)
    message = refused(qtool_(*args))
    assert words in message
    assert not Path("x").exists()
    assert digest(model) == before


@pytest.mark.parametrize("command", ["eval", "export"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"recipe": {}}'], ids=repr)
def test_a_damaged_manifest_is_named_or_not_needed(
    command: str, content: bytes, qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    assert qtool_("ptq", recipe()).code == 0
    Path("out/q", MANIFEST).write_bytes(content)
    eval_ = ("eval", "out/q", "--tasks", "generated", "--limit", "1", "--context", "16")
    result = qtool_(*(eval_ if command == "eval" else ("export", "out/q", "-f", "gptq", "-o", "out/x")))
    assert result.code in (0, 2), result.err
    assert result.code == 0 or MANIFEST in result.message


# in a process of its own


def start(*args: str, **options: Any) -> subprocess.Popen[str]:
    python_path = [str(Path(qtool.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "qtool", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, python_path))},
        **options,
    )


def test_ctrl_c_in_the_middle_of_quantizing_is_clean(recipe: Callable[..., str], work: Path) -> None:
    data = {"source": str(tiny.text(work, 9000)), "num_samples": 1500, "seq_len": 128}
    process = start("ptq", recipe(method={"name": "gptq"}, data=data))
    assert process.stderr is not None
    said = ""
    while "quantizing blocks" not in said:
        line = process.stderr.readline()
        assert line, f"it ended before: {said}"
        said += line
    assert Path("out/q.partial").is_dir()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=200)
    assert process.returncode == 130, said + rest
    assert "Traceback" not in said + rest
    assert rest.splitlines()[-1] == "interrupted; nothing was written under out/q"
    assert out == ""
    assert left() == []
