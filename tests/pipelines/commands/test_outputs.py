"""The outputs of whole commands: files, printed JSON, manifest, report, model card and exports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers import tiny
from helpers.whole_runs import NATIVE_FILES, Result, own
from transformers import AutoModelForCausalLM

import qtool
from qtool.blocks.job import load_method
from qtool.checkpoints.native import MANIFEST
from qtool.config.recipe import Recipe
from qtool.config.sections import METRICS
from qtool.data.windows import calibration, token_hash
from qtool.models.linears import packed_linears
from qtool.quant.packed_weight import FORMAT_VERSION
from qtool.reports.report import Report


def test_a_run_leaves_the_checkpoint_and_the_exports_and_nothing_else(whole: Result) -> None:
    assert {path.name for path in Path("out").iterdir()} == {"q", "gptq", "dense"}
    assert {path.name for path in Path("out/q").iterdir()} == NATIVE_FILES
    sharded = {name for name in NATIVE_FILES if name.startswith("model")}
    exported = NATIVE_FILES - {"qtool.json", "report.html", "report.json", "report.md"} - sharded | {
        "model.safetensors",
        "qtool_export.json",
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
    assert set(resolved["method"]) == set(load_method("gptq").config.model_fields)  # defaults are filled in
    assert Recipe.model_validate(resolved).model_dump(mode="json") == resolved
    floats = tiny.load(models / "llama")
    tokens = calibration(Recipe.model_validate(resolved).data, floats, 3).tokens
    known = {"tokens": [8, 32], "sha256": token_hash(tokens)}
    assert manifest["data"] == known | {"rendering": None, "num_learned": None}  # no conversations
    assert [each["name"] for each in manifest["series"]] == ["block_error"]
    assert len(manifest["series"][0]["values"]) == 2
    assert all(0 < error < 0.1 for error in manifest["series"][0]["values"])
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
        *(("kl", metric) for metric in METRICS["kl"]),
    ]
    perplexity, divergence, *percentiles, agreement = report.results
    assert [row.stderr for row in percentiles] == [None] * 4
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
    assert report.model_copy(update={"recipe": None, "command": None}).markdown().rstrip() in readme
    for number in (f"{perplexity.value:.2f}", f"{divergence.value:.4f}", "4.500 (scales and zero points counted)"):
        assert number in readme
    assert "import qtool" in readme
    assert 'from_pretrained(".")' in readme
    assert ".partial" not in readme
    assert [(export.format, export.path, export.num_bytes) for export in report.exports] == [
        (name, f"out/{name}", sum(p.stat().st_size for p in Path("out", name).glob("*.safetensors")))
        for name in ("gptq", "dense")
    ]
    for export in report.exports:
        assert export.weight_difference == 0
        assert export.logit_difference is not None
        assert export.logit_difference < 1e-5
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
    assert report["float_bytes"] == json.loads(whole.out)["report"]["float_bytes"]
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
