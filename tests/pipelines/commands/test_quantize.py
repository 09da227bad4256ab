"""The whole pipeline through the command line: options that change a run, and failures that lose nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from helpers import tiny
from helpers.whole_runs import Result, digest, left, own, weights_digest
from transformers import AutoModelForCausalLM

import qtool
from qtool.checkpoints import native as checkpoint
from qtool.checkpoints.native import MANIFEST, NativeCheckpoint
from qtool.config.sections import ModelConfig
from qtool.data import windows
from qtool.evaluation import tasks as evaluation
from qtool.evaluation.continuations import continuations
from qtool.models.linears import packed_linears
from qtool.models.loading import load_model
from qtool.pipelines import export as exporting
from qtool.pipelines import quantize as pipeline
from qtool.reports import model_card
from qtool.reports.records import TaskResult
from qtool.reports.report import Report
from qtool.system.errors import RunError


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
    specs = NativeCheckpoint(Path("out/q")).specs
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
    exported = digest(Path("out/ct"))
    again = qtool_("export", "out/q", "--format", "compressed-tensors", "-o", "out/ct")
    assert again.code == 0
    assert "out/ct is this export already, complete and unchanged" in again.err
    assert digest(Path("out/ct")) == exported
    other = qtool_("export", "out/q", "--format", "dense", "-o", "out/ct")
    assert other.code == 2
    assert "out/ct exists; choose another folder, or pass --overwrite" in other.message
    assert digest(Path("out/ct")) == exported
    Path("out/ct/config.json").write_text("{}")
    assert qtool_("export", "out/q", "--format", "compressed-tensors", "-o", "out/ct").code == 2
    assert qtool_("export", "out/q", "-f", "compressed-tensors", "-o", "out/ct", "--overwrite").code == 0


def test_eval_without_the_float_model_says_so_and_goes_on(
    qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path
) -> None:
    model = own(models / "llama")
    assert qtool_("ptq", recipe(model={"path": "./model"})).code == 0
    shutil.rmtree(model)
    limits = ("--limit", "1", "--context", "16", "--device", "cpu")
    result = qtool_("eval", "out/q", "--tasks", "generated", *limits)
    assert result.code == 0, result.err
    assert "note: the float model is not measured: model.path: there is no folder ./model" in result.err


def test_an_evaluation_whose_text_is_out_of_reach_fails_when_the_rest_is_printed(
    qtool_: Callable[..., Result], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(models / "llama")
    monkeypatch.delenv("QTOOL_DATA_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    limits = ("--limit", "1", "--context", "16", "--device", "cpu")
    result = qtool_("eval", "model", "--tasks", "generated,c4", *limits, "-o", "out/report")
    assert result.code == 1
    assert "| generated" in result.out
    assert "not every task was measured:\n  c4: c4 is not on this machine" in result.message
    assert (Path("out/report") / "report.json").is_file()


def test_kl_without_the_float_model_is_refused_before_anything_is_measured(
    qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own(models / "llama")
    assert qtool_("ptq", recipe(model={"path": "./model"})).code == 0
    assert qtool_("export", "out/q", "--format", "dense", "-o", "out/dense").code == 0
    shutil.rmtree(model)
    monkeypatch.setattr("qtool.evaluation.tasks.score_windows", None)
    for folder, why in (("out/q", "there is no folder ./model"), ("out/dense", "its folder does not name it")):
        result = qtool_("eval", folder, "--tasks", "generated,kl", "-o", "out/report")
        assert result.code == 2, result.err
        assert f"kl compares {folder} with the float model it was made from, and" in result.message
        assert why in result.message
        assert "name it with --float-model" in result.message


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
    card = Path(folder, "README.md").read_text(encoding="utf-8")
    assert 'AutoModelForCausalLM.from_pretrained(".")' in card
    return bool(packed_linears(loaded.model)) and Path(folder, MANIFEST).exists()


def test_a_failed_evaluation_keeps_the_checkpoint(
    qtool_: Callable[..., Result],
    recipe: Callable[..., str],
    gptq: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise RunError("the evaluation broke")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", fail)
        result = qtool_("ptq", recipe(**gptq))
    assert result.code == 1
    assert "the evaluation broke" in result.message
    assert complete("out/q")
    assert {path.name for path in Path("out").iterdir()} == {"q", "q.partial"}
    goes_on_without_quantizing(qtool_, monkeypatch)


def goes_on_without_quantizing(qtool_: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command does what is left, and nothing is left beside the results."""

    def fail(*args: object) -> None:
        pytest.fail("the model was quantized again")

    before = weights_digest()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prepare", fail)
        result = qtool_("ptq", "r.yaml")
    assert result.code == 0, result.err
    assert "continuing the run in out/q.partial: the checkpoint is complete" in result.err
    assert weights_digest() == before
    assert {path.name for path in Path("out").iterdir()} == {"q", "gptq", "dense"}
    report = Report.model_validate_json(Path("out/q/report.json").read_text())
    assert report.results
    assert {"quantize", "eval", "export gptq", "export dense"} <= set(report.seconds)
    assert [export.path for export in report.exports] == ["out/gptq", "out/dense"]


def test_a_failed_export_keeps_the_checkpoint_and_the_report_of_its_evaluation(
    qtool_: Callable[..., Result],
    recipe: Callable[..., str],
    gptq: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RunError("it differs after export")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "read_back", fail)
        result = qtool_("ptq", recipe(**gptq))
    assert result.code == 1
    assert "it differs after export" in result.message
    assert complete("out/q")
    assert {path.name for path in Path("out").iterdir()} == {"q", "q.partial"}
    assert Report.model_validate_json(Path("out/q/report.json").read_text()).results
    monkeypatch.setattr(evaluation, "evaluate", fail)  # it is not evaluated again
    goes_on_without_quantizing(qtool_, monkeypatch)


class Stage(NamedTuple):
    """A place in the run, and what is left after it fails: nothing, finished blocks to go on with, or all."""

    owner: object
    name: str
    kept: Literal["nothing", "blocks", "all"]


STAGES = {
    "loading": Stage(pipeline, "load_model", "nothing"),
    "reading data": Stage(windows, "calibration", "nothing"),
    "saving": Stage(checkpoint, "save", "blocks"),
    "writing the card": Stage(model_card, "write", "blocks"),
    "evaluating": Stage(evaluation, "evaluate", "all"),
    "exporting": Stage(exporting, "read_back", "all"),
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
        expected = "interrupted; out/q is complete, but the steps after it were not finished"
        assert last == f"{expected}; run the same command again to continue"
        assert complete("out/q")
        assert {path.name for path in Path("out").iterdir()} == {"q", "q.partial"}
        goes_on_without_quantizing(qtool_, monkeypatch)
    elif kept == "blocks":
        expected = (
            "interrupted; nothing was written under out/q; run the same command again to continue from out/q.partial"
        )
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
    assert "out/q.partial holds what is done; run the same command again to continue" in result.message
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


def start(*args: str, **options: Any) -> subprocess.Popen[str]:
    python_path = [str(Path(qtool.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "qtool", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, python_path))},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
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


def test_a_task_that_was_measured_is_not_measured_again(
    qtool_: Callable[..., Result],
    recipe: Callable[..., str],
    gptq: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[str] = []
    own = evaluation._own_tasks

    def counted(*args: Any) -> dict[str, list[TaskResult]]:
        measured.append("own")
        return own(*args)

    def of_lm_eval(task: str, *args: object) -> list[TaskResult]:
        measured.append(task)
        if measured.count("three") == 1 and task == "three":
            raise KeyboardInterrupt
        return [TaskResult(task=task, metric="acc", value=1 / 3, stderr=float("inf"))]

    monkeypatch.setattr(evaluation, "check_tasks", lambda config: None)
    monkeypatch.setattr(evaluation, "_own_tasks", counted)
    monkeypatch.setattr(evaluation, "_lm_eval_task", of_lm_eval)
    gptq["eval"]["tasks"] = ["one", "generated", "two", "three"]
    assert qtool_("ptq", recipe(**gptq)).code == 130
    assert qtool_("ptq", "r.yaml").code == 0
    assert measured == ["own", "one", "two", "three", "three"]
    report = Report.model_validate_json(Path("out/q/report.json").read_text())
    assert [(row.task, row.stderr) for row in report.results if row.task != "generated"] == [
        (name, float("inf")) for name in ("one", "two", "three")
    ]
    assert [row.task for row in report.results] == ["one", "generated", "two", "three"]


def test_a_run_that_was_stopped_after_its_tasks_reports_the_same_texts(
    qtool_: Callable[..., Result],
    recipe: Callable[..., str],
    gptq: dict[str, Any],
    whole: Result,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = json.loads(whole.out)["report"]["continuations"]
    assert [each["num_tokens"] > 0 and each["float_text"] is not None for each in expected] == [True] * 3
    monkeypatch.chdir(work)

    def stopped(*args: Any) -> None:
        continuations(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "continuations", stopped)
        assert qtool_("ptq", recipe(**gptq)).code == 130
    assert qtool_("ptq", "r.yaml").code == 0
    assert json.loads(Path("out/q/report.json").read_text())["continuations"] == expected
    assert "## What both models write" in Path("out/q/README.md").read_text(encoding="utf-8")
