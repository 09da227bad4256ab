"""Model cards of checkpoints and exports: what the hub reads of them, the licence, and code that runs anywhere."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from helpers import tiny
from helpers.whole_runs import Result
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from qtool.config.engines import LIBRARIES, READS
from qtool.reports import model_card
from qtool.reports.report import Report

BASE = """---
license: other
license_name: small
license_link: https://example.org/LICENSE
language: [en, de]
pipeline_tag: text-generation
base_model: org/base
datasets: [x]
tags: [x]
---
# A model
"""
LEGAL = {"LICENSE": b"terms\r\n", "NOTICE.txt": b"notice", "USE_POLICY.md": b"policy", "license-code": b"code"}
NOT_LEGAL = ("licenses.json", "license.key", "notices.py", "unlicensed.txt")
NEEDS = {"compressed-tensors": "compressed_tensors", "gguf": "gguf"}  # package that code needs besides transformers
FORMATS = ("compressed-tensors", "dense", "gguf", "gptq", "mlx")


@pytest.fixture
def made(qtool_: Callable[..., Result], recipe: Callable[..., str], tmp_path: Path) -> Path:
    """A checkpoint, measured on generated text, of a model with a card and a licence."""
    floats = tiny.llama(tmp_path / "mine")
    (floats / "README.md").write_text(BASE)
    for name, content in LEGAL.items():
        (floats / name).write_bytes(content)
    for name in NOT_LEGAL:
        (floats / name).write_text("{}")
    sections = {"tasks": ["generated", "kl"], "limit": 2, "context": 32, "continuations": 0}
    assert qtool_("ptq", recipe(model={"path": "mine", "device": "cpu"}, eval=sections)).code == 0
    return tmp_path / "out" / "q"


def exported(qtool_: Callable[..., Result], folder: Path, format: str) -> Path:
    result = qtool_("export", folder, "-f", format, "-o", f"out/{format}")
    assert result.code == 0, result.err
    return folder.with_name(format)


def header(folder: Path) -> ModelCardData:
    """The header as the hub's own library reads it; a model-index that it does not understand is an error."""
    data = ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data
    assert isinstance(data, ModelCardData)
    assert ModelCard(f"---\n{data.to_yaml()}\n---\n").data.to_yaml() == data.to_yaml()
    return data


def code_of(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)


@pytest.mark.parametrize("format", ["native", *FORMATS])
def test_the_hub_reads_licence_language_and_origin(made: Path, qtool_: Callable[..., Result], format: str) -> None:
    folder = made if format == "native" else exported(qtool_, made, format)
    data = header(folder)
    expected = {
        "license": "other",
        "license_name": "small",
        "license_link": "https://example.org/LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "quantized_by": "qtool",
        "tags": ["qtool"],
        "library_name": format if format in ("gguf", "mlx") else "transformers",
    }
    assert {key: data.get(key) for key in expected} == expected
    assert {name: (folder / name).read_bytes() for name in LEGAL} == LEGAL
    assert not [name for name in NOT_LEGAL if (folder / name).exists()]


def test_the_relation_is_said_of_a_model_with_a_name_on_the_hub(
    qtool_: Callable[..., Result], recipe: Callable[..., str], tmp_path: Path
) -> None:
    there = tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40)
    there.parent.mkdir(parents=True)
    tiny.llama(there)
    (there / "README.md").write_text(BASE)
    assert qtool_("ptq", recipe(model={"path": str(there), "device": "cpu"})).code == 0
    for folder in (Path("out/q"), exported(qtool_, Path("out/q"), "dense")):
        data = header(folder)
        assert (data.base_model, data.get("base_model_relation")) == ("org/tiny", "quantized")


def test_the_model_index_has_what_was_measured_and_nothing_else(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    data = header(made)
    assert data.get("eval_results") is None, "text that the model wrote is no data set"
    rows = [row | {"task": "wikitext2"} if row["task"] == "generated" else row for row in report["results"]]
    rows += [
        {"task": "boolq", "metric": "acc", "value": 0.5, "stderr": 0.25, "num_fewshot": 5, "limit": 4, "n": 4},
        {"task": "mmlu", "metric": "acc", "value": None, "note": "not measured"},
        {"task": "mmlu_stem", "metric": "acc", "value": 0.5, "detail": True},
    ]
    model_card.write(made, Report.model_validate(report | {"results": rows}), "qtool.json", "q")
    data = header(made)
    assert data.model_name == "q"
    assert data.eval_results is not None
    found = {(each.dataset_name, each.metric_type): each for each in data.eval_results}
    assert set(found) == {("WikiText-2", "perplexity"), ("boolq", "accuracy")}
    assert found["WikiText-2", "perplexity"].metric_value == rows[0]["value"]
    boolq = found["boolq", "accuracy"]
    assert (boolq.metric_value, boolq.metric_args) == (0.5, {"stderr": 0.25, "n": 4})
    assert boolq.dataset_args == {"num_few_shot": 5, "limit": 4}
    index = yaml.safe_load(data.to_yaml())["model-index"]
    assert model_index_to_eval_results(index) == ("q", data.eval_results)


@pytest.mark.parametrize("format", ["native", "compressed-tensors", "dense", "gguf"])
def test_the_code_runs_wherever_the_folder_is(
    made: Path,
    qtool_: Callable[..., Result],
    format: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if format in NEEDS and find_spec(NEEDS[format]) is None:
        pytest.skip(f"{NEEDS[format]} is not installed")
    folder = made if format == "native" else exported(qtool_, made, format)
    moved = shutil.move(folder, tmp_path / "another place")
    monkeypatch.chdir(moved)
    card = Path("README.md").read_text()
    blocks = [code for code in code_of(card, "python") if "transformers" in code]
    assert len(blocks) == 1
    names: dict[str, object] = {}
    exec(blocks[0], names)
    tokens = names["tokenizer"]("Once upon a time", return_tensors="pt")  # type: ignore[operator]
    model = names["model"]
    assert model(tokens["input_ids"]).logits.isfinite().all()  # type: ignore[operator]
    for text in [*code_of(card, "python"), *code_of(card, "console")]:
        assert str(tmp_path) not in text
        assert "out/" not in text


@pytest.mark.parametrize("format", FORMATS)
def test_a_card_shows_every_engine_that_was_run_with_the_format(
    made: Path, qtool_: Callable[..., Result], format: str
) -> None:
    card = (exported(qtool_, made, format) / "README.md").read_text()
    for row in (*READS, *LIBRARIES):
        if row.format == format:
            assert (f"## Load it with {row.engine}\n" in card) == (row.how == "run")
            if row.how == "run":
                assert row.load.replace("{folder}", ".") in card
    assert "No engine has loaded this folder yet" in card
    assert "| generated [1] | perplexity |" in card


def test_asymmetric_weights_in_compressed_tensors_are_expanded_by_the_code(
    qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    assert qtool_("ptq", recipe(quant={"num_bits": 4, "group_size": 32, "symmetric": False})).code == 0
    card = (exported(qtool_, Path("out/q"), "compressed-tensors") / "README.md").read_text()
    assert "CompressedTensorsConfig(dequantize=True)" in "".join(code_of(card, "python"))


def test_a_broken_header_is_said_and_carries_nothing_over(
    qtool_: Callable[..., Result], recipe: Callable[..., str], tmp_path: Path
) -> None:
    floats = tiny.llama(tmp_path / "mine")
    (floats / "README.md").write_text("---\nlicense: [mit\n---\n")
    result = qtool_("ptq", recipe(model={"path": "mine", "device": "cpu"}))
    assert result.code == 0
    assert "mine/README.md has no readable header, so no licence is carried over" in result.err
    assert header(Path("out/q")).license is None
