"""Named sources: which files are read from the hub, and that local files come first."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers import tiny
from huggingface_hub import constants

from qtool.config.sections import DataConfig
from qtool.data import hub as hub_module
from qtool.data import sources, windows
from qtool.data.hub import Hub, UnreachableError, load_hub
from qtool.models.loaded import LoadedModel

TEXT = "The river runs through the old town, and the mill by the bridge is still used in autumn. "


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny.with_builtin_tokenizer(0, 128)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in place of the hub: ``hf://datasets`` and repository names are read from it."""
    fetch = datasets.load_dataset
    monkeypatch.setattr(hub_module, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def load(path: str, *args: Any, data_files: Any = None, **kwargs: Any) -> Any:
        if data_files is not None:
            data_files = {
                split: str(file).replace("hf://datasets", str(tmp_path)) for split, file in data_files.items()
            }
        path = str(tmp_path / path) if "/" in path else path
        return fetch(path, *args, data_files=data_files, cache_dir=str(tmp_path / "cache"), **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_files_whose_fields_differ_are_read_and_mixed_in_a_fixed_order(hub: Path) -> None:
    write(hub / "o/r/a_sample.jsonl", [{"text": f"a{i}", "meta": {"url": "x"}} for i in range(20)])
    write(hub / "o/r/b_sample.jsonl", [{"text": f"b{i}", "meta": "none"} for i in range(20)])
    source = Hub("o/r", files="*.jsonl", sorted=True)
    found = [row["text"] for row in load_hub(source, "train")]
    assert sorted(found) == sorted(f"{name}{i}" for name in "ab" for i in range(20))
    assert {text[0] for text in found[:10]} == {"a", "b"}
    assert [row["text"] for row in load_hub(source, "train")] == found
    plain = Hub("o/r", files="a_*.jsonl", streaming=True)
    assert [row["text"] for row in load_hub(plain, "train")] == [f"a{i}" for i in range(20)]


def test_redpajama_is_a_fair_sample_from_its_beginning(
    hub: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    for name in ("arxiv", "wikipedia"):
        rows = [{"text": f"{name} {i}. {TEXT}", "meta": {name: i}} for i in range(20)]
        write(hub / f"togethercomputer/RedPajama-Data-1T-Sample/{name}_sample.jsonl", rows)
    tokens = windows.calibration(DataConfig(source="redpajama", num_samples=10, seq_len=32), loaded, 0).tokens
    text = loaded.tokenizer.decode(tokens.flatten())
    assert "arxiv" in text
    assert "wikipedia" in text


@pytest.mark.parametrize("name", ["slimpajama", "alpaca", "deita"])
def test_whole_repositories_are_read_by_their_usual_names(name: str, hub: Path) -> None:
    repositories = {"slimpajama": "DKYoon/SlimPajama-6B", "alpaca": "tatsu-lab/alpaca"}
    repository = repositories.get(name, "hkust-nlp/deita-10k-v0")
    write(hub / repository / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    assert sources.SOURCES[name].hub.repository == repository
    assert [row["text"] for row in load_hub(sources.SOURCES[name].hub, "train")] == ["one", "two"]


@pytest.mark.parametrize("name", ["redpajama", "slimpajama"])
def test_text_in_the_data_folder_comes_first(
    name: str, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTOOL_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(sources, "load_hub", None)
    config = DataConfig(source=name, num_samples=4, seq_len=16)
    assert not sources.is_local(config)
    write(tmp_path / name / "train.jsonl", [{"text": TEXT}] * 20)
    assert sources.is_local(config)
    assert windows.calibration(config, loaded, 0).tokens.shape == (4, 16)


@pytest.mark.parametrize("name", sorted(sources.SOURCES))
def test_what_is_nowhere_is_told_with_the_ways_around_it(
    name: str, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    monkeypatch.setattr(hub_module, "hub_answers", lambda: False)
    config = DataConfig(source=name, num_samples=4, seq_len=16)
    sources.check_source(config)
    assert not sources.is_local(config)
    with pytest.raises(UnreachableError, match=rf"hub.*\$QTOOL_DATA_DIR/{name}/train.*file of your own"):
        windows.calibration(config, loaded, 0)


def test_what_is_local_is_known_without_reading(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert sources.is_local(DataConfig(source=str(tmp_path / "a.txt")))
    assert not sources.is_local(DataConfig(source=str(tmp_path / "b.txt")))
    assert not sources.is_local(DataConfig(source="generated"))


@pytest.mark.parametrize(
    ("offline", "answers", "why"),
    [
        (True, True, "HF_HUB_OFFLINE is set"),
        (False, False, "https://hub.example does not answer"),
        (False, True, "no such data set"),
    ],
)
def test_why_the_hub_gave_no_data_is_a_setting_of_the_user_or_the_network_or_the_error(
    monkeypatch: pytest.MonkeyPatch, offline: bool, answers: bool, why: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(hub_module, "hub_answers", lambda: answers)
    assert hub_module.reason(OSError("no such data set\nmore lines")) == why
