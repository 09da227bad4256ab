"""Chat: the text is that of the model and streams whole, it remembers, and nothing is cut off in silence."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.caches import make
from helpers.notes import Notes

from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.models import chat_template
from qtool.models.loaded import LoadedModel
from qtool.models.stepping import find_cache
from qtool.pipelines import chat
from qtool.pipelines.chat import Answer, Chat, Options, answer, open_chat, set_system
from qtool.system import interrupts, progress
from qtool.system.errors import InputError

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GREEDY = Options(max_new_tokens=12, temperature=0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "llama")


def opened(folder: Path, options: Options = GREEDY, template: str | None = TEMPLATE, system: str | None = None) -> Chat:
    (folder / "chat_template.jinja").write_text(template or "", encoding="utf-8")
    if template is None:
        (folder / "chat_template.jinja").unlink()
    return open_chat(ModelConfig(path=str(folder), device="cpu", dtype="float32"), options, system)


def said(chat: Chat, prompt: str) -> tuple[Answer, str]:
    """Return an answer, and the pieces that were shown, joined."""
    pieces: list[str] = []

    def show(text: str) -> bool:
        pieces.append(text)
        return True

    given = answer(chat, prompt, show)
    return given, "".join(pieces)


def greedy(loaded: LoadedModel, text: str, count: int) -> list[int]:
    """Return the most likely tokens after ``text``, read again from its beginning for each."""
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    for _ in range(count):
        ids.append(int(loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return list(ids[-count:])


def text_of(loaded: LoadedModel, tokens: list[int]) -> str:
    return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))


def test_it_answers_in_the_template_and_remembers(folder: Path) -> None:
    talk = opened(folder)
    first, shown = said(talk, "The old mill")
    expected = greedy(talk.loaded, "[user]The old mill<|endoftext|>[assistant]", 12)
    assert (first.text, first.tokens, first.ended) == (text_of(talk.loaded, expected), 12, "length")
    assert shown == first.text
    second, _ = said(talk, "and the bridge?")
    history = f"[user]The old mill<|endoftext|>[assistant]{first.text}<|endoftext|>[user]and the bridge?<|endoftext|>"
    assert second.text == text_of(talk.loaded, greedy(talk.loaded, f"{history}[assistant]", 12))
    set_system(talk, "Be brief.")
    third, _ = said(talk, "The old mill")
    alone = greedy(talk.loaded, "[system]Be brief.<|endoftext|>[user]The old mill<|endoftext|>[assistant]", 12)
    assert third.text == text_of(talk.loaded, alone)


def test_without_a_template_each_text_is_continued_by_itself(folder: Path) -> None:
    sink = Notes()
    with progress.use(sink):
        talk = opened(folder, template=None)
    assert any("has no chat template, so it continues each text" in text for text in sink.texts)
    for _ in range(2):
        assert said(talk, "The old mill")[0].text == text_of(talk.loaded, greedy(talk.loaded, "The old mill", 12))
    with pytest.raises(InputError, match="takes no system message"):
        set_system(talk, "Be brief.")


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma", "mamba"])
def test_a_model_with_a_memory_of_its_own_writes_what_it_writes_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = make(name)
    monkeypatch.setattr(chat, "load_exported", lambda config: loaded)
    talk = open_chat(ModelConfig(path=name, device="cpu"), GREEDY, None)
    assert talk.use_cache == (find_cache(loaded, torch.arange(4)[None], 32) is not None)
    assert said(talk, "The old mill")[0].text == text_of(loaded, greedy(loaded, "The old mill", 12))


def test_packed_linears_compute_with_kernels(folder: Path, tmp_path: Path) -> None:
    tiny.quantize(folder, tmp_path / "q", QuantConfig(num_bits=4, group_size=32))
    sink = Notes()
    with progress.use(sink):
        talk = opened(tmp_path / "q")
    assert any(text.startswith("backend fast: ") for text in sink.said)
    assert said(talk, "The old mill")[0].tokens == 12


def test_an_answer_ends_where_the_template_ends_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = opened(folder)
    talk.loaded.model.generation_config.eos_token_id = 7
    assert chat_template.ends_of_text(talk.loaded) == {7, talk.loaded.tokenizer.eos_token_id}
    whole = greedy(talk.loaded, "[user]The old mill<|endoftext|>[assistant]", 12)
    end = whole[5]
    monkeypatch.setattr(chat, "ends_of_text", lambda _: frozenset({end}))
    given, _ = said(talk, "The old mill")
    assert given.ended == "end"
    assert given.tokens == whole.index(end) + 1


def test_the_end_of_a_turn_is_read_from_the_template(folder: Path) -> None:
    loaded = tiny.load(folder)
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    loaded.tokenizer.chat_template = TEMPLATE.replace("<|endoftext|>", "<|turn|>\n")
    turn = loaded.tokenizer.convert_tokens_to_ids("<|turn|>")
    assert turn in chat_template.ends_of_text(loaded)
    loaded.tokenizer.chat_template = TEMPLATE.replace("<|endoftext|>", "\n\n")
    assert turn not in chat_template.ends_of_text(loaded)


def test_a_full_context_is_said_and_loses_nothing(folder: Path) -> None:
    talk = opened(folder, Options(max_new_tokens=500, temperature=0.0))
    given, _ = said(talk, "The old mill")
    assert given.ended == "context"
    assert given.prompt_tokens + given.tokens == tiny.CONTEXT
    turns = list(talk.turns)
    with pytest.raises(InputError, match=r"made for at most 128; begin it again \(/reset\)"):
        said(talk, "and the bridge?")
    assert talk.turns == turns
    set_system(talk, None)
    assert said(talk, "The old mill")[0].text == given.text


def test_the_seed_and_the_temperature_fix_the_text(folder: Path) -> None:
    def text(temperature: float | None, seed: int) -> str:
        return said(opened(folder, Options(12, temperature, seed)), "The old mill")[0].text

    assert text(1.5, 0) == text(1.5, 0)
    assert text(1.5, 0) != text(1.5, 1)
    assert text(0.0, 0) == text(0.0, 1)
    state = torch.random.get_rng_state()
    text(1.5, 3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert text(None, 0) == text(0.0, 0)
    talk = opened(folder, Options(12, None, 0))
    talk.loaded.model.generation_config.do_sample = True
    talk.loaded.model.generation_config.temperature = 1.5
    assert said(talk, "The old mill")[0].text == text(1.5, 0)


def stopping(after: int) -> Callable[[str], bool]:
    """Return a ``show`` that is interrupted at its piece ``after``."""
    count = 0

    def show(text: str) -> bool:
        nonlocal count
        count += 1
        if count == after:
            signal.raise_signal(signal.SIGINT)
        return True

    return show


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(folder: Path) -> None:
    talk = opened(folder)
    with interrupts.as_exceptions():
        given = answer(talk, "The old mill", stopping(3))
    assert given.ended == "stopped"
    assert 0 < given.tokens < 12
    assert talk.turns[-1] == {"role": "assistant", "content": given.text}
    assert said(talk, "and the bridge?")[0].tokens == 12


def test_nothing_is_written_for_a_reader_that_left(folder: Path) -> None:
    given = answer(opened(folder), "The old mill", lambda text: False)
    assert given.ended == "stopped"
    assert given.tokens <= 2


@pytest.mark.parametrize(
    ("template", "system", "words"),
    [
        ("{{ raise_exception('no system here') }}", "Be brief.", "refuses the conversation: no system here"),
        ("hello", "Be brief.", "leaves out the last message"),
    ],
)
def test_a_template_that_refuses_is_quoted(folder: Path, template: str, system: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        opened(folder, template=template, system=system)
