"""Windows of tokens: their content, their order, and the errors when there is no text."""

import dataclasses
import hashlib
import json
import lzma
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qtool.config.sections import DataConfig
from qtool.data import hub, readers, sources
from qtool.data import windows as calibration_windows
from qtool.data.generated import generated_tokens
from qtool.data.hub import UnreachableError
from qtool.models.loaded import LoadedModel
from qtool.system.errors import InputError

ENGLISH = "The river runs through the old town, and the mill by the bridge is still used in autumn.\n"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A tiny random Llama with the tokenizer of the built-in model."""
    return tiny.with_builtin_tokenizer(0, 128)


@pytest.fixture
def no_local_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_DATA_DIR", "")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the hub unreachable on every machine."""
    monkeypatch.setattr(hub, "hub_answers", lambda: False)


def config(source: str | Path, num_samples: int = 4, seq_len: int = 32) -> DataConfig:
    return DataConfig(source=str(source), num_samples=num_samples, seq_len=seq_len)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flat(loaded: LoadedModel, *documents: str) -> list[int]:
    """Return the tokens that the windows must hold, in order: each document followed by the end token."""
    tokenizer = loaded.tokenizer
    return [i for text in documents for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


# ------------------------------------------------------------------------------------------------ windows


def test_windows_are_consecutive_disjoint_and_shuffled_only_in_order(loaded: LoadedModel, tmp_path: Path) -> None:
    documents = [ENGLISH * (i + 1) + str(i) for i in range(8)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    windows = calibration_windows.calibration(config(path, 6, 32), loaded, seed=0).tokens
    assert windows.dtype == torch.int64
    expected = torch.tensor(flat(loaded, *documents)[: 6 * 32]).view(6, 32)
    assert sorted(windows.tolist()) == sorted(expected.tolist())
    assert windows.tolist() != expected.tolist()
    again = calibration_windows.calibration(config(path, 6, 32), loaded, seed=0).tokens
    other = calibration_windows.calibration(config(path, 6, 32), loaded, seed=1).tokens
    assert torch.equal(windows, again)
    assert not torch.equal(windows, other)
    assert sorted(windows.tolist()) == sorted(other.tolist())


@pytest.fixture
def beginning(loaded: LoadedModel) -> LoadedModel:
    """The model of ``loaded``, with a tokenizer that begins every text with token 1."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.BUILTIN, bos_token="!")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="!:0 $A", special_tokens=[("!", 1)])
    return dataclasses.replace(loaded, tokenizer=tokenizer, path="tiny")


def test_a_tokenizer_that_adds_special_tokens_gets_no_end_token_from_us(beginning: LoadedModel, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three four"}] * 8)
    tokens = calibration_windows.calibration(config(path, 1, 16), beginning, seed=0).tokens[0].tolist()
    assert tokens[0] == 1
    assert tokens.count(1) > 1
    assert beginning.tokenizer.eos_token_id not in tokens


def test_windows_of_text_begin_with_bos_if_asked(
    beginning: LoadedModel, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ENGLISH}] * 40)
    plain = calibration_windows.calibration(config(path, 6, 31), beginning, seed=0).tokens
    asked = config(path, 6, 32).model_copy(update={"bos": True})
    begun = calibration_windows.calibration(asked, beginning, seed=0).tokens
    assert torch.equal(begun, torch.cat([torch.full((6, 1), 1), plain], 1))

    monkeypatch.setenv("QTOOL_DATA_DIR", str(tmp_path))
    (tmp_path / "wikitext2").mkdir()
    write_jsonl(tmp_path / "wikitext2/test.jsonl", [{"text": ENGLISH}] * 20)
    short = calibration_windows.perplexity_windows("wikitext2", beginning, 31, 3, 0)
    long = calibration_windows.perplexity_windows("wikitext2", beginning, 32, 3, 0, True)
    assert torch.equal(long, torch.cat([torch.full((3, 1), 1), short], 1))
    generated = (
        calibration_windows.perplexity_windows("generated", loaded, 16, 2, 0, begin) for begin in (True, False)
    )
    assert torch.equal(*generated)


def test_bos_is_refused_where_there_is_none_or_windows_begin_otherwise(
    loaded: LoadedModel, beginning: LoadedModel, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ENGLISH}] * 40)
    asked = config(path, 2, 32).model_copy(update={"bos": True})
    without = AutoTokenizer.from_pretrained(tiny.BUILTIN, bos_token=None)
    with pytest.raises(InputError, match=r"has no BOS token; set data\.bos to false"):
        calibration_windows.calibration(asked, dataclasses.replace(loaded, tokenizer=without), seed=0)
    with pytest.raises(InputError, match=r"data\.bos is true, but text that the model writes itself"):
        calibration_windows.calibration(asked.model_copy(update={"source": "generated"}), beginning, seed=0)


def test_joined_rows_begin_once(beginning: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(calibration_windows, "CHARACTERS_PER_BATCH", 100)
    (tmp_path / "wikitext2").mkdir()
    write_jsonl(tmp_path / "wikitext2/train.jsonl", [{"text": ENGLISH}] * 20)
    tokens = calibration_windows.calibration(config("wikitext2", 4, 32), beginning, seed=0).tokens
    assert (tokens == 1).sum() == 1


def test_generated_text_begins_as_the_tokenizer_begins_texts(beginning: LoadedModel, loaded: LoadedModel) -> None:
    assert (generated_tokens(beginning, 4, 8, seed=0)[:, 0] == 1).all()
    assert len(set(generated_tokens(loaded, 4, 8, seed=0)[:, 0].tolist())) > 1


def test_no_more_of_a_file_is_read_than_is_needed(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"text": ENGLISH}) + "\n") * 50 + "not json\n")
    assert calibration_windows.calibration(config(path, 2, 8), loaded, seed=0).tokens.shape == (2, 8)


def test_text_files_hold_documents_parted_by_three_newlines(loaded: LoadedModel, tmp_path: Path) -> None:
    text = "\n\n\n".join(["One.\n\nTwo lines.", "\n\n", "Second."])
    plain = tmp_path / "a.txt"
    plain.write_text(text, encoding="utf-8")
    packed = tmp_path / "a.txt.xz"
    packed.write_bytes(lzma.compress(text.encode()))
    for path in (plain, packed):
        assert [d for d in readers.read_file(path) if d] == ["One.\n\nTwo lines.", "Second."]


def test_the_three_kinds_of_files_give_the_same_windows(loaded: LoadedModel, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    documents = [ENGLISH.strip() * (i + 1) for i in range(4)]
    (tmp_path / "a.txt").write_text("\n\n\n".join(documents))
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in documents])
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    hashes = {
        calibration_windows.token_hash(
            calibration_windows.calibration(config(tmp_path / f"a{suffix}"), loaded, seed=3).tokens
        )
        for suffix in (".txt", ".jsonl", ".parquet")
    }
    assert len(hashes) == 1


def test_rows_of_wikitext2_are_one_text_joined_by_two_newlines(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTOOL_DATA_DIR", str(tmp_path))
    (tmp_path / "wikitext2").mkdir()
    rows = ["", " = Title = \n", "", *([" " + ENGLISH] * 20)]
    write_jsonl(tmp_path / "wikitext2/train.jsonl", [{"text": row} for row in rows])
    write_jsonl(tmp_path / "wikitext2/test.jsonl", [{"text": row} for row in rows])
    expected = loaded.tokenizer("\n\n".join(rows))["input_ids"]
    test = calibration_windows.perplexity_windows("wikitext2", loaded, 32, None, seed=0)
    assert test.flatten().tolist() == expected[: len(expected) // 32 * 32]
    assert torch.equal(calibration_windows.perplexity_windows("wikitext2", loaded, 32, 3, seed=0), test[:3])
    write_jsonl(tmp_path / "wikitext2/test.jsonl", [{"text": "short"}])
    with pytest.raises(InputError, match=r"less than one window of 32; lower eval\.context"):
        calibration_windows.perplexity_windows("wikitext2", loaded, 32, None, seed=0)
    monkeypatch.setattr(calibration_windows, "CHARACTERS_PER_BATCH", 100)  # the text is tokenized in many pieces
    train = calibration_windows.calibration(config("wikitext2", 4, 32), loaded, seed=0).tokens
    assert sorted(train.tolist()) == sorted(test[:4].tolist())


def test_the_hash_depends_on_shape_and_values() -> None:
    tokens = torch.arange(12).view(3, 4)
    expected = hashlib.sha256(b"(3, 4)" + struct.pack("<12q", *range(12))).hexdigest()
    assert calibration_windows.token_hash(tokens) == calibration_windows.token_hash(tokens.int()) == expected
    assert calibration_windows.token_hash(tokens) != calibration_windows.token_hash(tokens.view(4, 3))
    assert calibration_windows.token_hash(tokens) != calibration_windows.token_hash(tokens + 1)


@pytest.mark.usefixtures("data_dir")
def test_shared_sources_give_windows_of_english(loaded: LoadedModel) -> None:
    for source in ("enwiki", "wikitext2"):
        windows = calibration_windows.calibration(config(source, 8, 64), loaded, seed=0).tokens
        assert windows.shape == (8, 64)
        assert " the " in loaded.tokenizer.decode(windows.flatten())


def test_wikitext2_has_417_windows_of_1024_of_the_built_in_tokenizer(
    loaded: LoadedModel, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (data_dir / "wikitext2/test.jsonl").exists():
        pytest.skip("no wikitext2/test.jsonl below QTOOL_DATA_DIR")
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 1024)
    assert calibration_windows.perplexity_windows("wikitext2", loaded, 2048, None, seed=0).shape == (417, 1024)


# ---------------------------------------------------------------------------------------------- bad input


def fault(source: str | Path, loaded: LoadedModel, num_samples: int = 4, seq_len: int = 32) -> str:
    with pytest.raises(InputError) as caught:
        calibration_windows.calibration(config(source, num_samples, seq_len), loaded, seed=0)
    return str(caught.value)


def test_an_unknown_source_is_told_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"'wikitxt2'.*generated, wikitext2, enwiki, c4.*did you mean wikitext2\?"):
        sources.check_source(config("wikitxt2"))


@pytest.mark.usefixtures("no_local_data")
def test_known_sources_pass_the_cheap_check_without_being_read() -> None:
    for source in ("generated", "wikitext2", "enwiki", "c4"):
        sources.check_source(config(source))


def test_a_file_that_does_not_exist_is_named() -> None:
    with pytest.raises(InputError, match=r"there is no file .*nowhere\.jsonl"):
        sources.check_source(config("nowhere.jsonl"))


def test_a_suffix_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(InputError, match=r"suffix.*\.txt, \.txt\.xz, \.jsonl, \.jsonl\.gz, \.json\.gz, \.parquet"):
        sources.check_source(config(tmp_path / "a.csv"))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        sources.check_source(config(tmp_path / "a.txt"))


def test_an_empty_file_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert "is empty" in fault(tmp_path / "a.txt", loaded)
    (tmp_path / "a.txt").write_text("\n \n\n\n")
    assert "no text was found" in fault(tmp_path / "a.txt", loaded)


def test_too_little_text_is_told_in_numbers(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(ENGLISH * 5)
    num_tokens = len(flat(loaded, (ENGLISH * 5).strip()))
    message = fault(tmp_path / "a.txt", loaded, 40, 32)
    assert f"{num_tokens // 32} window(s) of 32 tokens were found ({num_tokens} tokens in 1 text(s))" in message
    assert "40 are needed (1280 tokens)" in message
    assert f"lower data.num_samples to {num_tokens // 32}" in message


def test_windows_longer_than_the_context_are_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(ENGLISH)
    for source in (tmp_path / "a.txt", "generated"):
        assert "lower it to 128" in fault(source, loaded, 1, 129)


def test_text_that_is_not_utf8_is_told_with_line_and_byte(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"first line\nsecond \xe9 line\n")
    message = fault(tmp_path / "a.txt", loaded)
    assert "line 2, byte 18 of the file is 0xe9" in message


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext\n")
    assert list(readers.read_file(tmp_path / "a.txt")) == ["text"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"', "line 2 is not JSON"),
        ('["a"]', "line 2 holds a list"),
        (
            '{"content": "a"}',
            "has the fields content; a field 'text' with a string was expected, or for a conversation 'messages'",
        ),
        ('{"text": 3}', "line 2 has the fields text"),
    ],
)
def test_a_bad_line_of_json_is_told_with_its_number(
    loaded: LoadedModel, tmp_path: Path, line: str, expected: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert expected in fault(tmp_path / "a.jsonl", loaded)


def test_bad_parquet_is_told(loaded: LoadedModel, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), path)
    assert "has the columns content; a column 'text' was expected" in fault(path, loaded)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert "row 1 of 'text' is None" in fault(path, loaded)
    path.write_bytes(b"PAR1 no more")
    assert "cannot be read as parquet" in fault(path, loaded)


def test_a_damaged_xz_file_is_told(loaded: LoadedModel, tmp_path: Path) -> None:
    packed = lzma.compress((ENGLISH * 100).encode())
    (tmp_path / "a.txt.xz").write_bytes(packed[: len(packed) // 2])
    assert "cannot be read" in fault(tmp_path / "a.txt.xz", loaded)


@pytest.mark.parametrize("source", ["wikitext2", "enwiki", "c4"])
@pytest.mark.usefixtures("no_local_data", "no_hub")
def test_an_unreachable_hub_is_told_with_the_ways_around_it(loaded: LoadedModel, source: str) -> None:
    with pytest.raises(UnreachableError, match=r"hub.*\$QTOOL_DATA_DIR/" + source + ".*file of your own"):
        calibration_windows.calibration(config(source), loaded, seed=0)


@pytest.mark.usefixtures("no_hub")
def test_the_libraries_are_offline_only_while_the_hub_does_not_answer() -> None:
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with hub.hub_access():
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert before == constants.HF_HUB_OFFLINE


def test_a_data_folder_that_does_not_exist_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QTOOL_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"QTOOL_DATA_DIR is .*nowhere"):
        sources.data_dir()


def test_without_the_variable_there_is_no_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "shared/data").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for value in (None, ""):
        monkeypatch.delenv("QTOOL_DATA_DIR", raising=False) if value is None else monkeypatch.setenv(
            "QTOOL_DATA_DIR", value
        )
        assert sources.data_dir() is None
