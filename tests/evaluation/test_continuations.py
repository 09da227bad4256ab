"""Continuations: the most likely text, alone or in a batch, with a cache or without; never more work than was said."""

from pathlib import Path

import pytest
import torch
from helpers import multimodal, tiny
from helpers.notes import Notes
from torch import Tensor, nn

from qtool.config.quant import QuantConfig
from qtool.config.sections import EvalConfig, ModelConfig
from qtool.evaluation import continuations as module
from qtool.evaluation.continuations import NUM_TOKENS, QUESTIONS, SENTENCES, continuations
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.reports.records import Continuation
from qtool.system import progress

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ date_string }}{{ strftime_now('%Y') }}{% endif %}"
)
EVAL = EvalConfig()


@pytest.fixture
def llama(tmp_path: Path) -> LoadedModel:
    return tiny.load(tiny.llama(tmp_path / "llama"))


def alone(loaded: LoadedModel, prompt: str) -> str:
    """Return what transformers' own ``generate`` writes after one prompt."""
    tokens = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    new = tiny.continued(loaded.model, tokens, NUM_TOKENS)[0, tokens.shape[1] :].tolist()
    end = loaded.tokenizer.eos_token_id
    new = new[: new.index(end) + 1] if end in new else new
    return str(loaded.tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_text_is_that_of_transformers_for_the_prompt_alone(family: str, tmp_path: Path) -> None:
    loaded = tiny.load(tiny.FAMILIES[family](tmp_path / family))
    found = continuations(loaded, EVAL, None)
    assert [each.prompt for each in found] == list(SENTENCES)
    assert [each.text for each in found] == [alone(loaded, prompt) for prompt in SENTENCES]
    assert all(each.float_text is None and each.num_same is None for each in found)
    assert len({len(loaded.tokenizer(prompt)["input_ids"]) for prompt in SENTENCES}) > 1, "no row is longer"


def test_the_text_does_not_depend_on_a_cache(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = continuations(llama, EVAL, None)
    monkeypatch.setattr(module, "find_cache", lambda *_: None)
    assert continuations(llama, EVAL, None) == found


def test_a_quantized_model_stands_beside_its_float_model(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "llama")
    reference = tiny.load(folder)
    same = continuations(reference, EVAL, reference)
    assert all(each.text == each.float_text and each.num_same == each.num_tokens for each in same)
    coarse = continuations(tiny.packed(folder, QuantConfig(num_bits=2, group_size=16)), EVAL, reference)
    assert [each.float_text for each in coarse] == [each.text for each in same]
    assert any(each.num_same is not None and each.num_same < each.num_tokens for each in coarse)


@pytest.mark.parametrize(
    ("first", "second", "expected"), [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 4], 2), ([], [1], 0), ([5], [6], 0)]
)
def test_the_tokens_in_common_are_counted_from_the_beginning(
    first: list[int], second: list[int], expected: int
) -> None:
    assert module._num_same(first, second) == expected


def test_a_text_ends_with_the_token_that_ends_texts(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module._written(llama, SENTENCES[:1], "exact")[0].tokens
    assert len(whole) == NUM_TOKENS
    monkeypatch.setattr(module, "ends_of_text", lambda _: frozenset({whole[7]}))
    cut = module._written(llama, SENTENCES[:1], "exact")[0].tokens
    assert cut == whole[: whole.index(whole[7]) + 1]


def test_the_work_is_bounded(llama: LoadedModel) -> None:
    rows: list[int] = []
    llama.model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    continuations(llama, EVAL, None)
    lengths = [len(llama.tokenizer(prompt)["input_ids"]) for prompt in SENTENCES]
    tries = 5  # of the cache
    assert len(rows) <= NUM_TOKENS + max(lengths) - min(lengths) + tries
    rows.clear()
    assert continuations(llama, EvalConfig(continuations=0), None) == ()
    assert not rows


def test_a_chat_model_answers_questions_and_the_day_does_not_matter(llama: LoadedModel) -> None:
    llama.tokenizer.chat_template = TEMPLATE
    llama.model.config.max_position_embeddings = 512
    seen: list[str] = []

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(str(llama.tokenizer.decode(args[0][0].tolist())))

    llama.model.register_forward_pre_hook(see)
    found = continuations(llama, EvalConfig(continuations=2), None)
    assert [each.prompt for each in found] == list(QUESTIONS[:2])
    assert f"<user>{QUESTIONS[0]}<|endoftext|><assistant>26 Jul 202426 Jul 2024" in "".join(seen)


@pytest.mark.parametrize("name", ["llava", "qwen3_5"])
def test_a_multimodal_model_continues_text(name: str, tmp_path: Path) -> None:
    folder = multimodal.write(name, tmp_path / name)
    loaded = load_model(ModelConfig(path=str(folder), device="cpu", dtype="float32"))
    loaded.tokenizer.chat_template = multimodal.TEMPLATE  # reads lists of parts only
    loaded.model.config.get_text_config().max_position_embeddings = 512
    found = continuations(loaded, EvalConfig(continuations=1), loaded)
    assert [each.prompt for each in found] == list(QUESTIONS[:1])
    assert found[0].text == found[0].float_text


def refused(loaded: LoadedModel, reference: LoadedModel | None = None) -> tuple[tuple[Continuation, ...], list[str]]:
    sink = Notes()
    with progress.use(sink):
        return continuations(loaded, EVAL, reference), sink.texts


def test_what_cannot_be_written_is_said(llama: LoadedModel) -> None:
    llama.model.config.max_position_embeddings = 8
    found, said = refused(llama)
    assert found == ()
    assert len(said) == 1
    assert "the context of" in said[0]
    llama.model.config.max_position_embeddings = tiny.CONTEXT
    llama.tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    assert "refuses the conversation: no users here" in refused(llama)[1][0]
    llama.tokenizer.chat_template = "hello"
    assert "leaves out the last message" in refused(llama)[1][0]


def test_a_short_context_makes_short_texts(llama: LoadedModel) -> None:
    lengths = [len(llama.tokenizer(prompt)["input_ids"]) for prompt in SENTENCES]
    whole = continuations(llama, EVAL, None)
    llama.model.config.max_position_embeddings = max(lengths) + 5
    short = continuations(llama, EVAL, None)
    for each, full in zip(short, whole, strict=True):
        assert full.text.startswith(each.text)
        assert 5 <= each.num_tokens < NUM_TOKENS
