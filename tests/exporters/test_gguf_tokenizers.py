"""``gguf``: tokenizers that llama.cpp would read otherwise are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny, vocabularies
from helpers.native_checkpoints import Natives, exported

from qtool.checkpoints.files import write_json
from qtool.system.errors import InputError

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


def refusal(folder: Path, out: Path) -> str:
    with pytest.raises(InputError) as error:
        exported(folder, "gguf", out)
    return str(error.value)


def tokenizer_with(folder: Path, change: Callable[[Any], object]) -> Path:
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    change(found)
    write_json(file, found)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.update(pre_tokenizer={"type": "Whitespace"}),
        lambda found: found["pre_tokenizer"].update(add_prefix_space=True),
        lambda found: found["model"].update(ignore_merges=True),
        lambda found: found.update(normalizer={"type": "Lowercase"}),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(
    change: Callable[[Any], object], native: Natives, tmp_path: Path
) -> None:
    folder = tokenizer_with(tiny.copied(native(), tmp_path / "q"), change)
    assert "its tokenizer prepares text in a way that has no known name in llama.cpp" in refusal(
        folder, tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda bpe: bpe["merges"].reverse(), "merges are not in the order of the tokens that they make"),
        (lambda bpe: bpe["merges"].pop(), "its tokenizer does not merge"),
    ],
)
def test_merges_that_llama_cpp_would_make_otherwise_are_refused(
    change: Callable[[Any], object], words: str, native: Natives, tmp_path: Path
) -> None:
    folder = tiny.copied(native(), tmp_path / "q")
    vocabularies.save("sentencepiece", folder)
    assert words in refusal(tokenizer_with(folder, lambda found: change(found["model"])), tmp_path / "out")


def test_tokens_beyond_the_embedding_are_refused(native: Natives, tmp_path: Path) -> None:
    def add(found: dict[str, list[dict[str, object]]]) -> None:
        found["added_tokens"].append({**found["added_tokens"][0], "id": 400, "content": "<x>"})

    folder = tokenizer_with(tiny.copied(native(), tmp_path / "q"), add)
    assert "and its embedding 320 rows" in refusal(folder, tmp_path / "out")
