"""The Python API: in memory and on disk the same bits as a run, and every fault said before the model changes."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.methods import QUICK
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import qtool
from qtool.config import catalog
from qtool.models.linears import packed_linears
from qtool.quant.packed_linear import PackedLinear

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
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(tiny.logits(model), tiny.logits(written))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert packed_linears(again).keys() == packed_linears(model).keys()
    assert torch.equal(tiny.logits(again), tiny.logits(model))


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
    assert qtool.kl(dense, model, windows).agreement.value == 1
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
    ],
)
def test_a_model_that_cannot_be_quantized_stays_as_it_was(loaded: Model, keys: dict[str, Any], message: str) -> None:
    model, tokenizer = loaded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(qtool.InputError, match=message):
        qtool.quantize_model(model, tokenizer, **{"group_size": 16, **keys})
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


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
