"""The Python API: in memory and on disk the same bits as a run, and every fault said before the model changes."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.methods import QUICK
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

import qtool
from qtool.config import catalog
from qtool.models.linears import packed_linears
from qtool.quant.packed_linear import PackedLinear

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TABLE = {"num_bits": 8}  # the grid of embeddings and head
Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture
def loaded(llama_folder: Path) -> Model:
    """The tiny Llama, as a notebook loads it."""
    return AutoModelForCausalLM.from_pretrained(llama_folder), AutoTokenizer.from_pretrained(llama_folder)


def recipe(folder: Path, output: Path, method: dict[str, Any], tokens: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(folder), "dtype": "float32", "device": "cpu"},
        "method": method,
        "quant": {"num_bits": 3, "group_size": 16},
        "data": {"source": str(tokens), "num_samples": 4, "seq_len": 24},
        "output": {"path": str(output)},
        "seed": 1,
    }


@pytest.mark.parametrize("name", catalog.methods())
def test_a_model_in_memory_gets_the_bits_that_a_run_writes(
    name: str, loaded: Model, llama_folder: Path, tmp_path: Path, tokens: Tensor
) -> None:
    """And ``save_pretrained`` writes them; the second phase of EfficientQAT has the float model as its teacher."""
    from safetensors.torch import save_file

    windows = tokens[:4]
    save_file({"tokens": windows}, tmp_path / "t.safetensors")
    method = {"name": name, **QUICK.get(name, {})}
    outcome = qtool.quantize(recipe(llama_folder, tmp_path / "run", method, tmp_path / "t.safetensors"))
    assert outcome is not None
    model, tokenizer = loaded
    result = qtool.quantize_model(
        model, tokenizer, method, num_bits=3, group_size=16, data=windows, num_samples=4, seq_len=24, seed=1
    )
    assert result.series == outcome.report.series
    assert result.weight_errors == {
        linear.name: pytest.approx(linear.weight_error)
        for linear in outcome.report.linears
        if linear.weight_error is not None
    }
    assert result.weight_errors.keys() == packed_linears(model).keys()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(tiny.logits(model), tiny.logits(written))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert packed_linears(again).keys() == packed_linears(model).keys()
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_weights_that_were_changed_in_memory_are_the_ones_that_are_quantized(loaded: Model) -> None:
    """As after merging an adapter: the files, into which the weights may be mapped, have other values."""
    model, tokenizer = loaded
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    copied = copy.deepcopy(model)  # in ordinary memory
    for each in (model, copied):
        qtool.quantize_model(each, tokenizer, "rtn", num_bits=8, group_size=16, quant={"embedding": TABLE})
    assert torch.equal(tiny.logits(model), tiny.logits(copied))


def test_what_is_saved_can_be_exported_and_measured(loaded: Model, tmp_path: Path) -> None:
    model, tokenizer = loaded
    reference = copy.deepcopy(model)
    qtool.quantize_model(model, tokenizer, "rtn", group_size=16)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    exported = qtool.export(tmp_path / "saved", "dense", tmp_path / "dense")
    in_memory = qtool.evaluate(model, ["kl"], reference=reference, tokenizer=tokenizer, limit=2, context=32)
    assert in_memory.results[0].value is not None
    assert in_memory.results[0].value > 0
    windows = torch.randint(2, tiny.VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(exported)
    assert qtool.kl(dense, model, windows).kl.value == pytest.approx(0, abs=1e-6)
    divergence = qtool.kl(dense, model, windows)
    assert divergence.agreement.value == 1
    assert list(divergence.percentiles) == ["median", "99th percentile", "99.9th percentile", "maximum"]
    assert qtool.perplexity(dense, windows).value == pytest.approx(qtool.perplexity(model, windows).value, rel=1e-5)


def test_changes_take_the_place_of_keys_and_the_dict_stays(tmp_path: Path) -> None:
    raw = {"model": {"path": "m"}, "method": {"name": "rtn"}, "output": {"path": str(tmp_path)}}
    before = copy.deepcopy(raw)
    changed = qtool.load_recipe(raw, seed=3, **{"quant.num_bits": 2, "quant.overrides": {"*.q_proj": {"skip": True}}})
    assert raw == before
    assert (changed.seed, changed.quant.num_bits) == (3, 2)
    assert qtool.load_recipe(changed, seed=4) == changed.model_copy(update={"seed": 4})
    assert qtool.load_recipe("quickstart").method.name == "gptq"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant.num_bit": 3}, "quant.num_bit: unknown key; the nearest is quant.num_bits"),
        ({"method.name": "gtpq"}, "method.name: no such method; the nearest is gptq"),
        ({"model..path": 1}, "model..path: write section.key=value"),
    ],
)
def test_faults_of_a_recipe_are_one_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(qtool.InputError) as refused:
        qtool.load_recipe("quickstart", **changes)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"group_size": 48}, "group_size 48 does not divide"),
        ({"num_bits": 5}, "quant.num_bits"),
        ({"method": "nope"}, "no such method"),
        ({"data": "nowhere.txt"}, "there is no file nowhere.txt"),
        ({"seq_len": 4096}, "seq_len"),
        (
            {"quant": {"budget": {"average_bits": 3.0}}},
            "quant.budget: a model in memory is quantized with",
        ),
        ({"quant": "w4"}, "quant: found str; give a dict of its keys"),
        ({"method": None}, r"method: found NoneType; give a text \(name\) or a dict of its keys"),
        ({"data": [[1, 2]]}, r"data: found list; give a text \(source\) or a dict"),
        ({"data": torch.ones(3, dtype=torch.int64)}, r"data: found a tensor \[3\] of torch.int64; expected windows"),
        ({"data": torch.ones(3, 8)}, r"data: found a tensor \[3, 8\] of torch.float32; expected windows"),
        ({"data": torch.ones(0, 8, dtype=torch.int64)}, r"data: found a tensor \[0, 8\]"),
        ({"data": torch.ones(2, 1, dtype=torch.int64)}, r"data: found a tensor \[2, 1\]"),
        ({"data": torch.full((2, 8), 10**6)}, "found tokens from 1000000 to 1000000, and the vocabulary"),
        ({"data": torch.full((2, 8), -1)}, "found tokens from -1 to -1, and the vocabulary"),
        ({"data": torch.ones(2, 4096, dtype=torch.int64)}, "tokens in a window of data is 4096"),
    ],
)
def test_a_model_that_cannot_be_quantized_stays_as_it_was(loaded: Model, keys: dict[str, Any], message: str) -> None:
    model, tokenizer = loaded
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(qtool.InputError, match=message):
        qtool.quantize_model(model, tokenizer, **{"group_size": 16, **keys})
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_model_is_quantized_once(loaded: Model) -> None:
    """A second call would leave a config that names only its own linears."""
    model, tokenizer = loaded
    quant = {"overrides": {"*.self_attn.*": {"skip": True}}}
    qtool.quantize_model(model, tokenizer, "rtn", group_size=16, quant=quant)
    with pytest.raises(qtool.InputError, match="is a PackedLinear already, so this model was quantized before"):
        qtool.quantize_model(model, tokenizer, "rtn", group_size=16, num_bits=8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("out/float", "found str; give a model that AutoModelForCausalLM.from_pretrained returned"),
        (None, "found NoneType"),
        (BertForMaskedLM(BertConfig(**SMALL)), "BertForMaskedLM is not a causal language model"),
        (
            T5ForConditionalGeneration(T5Config(d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32)),
            "is not a causal",
        ),
        (LlamaModel(LlamaConfig(**SMALL)), "LlamaModel is not a causal language model"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_by_name(loaded: Model, model: Any, message: str) -> None:
    other, tokenizer = loaded
    windows = torch.ones(2, 8, dtype=torch.int64)
    calls: list[Callable[[], object]] = [
        lambda: qtool.quantize_model(model, tokenizer, "rtn", group_size=16),
        lambda: qtool.perplexity(model, windows),
        lambda: qtool.kl(model, other, windows),
    ]
    for call in calls:
        with pytest.raises(qtool.InputError, match=f"^model: .*{message}"):
            call()
    with pytest.raises(qtool.InputError, match=f"^reference: .*{message}"):
        qtool.kl(other, model, windows)


def test_text_needs_a_tokenizer_and_tokens_do_not(loaded: Model) -> None:
    model, _ = loaded
    with pytest.raises(qtool.InputError, match="tokenizer: found NoneType, and gptq needs one for its"):
        qtool.quantize_model(model, None, "gptq", group_size=16)
    result = qtool.quantize_model(model, None, "gptq", group_size=16, data=torch.ones(2, 8, dtype=torch.int64))
    assert result.weight_errors


def test_a_reference_with_another_vocabulary_is_refused(loaded: Model) -> None:
    model, tokenizer = loaded
    other = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": tiny.VOCABULARY + 8}))
    with pytest.raises(qtool.InputError, match="reference: its vocabulary has"):
        qtool.kl(model, other, torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(qtool.InputError, match="reference: its vocabulary has"):
        qtool.evaluate(model, "kl", reference=other, tokenizer=tokenizer, limit=1, context=16)


def test_one_name_stands_for_a_list_of_one(loaded: Model) -> None:
    model, tokenizer = loaded
    report = qtool.evaluate(model, "generated", tokenizer=tokenizer, limit=1, context=16)
    assert [result.task for result in report.results] == ["generated"]
    with pytest.raises(qtool.InputError, match="nowhere cannot be read"):
        qtool.compare("nowhere")


@pytest.mark.parametrize("recipe", [None, 3, [1, 2]])
def test_what_is_no_recipe_is_refused(recipe: Any) -> None:
    with pytest.raises(qtool.InputError, match=r"recipe: found .*; give a text"):
        qtool.quantize(recipe)


def test_wrong_keys_of_an_evaluation_or_a_bench_are_input_errors(loaded: Model, tmp_path: Path) -> None:
    model, tokenizer = loaded
    with pytest.raises(qtool.InputError, match=r"eval\.limits: unknown key; the nearest is eval\.limit"):
        qtool.evaluate(model, ["kl"], tokenizer=tokenizer, limits=3)
    with pytest.raises(qtool.InputError, match="repeat: unknown key"):
        qtool.bench(tmp_path, repeat=3)
    with pytest.raises(qtool.InputError, match="with its tokenizer, and none was given"):
        qtool.evaluate(model, ["kl"])
    with pytest.raises(qtool.InputError, match="reference: found a folder, but the model is in memory"):
        qtool.evaluate(model, ["kl"], tokenizer=tokenizer, reference=tmp_path)
    with pytest.raises(qtool.InputError, match="reference: found a model in memory, but the model is in a folder"):
        qtool.evaluate(tmp_path, ["kl"], reference=model)
    with pytest.raises(qtool.InputError, match="leave tokenizer out"):
        qtool.evaluate(tmp_path, ["kl"], tokenizer=tokenizer)


def test_the_names_are_there_in_every_order_of_imports() -> None:
    """``qtool.methods`` is a function of the API and the package of the methods."""
    code = """
import sys
import qtool
assert not {"torch", "transformers", "pydantic"} & set(sys.modules)
assert set(qtool.__all__) == set(dir(qtool))
{first}
names = qtool.methods()
import qtool.methods.rtn
assert qtool.methods() == names and "rtn" in names
assert all(getattr(qtool, name) is not None for name in qtool.__all__)
"""
    for first in ("", "import qtool.methods.gptq", "from qtool.methods import gptq"):
        subprocess.run([sys.executable, "-c", code.replace("{first}", first)], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = qtool.quantise  # type: ignore[attr-defined]
