"""Conversations: which tokens are learned, how conversations fill windows, and which methods get the labels."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.records import locked
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qtool.blocks.job import Job, Method, Result
from qtool.checkpoints.output_folder import OutputFolder
from qtool.config.recipe import Recipe
from qtool.config.sections import IGNORED, DataConfig
from qtool.data import conversations, sources, windows
from qtool.data.conversations import encode, messages_of, pack
from qtool.methods import rtn
from qtool.models import chat_template
from qtool.models.loaded import LoadedModel
from qtool.pipelines import quantize
from qtool.pipelines.run_state import RunState
from qtool.system import progress
from qtool.system.errors import InputError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{{ m.content }}<|end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)
TWO_TURNS = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Po."},
    {"role": "user", "content": "And a town on it?"},
    {"role": "assistant", "content": "Turin, of course."},
]


def tokenizer(template: str | None = None, **special: str) -> Any:
    made = AutoTokenizer.from_pretrained(tiny.BUILTIN, **special)
    made.chat_template = template
    return made


TOKENIZER = tokenizer(CHATML)


def learned(tokens: list[int], mask: list[bool], by: Any = TOKENIZER) -> str:
    return str(by.decode([token for token, is_learned in zip(tokens, mask, strict=True) if is_learned]))


def qa(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ one conversation


def test_tokens_are_those_of_the_chat_template_and_answers_with_their_end_mark_are_learned() -> None:
    tokens, mask = encode(TWO_TURNS, TOKENIZER, "here")
    assert tokens == TOKENIZER.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)
    assert learned(tokens, mask) == "The Po.<|end|>\nTurin, of course.<|end|>\n"


def test_without_a_template_the_plain_format_is_used_and_the_end_of_text_is_learned() -> None:
    plain = tokenizer()
    tokens, mask = encode(TWO_TURNS, plain, "here")
    end = plain.eos_token
    assert plain.decode(tokens) == (
        f"### User:\nName a river.\n\n### Assistant:\nThe Po.{end}\n\n"
        f"### User:\nAnd a town on it?\n\n### Assistant:\nTurin, of course.{end}"
    )
    assert tokens.count(plain.eos_token_id) == 2
    assert learned(tokens, mask, plain) == f"The Po.{end}Turin, of course.{end}"


def test_the_plain_format_begins_as_the_tokenizer_begins_texts_and_a_template_decides_itself() -> None:
    plain = tokenizer(bos_token="!")
    plain._tokenizer.post_processor = TemplateProcessing(single="!:0 $A", special_tokens=[("!", 1)])
    tokens, mask = encode(TWO_TURNS, plain, "here")
    assert tokens.count(1) == 1
    assert (tokens[0], mask[0]) == (1, False)
    plain.chat_template = CHATML
    assert 1 not in encode(TWO_TURNS, plain, "here")[0]


def test_an_answer_that_the_template_shortens_once_others_follow_is_context() -> None:
    thinking = tokenizer(
        CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else m.content[:3] }}")
    )
    assert learned(*encode(TWO_TURNS, thinking, "here")) == "Turin, of course.<|end|>\n"


def test_thoughts_that_a_template_opens_before_an_answer_are_not_taken_for_a_part_of_it() -> None:
    opened = tokenizer(
        CHATML.replace("<|assistant|>{{ '\n' }}{% endif %}", "<|assistant|>{{ '\n' }}<think>{% endif %}")
    )
    assert learned(*encode(TWO_TURNS, opened, "here")) == "The Po.<|end|>\nTurin, of course.<|end|>\n"


def test_a_template_that_rewrites_the_beginning_is_refused() -> None:
    counting = tokenizer("{{ messages | length }}" + CHATML)
    with pytest.raises(InputError, match="changes what came before an answer"):
        encode(TWO_TURNS, counting, "here")


def test_templates_that_print_the_day_give_the_same_tokens_every_day() -> None:
    dated = tokenizer("{{ date_string if date_string else strftime_now('%f') }}" + CHATML)
    assert dated.decode(encode(TWO_TURNS, dated, "here")[0]).startswith(chat_template.DATE)


def test_what_a_template_refuses_is_told_with_its_place() -> None:
    strict = tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"a\.jsonl: line 3: the chat template .* refuses .*roles must alternate"):
        encode(TWO_TURNS, strict, "a.jsonl: line 3")


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TOKENIZER), "is_fast", False)
    with pytest.raises(InputError, match="a slow one"):
        encode(TWO_TURNS, TOKENIZER, "here")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (qa("Why?", "So."), [("user", "Why?"), ("assistant", "So.")]),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, [("user", "Add.\n\n1, 2"), ("assistant", "3")]),
        ({"instruction": "Go.", "input": "", "output": "", "text": "x"}, [("user", "Go."), ("assistant", "")]),
        ({"instruction": "Go.", "output": "Gone."}, [("user", "Go."), ("assistant", "Gone.")]),
        (
            {"conversations": [{"from": "gpt", "value": "Hi."}, {"from": "human", "value": "Go."}], "messages": None},
            [("user", "Go.")],
        ),
    ],
)
def test_three_shapes_of_rows_are_read(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert conversations.is_conversation(row)
    assert [(m["role"], m["content"]) for m in messages_of(row, "here")] == expected


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"instruction": "Go.", "input": 3, "output": "x"}, "line 7: texts 'instruction' and 'output'.* were expected"),
        ({"instruction": "Go."}, "line 7: texts 'instruction' and 'output'.* were expected"),
        ({"messages": []}, "line 7 has no conversation"),
        ({"text": "x"}, "line 7 has no conversation"),
        ({"messages": ["x"]}, "line 7: a message is 'x'; texts 'role' and 'content' were expected"),
        ({"conversations": [{"from": "gpt"}]}, "line 7: a message is .*; texts 'from' and 'value' were expected"),
    ],
)
def test_other_rows_are_told_with_their_place(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        messages_of(row, "line 7")


# ---------------------------------------------------------------------------------------------------- windows


def placed(rows: list[dict[str, Any]]) -> Any:
    return iter([(f"row {number}", row) for number, row in enumerate(rows)])


def encoded(rows: list[dict[str, Any]]) -> list[tuple[list[int], list[bool]]]:
    return [encode(messages_of(row, ""), TOKENIZER, "") for row in rows]


_text = st.text("abc de.\n", min_size=1, max_size=60)


@given(pairs=st.lists(st.tuples(_text, _text), min_size=1, max_size=12), length=st.integers(4, 80))
def test_windows_are_whole_conversations_from_their_beginning_and_only_the_last_is_cut(
    pairs: list[tuple[str, str]], length: int
) -> None:
    rows = [qa(*pair) for pair in pairs]
    packed = pack(placed(rows), TOKENIZER, 3, length)
    assert packed.tokens.shape == packed.labels.shape
    whole = encoded(rows)
    expected: list[tuple[list[int], list[int]]] = []
    while whole:
        ids: list[int] = []
        mask: list[bool] = []
        while len(ids) < length and whole:
            more = whole.pop(0)
            ids, mask = ids + more[0], mask + more[1]
        if len(ids) >= length and any(mask[1:length]):
            cut = zip(ids[:length], mask[:length], strict=True)
            expected.append((ids[:length], [token if is_learned else IGNORED for token, is_learned in cut]))
    assert packed.tokens.tolist() == [tokens for tokens, _ in expected[:3]]
    assert packed.labels.tolist() == [labels for _, labels in expected[:3]]


def test_no_answer_is_learned_without_its_question_and_no_border_is_learned() -> None:
    rows = [qa("Question?", "An answer. " * 9)] * 40
    packed = pack(placed(rows), TOKENIZER, 8, 140)
    border = len(encoded(rows)[0][0])  # where the second conversation of a window begins
    assert border < 140 < 2 * border
    for tokens, labels in zip(packed.tokens, packed.labels, strict=True):
        assert TOKENIZER.decode(tokens).startswith("<|user|>\nQuestion?")
        assert labels[border - 1] == tokens[border - 1]
        assert labels[border] == IGNORED


def test_windows_in_which_nothing_is_learned_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [qa("Why? " * 99, "So."), qa("Go?", "Yes. " * 99)]
    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "note", notes.append)
        packed = pack(placed(rows), TOKENIZER, 2, 32)
    assert packed.tokens.shape == (1, 32)
    assert packed.num_conversations == 2
    assert notes == ["1 window(s) of 32 tokens were left out: no answer begins in them"]
    assert (packed.labels[:, 1:] != IGNORED).any(1).all()


# ----------------------------------------------------------------------------------------------- as a source


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny.with_builtin_tokenizer(0, 128)


def config(source: object, num_samples: int = 4, seq_len: int = 32) -> DataConfig:
    return DataConfig(source=str(source), num_samples=num_samples, seq_len=seq_len)


ROWS = [qa(f"Question number {i}?", f"Answer {i}, and no more than that, whatever is asked.") for i in range(60)]


def test_a_local_file_of_conversations_is_packed_and_its_order_fixed_by_the_seed(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    first = windows.calibration(config(path), loaded, 0)
    assert first.labels is not None
    assert first.tokens.shape == first.labels.shape == (4, 32)
    assert torch.equal(first.labels.where(first.labels != IGNORED, first.tokens), first.tokens)
    again, other = (windows.calibration(config(path), loaded, seed) for seed in (0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    order = [first.tokens.tolist().index(row) for row in other.tokens.tolist()]
    assert other.labels is not None
    assert torch.equal(first.labels[order], other.labels)
    assert torch.equal(windows.calibration(config(path), loaded, 0).tokens, first.tokens)


def test_parquet_gives_the_same_conversations(loaded: LoadedModel, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    from_json = windows.calibration(config(write(tmp_path / "a.jsonl", ROWS)), loaded, 0)
    from_parquet = windows.calibration(config(tmp_path / "a.parquet"), loaded, 0)
    assert windows.token_hash(*from_json) == windows.token_hash(*from_parquet)


@pytest.mark.parametrize("name", ["alpaca", "deita"])
def test_named_sources_are_read_from_the_data_folder_and_else_from_the_hub(
    name: str, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}, {i}."} for i in range(90)]
    if name == "deita":
        rows = [
            {"conversations": [{"from": "human", "value": f"Say {i}."}, {"from": "gpt", "value": f"{i}, {i}."}]}
            for i in range(90)
        ]
    (tmp_path / name).mkdir()
    write(tmp_path / name / "train.jsonl", rows)
    monkeypatch.setenv("QTOOL_DATA_DIR", str(tmp_path))
    local = windows.calibration(config(name), loaded, 0)
    asked = []

    def hub(*args: object) -> Any:
        asked.append(args)
        return iter(rows)

    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    monkeypatch.setattr(sources, "load_hub", hub)
    remote = windows.calibration(config(name), loaded, 0)
    assert asked == [(sources.SOURCES[name].hub, "train")]
    assert windows.token_hash(*local) == windows.token_hash(*remote)


def test_too_few_conversations_are_told_in_numbers(loaded: LoadedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:4])
    with pytest.raises(
        InputError, match=r"window\(s\) of 32 tokens were found in 4 conversation\(s\), and 99 are needed"
    ):
        windows.calibration(config(path, 99), loaded, 0)


def test_a_row_without_a_conversation_is_told_with_its_line(loaded: LoadedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0], {"text": "x"}])
    with pytest.raises(InputError, match=r"a\.jsonl: line 2 has no conversation"):
        windows.calibration(config(path), loaded, 0)


def test_the_hash_depends_on_the_labels() -> None:
    tokens = torch.arange(12).view(3, 4)
    labels = tokens.clone()
    labels[0, 0] = IGNORED
    hashes = {windows.token_hash(tokens), windows.token_hash(tokens, tokens), windows.token_hash(tokens, labels)}
    assert len(hashes) == 3


# ------------------------------------------------------------------------------------------------- in a run


def test_a_run_goes_on_only_with_the_same_labels(tmp_path: Path) -> None:
    state = RunState(OutputFolder(tmp_path / "out"), locked())
    state.folder.mkdir(parents=True)
    tokens = torch.arange(12).view(3, 4)
    labels = tokens.clone()
    labels[0, 0] = IGNORED
    state.keep_tokens(tokens, labels)
    state.keep_tokens(tokens, labels)
    for other in (None, tokens):
        with pytest.raises(InputError, match="the calibration text has changed"):
            state.keep_tokens(tokens, other)
    before = state.calibration()
    assert before is not None
    assert windows.token_hash(*before) == windows.token_hash(tokens, labels)


@pytest.mark.parametrize("takes_labels", [True, False])
def test_labels_reach_the_methods_that_take_them_and_no_other(
    takes_labels: bool, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Job] = []

    def method(job: Job, config: rtn.Config) -> Result:
        calls.append(job)
        return rtn.run(replace(job, tokens=None), config)

    reading = Method("ptq", "for this test", rtn.Config, method, needs_data=lambda config: takes_labels)
    for module in ("quantize", "checks"):
        monkeypatch.setattr(f"qtool.pipelines.{module}.load_method", lambda name: reading)
    raw = {
        "model": {"path": str(llama_folder), "dtype": "float32", "device": "cpu"},
        "method": {"name": "rtn"},
        "data": {"source": str(write(tmp_path / "a.jsonl", ROWS)), "num_samples": 3, "seq_len": 100},
        "quant": {"group_size": 32},
        "output": {"path": str(tmp_path / "q")},
    }
    recipe = Recipe.model_validate(raw)
    quantize.quantize(recipe)
    text = windows.calibration(recipe.data, tiny.load(llama_folder), 0)
    (job,) = calls
    assert text.labels is not None
    if not takes_labels:
        assert (job.tokens, job.labels) == (None, None)
        return
    assert torch.equal(job.text, text.tokens)
    assert job.labels is not None
    assert torch.equal(job.labels, text.labels)
    manifest = json.loads((tmp_path / "q" / "qtool.json").read_text())
    assert manifest["data"]["sha256"] == windows.token_hash(*text)
