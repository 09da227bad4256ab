"""A file of text that cannot be used is refused with the place of the fault, never by an error of a library."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from pydantic import ValidationError

from qtool.config.sections import DataConfig
from qtool.data import readers, sources, windows
from qtool.models.loaded import LoadedModel
from qtool.system.errors import InputError


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny.with_builtin_tokenizer(0, 64)


def refuse(source: Path | str, loaded: LoadedModel, match: str, num_samples: int = 2) -> None:
    data = DataConfig(source=str(source), num_samples=num_samples, seq_len=16)
    with pytest.raises(InputError, match=match):
        windows.calibration(data, loaded, 0)


LINES = {
    "[" * 100_000: "line 2 is nested too deeply",
    '{"a":' + "[" * 200_000: "line 2 is nested too deeply",
    '{"text": ' + "9" * 5000 + "}": "line 2 is not JSON that can be used: Exceeds the limit",
    '{"text": "the river \\ud800 runs"}': r"line 2: character 10 of the text is \\ud800, half of a surrogate pair",
    '{"text": 3}': "line 2 has the fields text; a field 'text' with a string was expected",
    "[]": "line 2 holds a list",
    "{": "line 2 is not JSON",
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:12])
def test_a_row_that_is_no_text_is_refused_with_its_line(loaded: LoadedModel, tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "The river runs."}) + "\n" + line + "\n")
    refuse(tmp_path / "a.jsonl", loaded, rf"a\.jsonl: {LINES[line]}")


def messages(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


ROWS = {
    messages(("assistant", "The Po.")): "line 1: the conversation has answers only; a question before them",
    messages(("user", "Which?"), ("assistant", "\ud800")): r"line 1: character 0 of the text is \\ud800",
    messages(("user", "Which?"), ("assistant\ud800", "The Po.")): r"line 1: character 9 of the text is \\ud800",
    json.dumps({"instruction": "\udfff", "output": "The Po."}): r"line 1: character 0 of the text is \\udfff",
    json.dumps({"messages": [[]]}): r"line 1: a message is \[\]",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:40])
def test_a_row_that_is_no_conversation_is_refused_with_its_line(loaded: LoadedModel, tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(row + "\n")
    refuse(tmp_path / "a.jsonl", loaded, rf"a\.jsonl: {ROWS[row]}")


def test_whole_surrogate_pairs_are_text(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a river \\ud83d\\ude00"}\n' * 20)
    data = DataConfig(source=str(tmp_path / "a.jsonl"), num_samples=2, seq_len=16)
    assert windows.calibration(data, loaded, 0).tokens.shape == (2, 16)


def test_a_line_without_end_is_refused(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 1_000_000)
    (tmp_path / "a.txt").write_text("river\n" + "a" * 1_000_001)
    refuse(tmp_path / "a.txt", loaded, r"a\.txt: line 2 is longer than 1 MB; break the text into lines")


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "nested": lambda whole: b"\x93NUMPY\x01\x00\x1c\x00{'descr': '<i8', 'shape': ((\n" + whole,
    "more than the file has": lambda whole: whole.replace(b"(2, 16)", b"(9**9,)"),
    "longer than the file": lambda whole: whole.replace(b"(2, 16), }        ", b"(99999999999, 9), }"),
    "cut": lambda whole: whole[:40],
    "no header": lambda whole: b"\x93NUMPY",
    "another version": lambda whole: whole[:6] + b"\x09" + whole[7:],
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_token_file_with_a_damaged_header_is_refused(loaded: LoadedModel, tmp_path: Path, fault: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 16), dtype=np.int64))
    damaged = HEADERS[fault]((tmp_path / "a.npy").read_bytes())
    (tmp_path / "a.npy").write_bytes(damaged)
    refuse(tmp_path / "a.npy", loaded, r"a\.npy cannot be read as one NumPy array of integers")


def test_more_windows_than_memory_holds_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ValidationError, match="num_samples times seq_len is 34,359,738,352 tokens"):
        DataConfig(num_samples=2**31 - 1, seq_len=16)
    with pytest.raises(InputError, match=r"eval\.limit is 10000000000000: so many windows"):
        windows.perplexity_windows("generated", loaded, 16, 10**13, 0)


@pytest.mark.parametrize("source", ["~nosuchuser/a.txt", "a" * 300 + ".txt"])
def test_a_name_that_no_file_can_have_is_refused(source: str) -> None:
    with pytest.raises(InputError, match=r"^data\.source: "):
        sources.check_source(DataConfig(source=source))


@pytest.mark.parametrize("source", ["a\0b.txt", "\ud800.txt"])
def test_a_text_that_no_name_can_hold_is_refused_with_the_recipe(source: str) -> None:
    with pytest.raises(ValidationError, match=r"no name or path can hold|is no character"):
        DataConfig(source=source)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"a\.txt is a FIFO"):
        sources.check_source(DataConfig(source=str(tmp_path / "a.txt")))
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"b\.txt is a device"):
        sources.check_source(DataConfig(source=str(tmp_path / "b.txt")))
    (tmp_path / "c.txt").symlink_to("c.txt")
    with pytest.raises(InputError, match=r"data\.source: "):
        sources.check_source(DataConfig(source=str(tmp_path / "c.txt")))


def test_text_that_the_tokenizer_cannot_encode_is_refused(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("WordPiece error: Missing [UNK] token\nmore")

    monkeypatch.setattr(type(loaded.tokenizer), "__call__", fail)
    (tmp_path / "a.txt").write_text("river " * 99)
    refuse(tmp_path / "a.txt", loaded, "the tokenizer of this model cannot encode it: WordPiece error")
    refuse("generated", loaded, "the tokenizer of this model cannot encode it: WordPiece error")
