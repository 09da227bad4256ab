"""The windows of C4: the draws of the papers, from any of the places where its file may lie."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st

from qtool.config.sections import METRICS, DataConfig, EvalConfig
from qtool.data import hub, sources, windows
from qtool.data.drawn_windows import NUM_WINDOWS, drawn
from qtool.data.hub import UnreachableError
from qtool.evaluation.tasks import evaluate
from qtool.models.loaded import LoadedModel
from qtool.system.errors import InputError

LINES = [f"{place} {n}: the river runs through the town. " for n, place in enumerate(["Old", "New", "Far", "Low"] * 8)]
DOCUMENTS = [line * (n % 5 + 1) for n, line in enumerate(LINES)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny.with_builtin_tokenizer(0, 128)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, without a hub."""
    monkeypatch.setenv("QTOOL_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    return tmp_path


def write(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def codes(text: str) -> list[int]:
    """One token for each character."""
    return [ord(character) for character in text]


texts = st.lists(st.text("abcdefgh", max_size=30), min_size=1, max_size=12)


@given(texts, st.integers(1, 8), st.integers(1, 20))
def test_the_draws_are_those_of_the_definition(documents: list[str], length: int, count: int) -> None:
    """Python's generator with seed 0: documents until one is longer than a window, then a start, bounds inclusive."""
    if all(len(text) <= length for text in documents):
        with pytest.raises(InputError, match=f"none of the {len(documents)} document.*lower eval.context"):
            drawn(documents, count, length, codes)
        return
    random.seed(0)
    expected: list[list[int]] = []
    while len(expected) < count:
        text = documents[random.randint(0, len(documents) - 1)]
        if len(text) > length:
            start = random.randint(0, len(text) - length - 1)
            expected.append(codes(text[start : start + length]))
    assert drawn(documents, count, length, codes).tolist() == expected


@given(texts, st.integers(1, 8), st.integers(1, 20), st.integers(0, 9))
def test_a_limit_keeps_the_first_windows_and_no_seed_changes_them(
    documents: list[str], length: int, count: int, seed: int
) -> None:
    documents = [*documents, "abcdefghi"]
    random.seed(seed)
    many = drawn(documents, count + 5, length, codes)
    assert torch.equal(drawn(documents, count, length, codes), many[:count])


def test_a_document_as_long_as_a_window_is_drawn_again() -> None:
    found = drawn(["aaaa", "bbbbb"], 16, 4, codes)
    assert set(found.flatten().tolist()) == {ord("b")}


@pytest.mark.parametrize("file", sources.C4_FILES)
def test_each_place_of_the_file_gives_the_same_windows(file: str, folder: Path, loaded: LoadedModel) -> None:
    write(folder / file, DOCUMENTS)
    found = windows.perplexity_windows("c4", loaded, 24, None, seed=3)
    assert found.shape == (NUM_WINDOWS, 24)
    assert torch.equal(found, windows.perplexity_windows("c4", loaded, 24, 10**9, seed=4))
    for window in windows.perplexity_windows("c4", loaded, 24, 5, seed=0):
        assert str(loaded.tokenizer.decode(window))[6:-6] in "".join(DOCUMENTS)


def test_the_hub_is_asked_for_the_first_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel
) -> None:
    import datasets

    write(tmp_path / "allenai/c4/en" / sources.C4_SHARD, DOCUMENTS)
    write(tmp_path / "allenai/c4/en/c4-validation.00001-of-00008.json.gz", ["another text"])
    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    fetch = datasets.load_dataset

    def load(path: str, data_files: dict[str, str], **options: object) -> object:
        files = {split: file.replace("hf://datasets", str(tmp_path)) for split, file in data_files.items()}
        return fetch(path, data_files=files, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(sources.c4_validation()) == DOCUMENTS


@pytest.mark.usefixtures("folder")
def test_c4_out_of_reach_has_a_row_that_says_so(loaded: LoadedModel) -> None:
    with pytest.raises(
        UnreachableError, match=rf"c4 is not on this machine.*c4/validation\.jsonl or .*{sources.C4_SHARD}"
    ):
        windows.perplexity_windows("c4", loaded, 24, 4, seed=0)
    first, second = evaluate(loaded, EvalConfig(tasks=("c4", "generated"), limit=2, context=16), None, seed=0)
    assert (first.task, first.metric, first.value) == ("c4", "perplexity", None)
    assert first.note.startswith("not measured: c4 is not on this machine")
    assert second.value is not None


def test_the_row_says_how_many_windows_were_read(folder: Path, loaded: LoadedModel) -> None:
    write(folder / "c4/validation.jsonl", DOCUMENTS)
    rows = evaluate(loaded, EvalConfig(tasks=("c4", "kl"), limit=3, context=24), loaded, seed=0)
    assert [(row.task, row.metric) for row in rows] == [("c4", "perplexity"), *(("kl", each) for each in METRICS["kl"])]
    assert (rows[0].note, rows[0].limit) == ("3 windows of 24 tokens", 3)
    assert rows[0].delta == pytest.approx(0)
    assert "of generated" in rows[1].note  # as always where WikiText-2 is missing


@pytest.mark.parametrize("name", ["part.json.gz", "part.jsonl.gz"])
def test_compressed_json_lines_can_be_calibration_text(name: str, tmp_path: Path, loaded: LoadedModel) -> None:
    write(tmp_path / name, DOCUMENTS)
    write(tmp_path / "part.jsonl", DOCUMENTS)
    plain, packed = (
        windows.calibration(DataConfig(source=str(tmp_path / each), num_samples=4, seq_len=16), loaded, 0).tokens
        for each in ("part.jsonl", name)
    )
    assert torch.equal(plain, packed)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-9],
    "not compressed": lambda data: b"no gzip",
    "other bytes inside": lambda data: data[:20] + b"x" * 40,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_compressed_file_is_refused(damage: str, tmp_path: Path, loaded: LoadedModel) -> None:
    write(tmp_path / "part.json.gz", DOCUMENTS)
    (tmp_path / "part.json.gz").write_bytes(DAMAGES[damage]((tmp_path / "part.json.gz").read_bytes()))
    data = DataConfig(source=str(tmp_path / "part.json.gz"), num_samples=100, seq_len=100)
    with pytest.raises(InputError, match=r"part\.json\.gz cannot be read"):
        windows.calibration(data, loaded, 0)
