"""Trackers: the numbers that a run sends, read back by each package's own reader, and faults that are not ours."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import tiny
from helpers.methods import recorded
from helpers.notes import Notes
from helpers.stopped_runs import stop_after

from qtool.cli import main
from qtool.config import recipe as recipes
from qtool.pipelines import tracking
from qtool.pipelines.quantize import quantize
from qtool.pipelines.tracking import Tracker
from qtool.reports.report import read_report
from qtool.system import progress
from qtool.system.errors import InputError

LSQ = {"name": "lsq", "min_steps": 0, "batch_size": 5, "epochs": 3, "validation_samples": 3, "validate_every": 2}
PHASED: dict[str, dict[str, Any]] = {
    "gptq": {},
    "awq": {},
    "signround": {"iterations": 2},
    "efficientqat": {"min_steps": 2, "epochs": 0.1, "e2e": {"steps": 2, "validation_samples": 2, "validate_every": 1}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model of two blocks, and a text."""
    made = tmp_path_factory.mktemp("tracked")
    tiny.llama(made / "float")
    tiny.text(made)
    return made


@pytest.fixture
def made(folder: Path, tmp_path: Path) -> Callable[..., recipes.Recipe]:
    """A function that returns the recipe of a run in a moment; it writes ``out``."""

    def made(method: Mapping[str, Any], tracker: object = "tensorboard", **sections: Any) -> recipes.Recipe:
        raw = {
            "model": {"path": str(folder / "float"), "device": "cpu", "dtype": "float32"},
            "method": dict(method),
            "quant": {"num_bits": 2, "group_size": 16, "symmetric": False},
            "data": {"source": str(folder / "prose.txt"), "num_samples": 8, "seq_len": 32},
            "output": {"path": str(tmp_path / "out")},
            "tracker": tracker,
        } | sections
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        return recipes.load(tmp_path / "r.yaml")

    return made


class Events:
    """What TensorBoard reads of the one run in ``OUT.logs``."""

    def __init__(self, logs: Path) -> None:
        reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        (self.folder,) = logs.iterdir()
        self.read = reader.EventAccumulator(str(self.folder))
        self.read.Reload()

    def __getitem__(self, tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in self.read.Scalars(tag)]

    def values(self, tag: str) -> list[float]:
        return [value for _, value in self[tag]]

    def hyperparameters(self) -> dict[str, Any]:
        from tensorboard.plugins.hparams import metadata

        content = self.read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        found = metadata.parse_session_start_info_plugin_data(content).hparams
        return {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in found.items()}


needs_tensorboard = pytest.mark.skipif(not tracking.installed("tensorboard"), reason="tensorboard is not installed")


@needs_tensorboard
def test_tensorboard_has_curves_recipe_and_quality(made: Callable[..., recipes.Recipe], tmp_path: Path) -> None:
    quantize(made(LSQ, eval={"tasks": ["kl", "generated"], "limit": 1, "context": 32, "continuations": 0}))
    events, series = Events(tmp_path / "out.logs"), recorded(tmp_path / "out" / "qtool.json")
    assert [step for step, _ in events["training/loss"]] == [1, 2, 3]
    assert events.values("training/loss") == pytest.approx(series["loss"])
    assert [step for step, _ in events["training/validation_loss"]] == [0, 2, 3]
    assert events.values("training/validation_loss") == pytest.approx(series["validation"])
    rates = events.values("training/learning_rate")
    assert rates[0] > rates[1] > rates[2] > 0
    assert min(events.values("training/grad_norm")) > 0
    report = read_report(tmp_path / "out")
    assert report is not None
    rows = {(row.task, row.metric): row for row in report.results}
    row = rows["generated", "perplexity"]
    for suffix, value in (("", row.value), ("_float", row.float_value), ("_change", row.delta)):
        assert events.values(f"quality/generated/perplexity{suffix}") == pytest.approx([value])
    assert events.values("quality/kl/kl") == pytest.approx([rows["kl", "kl"].value])
    assert events.values("size/quantized_bytes") == [report.quantized_bytes]
    recipe = events.hyperparameters()
    assert (recipe["quant.num_bits"], recipe["method.name"], recipe["quant.symmetric"]) == (2, "lsq", False)
    (text,) = events.read.Tensors("recipe/text_summary")
    assert b"num_bits: 2" in text.tensor_proto.string_val[0]
    assert events.folder.name.startswith("out-")


@needs_tensorboard
@pytest.mark.parametrize("method", PHASED)
def test_block_methods_send_the_figures_of_each_block(
    made: Callable[..., recipes.Recipe], tmp_path: Path, method: str
) -> None:
    quantize(made({"name": method, **PHASED[method]}))
    events, series = Events(tmp_path / "out.logs"), recorded(tmp_path / "out" / "qtool.json")
    assert [step for step, _ in events["blocks/block_error"]] == [0, 1]
    assert events.values("blocks/block_error") == pytest.approx(series["block_error"])
    assert 0 < min(events.values("blocks/weight_error")) < 1
    if method == "efficientqat":
        assert events.values("blocks/loss") == pytest.approx(series["loss"])
        assert [step for step, _ in events["e2e-qp/loss"]] == [1, 2]
        assert [step for step, _ in events["e2e-qp/validation_loss"]] == [0, 1, 2]


@needs_tensorboard
def test_a_run_that_goes_on_goes_on_in_its_tracker(
    made: Callable[..., recipes.Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = made({"name": "gptq"})

    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe)
    quantize(recipe)
    assert [step for step, _ in Events(tmp_path / "out.logs")["blocks/block_error"]] == [0, 1]


class Recorder(Tracker):
    """A tracker that keeps what it gets, and fails where it is told to."""

    made: list["Recorder"]

    def __init__(self, opening: tracking.Opening, fails: str = "") -> None:
        self.opening, self.fails, self.id = opening, fails, opening.id or "first"
        self.calls: list[str] = []
        self._did("open")

    def _did(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails:
            raise ValueError(f"{call} is not allowed.\nmore")

    def log(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        self._did(f"{phase} {step}")

    def result(self, figures: Mapping[str, float]) -> None:
        self._did("result")

    def close(self, ending: tracking.Ending) -> None:
        self._did(ending)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Recorder]]:
    """A function that puts a recorder, which fails at a call, in the place of W&B; returns those that were opened."""
    opened: list[Recorder] = []

    def put(fails: str = "") -> list[Recorder]:
        def make(opening: tracking.Opening) -> Recorder:
            opened.append(Recorder(opening, fails))
            return opened[-1]

        monkeypatch.setitem(tracking.TRACKERS, "wandb", make)
        monkeypatch.setattr(tracking, "installed", lambda package: True)
        return opened

    return put


def test_a_tracker_that_cannot_be_opened_is_named_and_is_no_bug_of_ours(
    made: Callable[..., recipes.Recipe], recorder: Callable[..., list[Recorder]], tmp_path: Path, capsys: Any
) -> None:
    recorder("open")
    made({"name": "rtn"}, "wandb")
    assert main.main(["ptq", str(tmp_path / "r.yaml")]) == 2
    said = capsys.readouterr().err
    assert "error: tracker wandb failed: ValueError: open is not allowed; log in with wandb login, or set" in said
    assert "bug" not in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("fails", ["blocks 1", "result", "finished"])
def test_a_tracker_that_fails_later_is_left_out_and_said_once(
    made: Callable[..., recipes.Recipe], recorder: Callable[..., list[Recorder]], tmp_path: Path, fails: str
) -> None:
    opened = recorder(fails)
    with progress.use(notes := Notes()):
        quantize(made({"name": "gptq"}, "wandb"))
    calls = ["open", "blocks 0", "blocks 1", "result", "finished"]
    assert opened[0].calls == calls[: calls.index(fails) + 1]
    assert (
        len([note for note in notes.texts if f"tracker wandb failed: ValueError: {fails} is not allowed" in note]) == 1
    )
    assert (tmp_path / "out" / "report.json").exists()


def test_a_tracker_changes_no_bit_and_no_identity_of_a_run(
    made: Callable[..., recipes.Recipe], recorder: Callable[..., list[Recorder]], tmp_path: Path
) -> None:
    opened = recorder()
    quantize(made({"name": "rtn"}, "wandb"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}
    with progress.use(notes := Notes()):
        quantize(made({"name": "rtn"}, "none"))
    assert any("is complete already" in said for said in notes.said)
    quantize(made({"name": "rtn"}, "none", output={"path": str(tmp_path / "out"), "overwrite": True}))
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")} == before
    assert len(opened) == 1
    assert (opened[0].opening.run_name, opened[0].opening.flat()["quant.num_bits"]) == ("out", 2)


@pytest.mark.parametrize(
    ("error", "ending"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")], ids=["ctrl-c", "fault"]
)
def test_the_tracker_hears_how_a_run_ended_and_a_later_start_goes_on_by_its_id(
    made: Callable[..., recipes.Recipe],
    recorder: Callable[..., list[Recorder]],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    ending: str,
) -> None:
    opened, recipe = recorder(), made({"name": "gptq"}, "wandb")

    with monkeypatch.context() as patch:
        stop_after(patch, 1, error)
        with pytest.raises(error):
            quantize(recipe)
    quantize(recipe)
    assert [each.opening.id for each in opened] == [None, "first"]
    assert [each.calls for each in opened] == [["open", "blocks 0", ending], ["open", "blocks 1", "result", "finished"]]


def test_of_several_processes_only_the_first_has_a_tracker(
    made: Callable[..., recipes.Recipe], recorder: Callable[..., list[Recorder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = recorder()
    tiny.several(1, 2, monkeypatch)
    state: Any = None  # it is not read
    with tracking.opened(made({"name": "rtn"}, "wandb"), state) as tracker:
        assert tracker is tracking.NO_TRACKER
    assert not opened


def test_a_package_that_is_not_installed_is_refused_early(
    made: Callable[..., recipes.Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "installed", lambda package: False)
    with pytest.raises(InputError, match=r"tracker\.name: mlflow is not installed; pip install mlflow, or leave"):
        quantize(made({"name": "rtn"}, "mlflow"))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("wandd", r"tracker\.name: "),
        ({"project": "p"}, "tracker: project need"),
        ({"name": "tensorboard", "project": "p"}, "tracker: TensorBoard has no projects"),
        ({"name": "wandb", "run_name": "a/b"}, r"tracker\.run_name: "),
    ],
)
def test_a_wrong_section_is_refused(made: Callable[..., recipes.Recipe], tracker: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made({"name": "rtn"}, tracker)


@pytest.mark.parametrize(
    "method", [{"name": "lsq", "tracker": "wandb"}, {"name": "efficientqat", "e2e": {"tracker": "none"}}]
)
def test_the_former_key_says_where_it_went(made: Callable[..., recipes.Recipe], method: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"tracker: this key is now a section of the recipe: write tracker: NAME"):
        made(method)


def test_settings_of_the_package_count_where_the_recipe_has_none(
    made: Callable[..., recipes.Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def project(tracker: object) -> str:
        opening = tracking.Opening(made({"name": "rtn"}, tracker).tracker, "out", tmp_path, {}, None)
        return opening.project("WANDB_PROJECT")

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert project("wandb") == "qtool"
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert project("wandb") == "theirs"
    assert project({"name": "wandb", "project": "ours"}) == "ours"


def test_a_recipe_becomes_flat_keys_and_patterns_stay_in_one_value() -> None:
    nested: dict[str, Any] = {
        "quant": {"num_bits": 3, "overrides": {"*.q": {"skip": True}}},
        "eval": None,
        "export": [],
        "seed": 0,
    }
    assert dict(tracking._flat(nested)) == {
        "quant.num_bits": 3,
        "quant.overrides": '{"*.q": {"skip": true}}',
        "eval": "null",
        "export": "[]",
        "seed": 0,
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own libraries
def test_weights_and_biases_reads_its_own_offline_file(
    made: Callable[..., recipes.Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own command."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = {"name": "wandb", "project": "bits", "run_name": "two"}
    quantize(made({"name": "efficientqat", **PHASED["efficientqat"]}, tracker))
    (folder,) = tmp_path.glob("out.logs/wandb/offline-run-*")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", str(folder), "--json"]
    lines = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [record["history"]["item"] for record in map(json.loads, lines) if record["type"] == "history"]
    series = recorded(tmp_path / "out" / "qtool.json")
    assert [row["blocks/step"] for row in rows if "blocks/step" in row] == [0, 1]
    assert [row["blocks/loss"] for row in rows if "blocks/loss" in row] == pytest.approx(series["loss"])
    assert [row["e2e-qp/step"] for row in rows if "e2e-qp/loss" in row] == [1, 2]
    found = json.loads(subprocess.run([*inspect, "--summary"], capture_output=True, text=True, check=True).stdout)
    assert (found["project"], found["config"]["quant.num_bits"]) == ("bits", 2)
    assert found["summary"]["size/bits_per_weight"] == recorded_bits(tmp_path)


def recorded_bits(folder: Path) -> float:
    report = read_report(folder / "out")
    assert report is not None
    assert report.bits_per_weight is not None
    return report.bits_per_weight


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of its own libraries
def test_mlflow_reads_back_what_it_was_sent(made: Callable[..., recipes.Recipe], tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny has no database")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    quantize(made({"name": "efficientqat", **PHASED["efficientqat"]}, {"name": "mlflow", "project": "bits"}))
    client, series = mlflow.MlflowClient(), recorded(tmp_path / "out" / "qtool.json")
    (run,) = client.search_runs([client.get_experiment_by_name("bits").experiment_id])
    assert (run.info.run_name, run.info.status) == ("out", "FINISHED")
    losses = client.get_metric_history(run.info.run_id, "blocks/loss")
    assert [(metric.step, metric.value) for metric in losses] == list(enumerate(series["loss"]))
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "e2e-qp/loss")] == [1, 2]
    assert run.data.params["quant.num_bits"] == "2"
    assert run.data.metrics["size/bits_per_weight"] == recorded_bits(tmp_path)
