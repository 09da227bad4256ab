"""A token without a row in the embedding table is refused with its text, its id and the size of the table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny

from qtool.config.sections import DataConfig, EvalConfig
from qtool.data import generated, windows
from qtool.data.generated import generated_tokens
from qtool.data.vocabulary import check_ids, checked_ids
from qtool.evaluation import tasks
from qtool.models.loaded import LoadedModel
from qtool.system.errors import InputError

ADDED = "<|im_start|>"
REFUSED = rf"token 4096 \('{ADDED}'\) has no row in the embedding table of tiny-0, which has 4096 rows".replace(
    "|", r"\|"
)


@pytest.fixture
def loaded() -> LoadedModel:
    """A model of 4096 tokens whose tokenizer has one more."""
    found = tiny.with_builtin_tokenizer(0, 64)
    found.tokenizer.add_special_tokens({"additional_special_tokens": [ADDED]})
    assert len(found.tokenizer) == found.num_embeddings + 1
    return found


def calibrated(path: Path, loaded: LoadedModel) -> torch.Tensor:
    return windows.calibration(DataConfig(source=str(path), num_samples=2, seq_len=16), loaded, 0).tokens


def test_in_plain_text(loaded: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "chat.txt"
    file.write_text(f"{ADDED}user said hello to the river. " * 20)
    with pytest.raises(InputError, match=f"chat.txt: {REFUSED}"):
        calibrated(file, loaded)
    file.write_text("user said hello to the river. " * 20)
    assert calibrated(file, loaded).shape == (2, 16)


def test_in_a_conversation_and_its_chat_template(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.tokenizer.chat_template = "{% for m in messages %}" + ADDED + "{{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Po in Italy. " * 9}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    data = DataConfig(source=str(tmp_path / "chat.jsonl"), num_samples=1, seq_len=16)
    with pytest.raises(InputError, match=f"chat.jsonl: {REFUSED}"):
        windows.calibration(data, loaded, 0)


@pytest.mark.parametrize(("token", "match"), [(4096, "is token 4096"), (-1, "is token -1")])
def test_in_a_token_file_beyond_the_table_whatever_the_config_says(
    loaded: LoadedModel, tmp_path: Path, token: int, match: str
) -> None:
    loaded.model.config.vocab_size = 5000
    np.save(tmp_path / "a.npy", np.full((2, 16), token))
    with pytest.raises(InputError, match=match):
        calibrated(tmp_path / "a.npy", loaded)


def test_in_text_that_the_model_writes(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert int(generated_tokens(loaded, 2, 12, 0).max()) < loaded.num_embeddings
    loaded.tokenizer.add_special_tokens({"bos_token": ADDED})
    monkeypatch.setattr(generated, "tokenized", lambda *_: {"input_ids": [4096]})  # as if it began every text
    with pytest.raises(InputError, match=f"the token that begins every text: {REFUSED}"):
        generated_tokens(loaded, 2, 12, 0)


@pytest.mark.parametrize("name", ["wikitext2", "kl"])
def test_in_evaluation_text(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(windows, "source_texts", lambda *_: iter([f"{ADDED}The river runs. " * 40]))
    with pytest.raises(InputError, match=f"the text of wikitext2: {REFUSED}"):
        tasks.evaluate(loaded, EvalConfig(tasks=(name,), context=16), tiny.with_builtin_tokenizer(0, 64), 0)


def test_in_text_that_only_the_float_model_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    larger, smaller = tiny.with_builtin_tokenizer(0, 64), tiny.with_builtin_tokenizer(1, 64)
    larger.model.resize_token_embeddings(4200)
    larger.tokenizer.add_tokens([ADDED])
    monkeypatch.setattr(windows, "source_texts", lambda *_: iter([f"{ADDED}The river runs. " * 40]))
    with pytest.raises(InputError, match="embedding table of tiny-1, which has 4096 rows"):
        tasks.evaluate(larger, EvalConfig(tasks=("wikitext2",), context=16), smaller, 0)
    monkeypatch.setattr(windows, "source_texts", lambda *_: iter(["The river runs. " * 40]))
    assert tasks.evaluate(larger, EvalConfig(tasks=("wikitext2",), context=16), smaller, 0)[0].value
    with pytest.raises(InputError, match="kl: tiny-0 has 4200 tokens, and its float model tiny-1 has 4096"):
        tasks.evaluate(larger, EvalConfig(tasks=("kl",), context=16), smaller, 0)


def test_in_text_that_other_code_tokenizes(loaded: LoadedModel) -> None:
    """It is so within lm-eval, where prompts and padding come from its own code."""
    with checked_ids(loaded, "the text of boolq"):
        loaded.model(torch.tensor([[1, 4095]]))
        with pytest.raises(InputError, match=f"the text of boolq: {REFUSED}"):
            loaded.model(torch.tensor([[1, 4096]]))
    assert not loaded.model.get_input_embeddings()._forward_pre_hooks


def test_a_token_that_the_tokenizer_does_not_know_is_refused_without_its_text(loaded: LoadedModel) -> None:
    with pytest.raises(InputError, match="data: token 9999 has no row"):
        check_ids(torch.tensor([[3, 9999]]), loaded, "data")
    with pytest.raises(InputError, match="data: token -7 has no row"):
        check_ids(torch.tensor([[3, -7]]), loaded, "data")
    check_ids(torch.empty(0, 4, dtype=torch.int64), loaded, "data")
