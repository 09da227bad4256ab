"""Tables are found in every family; what cannot be quantized is refused with the key that changes it."""

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tables, tiny
from helpers.notes import Notes
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from qtool.blocks.job import Job
from qtool.config import recipe
from qtool.config.quant import QuantConfig
from qtool.config.recipe import Recipe
from qtool.models.linears import text_decoder
from qtool.models.loaded import LoadedModel
from qtool.models.tables import embeddings_of, head_of, select_tables, unpacked
from qtool.models.targets import select_targets
from qtool.system import progress
from qtool.system.errors import InputError


def in_memory(model: Any) -> LoadedModel:
    return LoadedModel(model.eval().requires_grad_(False), tiny.tokenizer(), "tiny", Path(), {})


@pytest.fixture
def tied(tmp_path: Path) -> LoadedModel:
    return tiny.load(tiny.llama(tmp_path / "tied", tied=True))


# ------------------------------------------------------------------------------------------------------- selection


def test_by_default_no_table_is_quantized(llama: LoadedModel) -> None:
    assert select_tables(llama, QuantConfig(group_size=16)).targets == ()


def test_an_untied_head_is_a_target_of_the_method_after_the_last_block(llama: LoadedModel) -> None:
    job = Job.select(llama, tables.config(head={"num_bits": 3, "group_size": 32}))
    assert {name: spec.label() for name, spec in job.tables.specs.items()} == {
        "model.embed_tokens": "w8pc",
        "lm_head": "w3g32",
    }
    assert [target.name for target in job.of_block(2)] == ["lm_head"]
    assert job.num_parts == 3
    assert job.tables.tied == {}


def test_head_same_is_the_grid_of_the_embedding_and_float_leaves_it(llama: LoadedModel, tied: LoadedModel) -> None:
    assert set(select_tables(llama, tables.config()).specs) == {"model.embed_tokens", "lm_head"}
    assert set(select_tables(llama, tables.config(head="float")).specs) == {"model.embed_tokens"}
    assert set(select_tables(llama, tables.config(embedding="float", head={})).specs) == {"lm_head"}
    found = select_tables(tied, tables.config())
    assert set(found.specs) == {"model.embed_tokens"}
    assert found.tied == {"lm_head": "model.embed_tokens"}
    assert select_tables(tied, tables.config(head={"num_bits": 8})) == found


def test_scales_of_tables_have_the_dtype_of_the_section(llama: LoadedModel) -> None:
    specs = select_tables(llama, tables.config(scale_dtype="bfloat16")).specs
    assert {spec.scale_dtype for spec in specs.values()} == {"bfloat16"}


def test_tables_do_not_round_activations(llama: LoadedModel) -> None:
    specs = select_tables(llama, tables.config(preset="a8kv4", group_size=16)).specs
    assert all(spec == spec.weights_only for spec in specs.values())


def test_position_embeddings_are_found_and_small_ones_are_not(tmp_path: Path) -> None:
    gpt2 = tiny.load(tiny.gpt2(tmp_path / "gpt2"))
    assert [*embeddings_of(gpt2.model)] == ["transformer.wte", "transformer.wpe"]
    few = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=64, intermediate_size=64, num_hidden_layers=1))
    with pytest.raises(InputError, match=r"model\.embed_tokens cannot be quantized: it is no table of 32 rows"):
        select_tables(in_memory(few), tables.config(head="float"))


def test_a_model_that_calls_its_head_decoder_is_not_taken_for_its_head() -> None:
    """``get_decoder`` returns the head there, whose table is that of the embedding."""
    sizes: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
    config = ModernBertDecoderConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0)
    loaded = in_memory(ModernBertDecoderForCausalLM(config))
    assert text_decoder(loaded.model) == ("", loaded.model)
    found = select_tables(loaded, tables.config())
    assert found.tied == {"decoder": "model.embeddings.tok_embeddings"}
    assert set(found.specs) == {"model.embeddings.tok_embeddings"}


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


class _Same(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T


def test_a_head_whose_class_computes_something_else_is_refused(llama: LoadedModel, tied: LoadedModel) -> None:
    for kind, good in ((_Scaled, False), (_Same, True)):
        head = kind(64, tiny.VOCABULARY, bias=False)
        llama.model.set_submodule("lm_head", head)
        assert head_of(llama.model) == ("lm_head", head)
        if good:
            assert "lm_head" in select_tables(llama, tables.config()).specs
            continue
        with pytest.raises(InputError, match=r"lm_head is a _Scaled; set quant\.head: float$"):
            select_tables(llama, tables.config())
        head.weight = tied.model.get_parameter("model.embed_tokens.weight")
        tied.model.set_submodule("lm_head", head)
        with pytest.raises(InputError, match=r"no plain linear: _Scaled; leave quant\.embedding out$"):
            select_tables(tied, tables.config())


def test_an_embedding_whose_class_reads_its_table_itself_is_refused_or_named(llama: LoadedModel) -> None:
    class Odd(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return self.weight[input]

    other = copy.deepcopy(llama)
    llama.model.set_submodule("model.embed_tokens", Odd(tiny.VOCABULARY, 64))
    with pytest.raises(InputError, match=r"model\.embed_tokens cannot be quantized: its class"):
        select_tables(llama, tables.config())
    other.model.get_decoder().add_module("places", Odd(64, 64))
    notes = Notes()
    with progress.use(notes):
        found = select_tables(other, tables.config())
    assert [target.name for target in found.embeddings] == ["model.embed_tokens"]
    assert [line for line in notes.texts if "places" in line] == [
        "model.places stays in floating point: its class Odd reads the table in a way of its own"
    ]


def test_a_model_that_keeps_no_float_weight_is_refused() -> None:
    """Its norms have no weights; transformers finds the dtype of a model in its first parameter."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    untied = in_memory(OlmoForCausalLM(OlmoConfig(**sizes, num_attention_heads=4)))
    with pytest.raises(InputError, match=r"no weight would stay in floating point.*; set quant\.head: float$"):
        select_tables(untied, tables.config())
    assert select_tables(untied, tables.config(head="float")).specs
    assert select_tables(untied, tables.config(overrides={"*.q_proj": {"skip": True}})).specs
    one = in_memory(OlmoForCausalLM(OlmoConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)))
    with pytest.raises(InputError, match=r"; set quant\.embedding: float$"):
        select_tables(one, tables.config())


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"embedding": {"group_size": 48}},
            r"^quant\.embedding: model\.embed_tokens\.weight has 64 input channels, and ",
        ),
        ({"head": {"group_size": 48}}, r"^quant\.head: lm_head\.weight has 64 input channels, and group_size 48 "),
    ],
)
def test_a_group_size_that_does_not_divide_names_its_key(
    llama: LoadedModel, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        select_tables(llama, tables.config(**keys))


@pytest.mark.parametrize("head", ["float", {"num_bits": 4}, {"num_bits": 8, "symmetric": False}])
def test_a_tied_head_with_another_grid_is_refused(tied: LoadedModel, head: Any) -> None:
    with pytest.raises(InputError, match=r"lm_head computes with the embedding model\.embed_tokens .* same grid$"):
        select_tables(tied, tables.config(head=head))
    with pytest.raises(InputError, match=r"quant\.head is w8pc where quant\.embedding is float"):
        select_tables(tied, tables.config(embedding="float", head={}))


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_a_table_with_a_nan_is_refused(llama: LoadedModel, name: str) -> None:
    llama.extremes.clear()  # they were found when it was loaded
    with torch.no_grad():
        llama.model.get_parameter(f"{name}.weight")[3, 4] = float("nan")
    key = {"lm_head": "quant.head"}.get(name, "quant.embedding")
    with pytest.raises(InputError, match=rf"^{key}: {name}\.weight holds 1 NaN"):
        select_tables(llama, tables.config())


@pytest.mark.parametrize(
    ("pattern", "key"), [("lm_head", "quant.head"), ("*embed_tokens", "quant.embedding"), ("*lm_head*", "quant.head")]
)
def test_an_override_that_names_a_table_is_told_the_key(llama: LoadedModel, pattern: str, key: str) -> None:
    for change in ({"num_bits": 8}, {"skip": True}):
        with pytest.raises(InputError, match=rf"is in no decoder block; its grid is {key}, a grid such as"):
            select_targets(llama, tables.config(overrides={pattern: change}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"embedding": 8}, r"quant.embedding: write a grid, such as {num_bits: 8}, or float; found 8"),
        ({"embedding": 4}, r"such as {num_bits: 4}, or float; found 4"),
        ({"head": 7}, r"quant.head: write a grid, such as {num_bits: 8}, or same or float; found 7"),
        ({"embedding": "same"}, r'or float; found "same"'),
        ({"embedding": None}, r"or float; found null"),
        (
            {"embedding": {"num_bits": 5}},
            r"quant.embedding.num_bits: should be 2, 3, 4 or 8; 5 bits are",
        ),
        ({"head": {"bits": 8}}, r"quant.head.bits: unknown key; the nearest is quant.head.num_bits; found 8"),
        ({"embedding": {"scale_dtype": "float32"}}, r"it belongs to quant: quant.scale_dtype; found"),
        ({"embedding": {"group_size": 0}}, r"quant.embedding.group_size: use a positive number"),
    ],
)
def test_a_key_that_cannot_be_read_is_refused_with_what_to_write(keys: dict[str, Any], message: str) -> None:
    raw = {
        "model": {"path": "m"},
        "method": {"name": "rtn"},
        "quant": keys,
        "output": {"path": "o"},
    }
    with pytest.raises(InputError) as refused:
        recipe.check(Recipe, raw, "recipe")
    lines = str(refused.value).splitlines()
    assert len(lines) == 2, lines
    assert message in lines[1]
    with pytest.raises(ValidationError):
        QuantConfig.model_validate(keys)


# ---------------------------------------------------------------------------------------------- packing a model


def test_float_modules_come_back_inside_the_block_and_leave_after_it(tied: LoadedModel) -> None:
    before = tiny.logits(tied.model)
    job, _ = tables.run(
        "rtn", tied, tables.config(overrides={"*.layers.*": {"skip": True}, "*.0.*q_proj": {"skip": False}})
    )
    after = tiny.logits(tied.model)
    assert not torch.equal(after, before)
    with suppress(KeyError), unpacked(tied.model, job.tables):
        assert not tables.packed(tied.model)
        assert not tables.tied(tied.model)
        assert tied.model.get_output_embeddings().weight is tied.model.get_input_embeddings().weight
        raise KeyError
    assert torch.equal(tiny.logits(tied.model), after)
    assert tables.tied(tied.model)["lm_head"].table is tables.packed(tied.model)["model.embed_tokens"]
