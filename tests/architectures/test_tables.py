"""Every decoder family with packed tables: right to the last bit, or refused with the line that says what to set."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import architectures
from helpers.architecture_checks import Refused, Trial, command
from helpers.architectures import read_table
from helpers.tables import packed, tied

from qtool.models.linears import packed_linears
from qtool.quant.packed_linear import PackedLinear

FAST = ("gpt2", "gemma3n_text", "inkling2_text")  # positions, a table for each layer, a head that is stored otherwise
REFUSED = {  # families that other tests of this folder take, and whose tables cannot be quantized
    "dory": "quant.head needs an output head that is a linear; found: lm_head is a DoryLMHead; set quant.head: float",
    "olmo": "no weight would stay in floating point, *; set quant.head: float",
    "nanochat": "no weight would stay in floating point, *; set quant.head: float",
}
EMBEDDINGS = {  # the embeddings of families that have more of them than that of the tokens
    "gpt2": ["transformer.wte", "transformer.wpe"],
    "opt": ["model.decoder.embed_tokens", "model.decoder.embed_positions"],
    "gemma3n_text": ["model.embed_tokens", "model.embed_tokens_per_layer"],
    "gemma4_e": ["model.embed_tokens", "model.embed_tokens_per_layer"],
}


def quantized(trial: Trial, method: str, quant: dict[str, Any]) -> Path:
    """Quantize and return the folder; a run that exists is made once."""
    out = trial.folder / f"{method}-{len(quant)}"
    raw = {
        "model": {"path": str(trial.source)},
        "method": {"name": method},
        "quant": {"num_bits": 4, "group_size": 32} | quant,
        "data": {"source": str(trial.text), "num_samples": 4, "seq_len": 16},
        "output": {"path": str(out), "plots": False},
    }
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    command("ptq", str(file))
    return out


def expanded(model: Any, plain: Any) -> Any:
    """Put the float modules of ``plain`` in the places of packed tables, with the weights that these stand for."""
    tables, heads = packed(model), tied(model)
    head = model.get_output_embeddings()
    for name, layer in tables.items():
        module = plain.get_submodule(name)
        assert float((layer.dequantized() - module.weight).norm() / module.weight.norm()) < 0.02, name
        module.weight.data = layer.dequantized()
        model.set_submodule(name, module)
    if isinstance(head, PackedLinear):
        name = next(name for name, module in model.named_modules() if module is head)
        module = plain.get_submodule(name)
        if name not in heads:
            module.weight.data = head.dequantized()
        model.set_submodule(name, module)
    return model


@torch.no_grad()
def check(name: str, folder: Path) -> None:
    """Compare the logits of a checkpoint with those of the same checkpoint whose tables are expanded, and saved again.

    Raises:
        Refused: for what the model is.
    """
    trial = Trial(name, folder)
    assert bool(torch.isfinite(trial.logits).all())
    plain = architectures.load(name, quantized(trial, "rtn", {}))[0]
    for method in ("rtn", "gptq"):
        out = quantized(trial, method, {"embedding": {"num_bits": 8}})
        model, faults = architectures.load(name, out)
        assert not faults
        found = architectures.logits(model)
        assert bool(torch.isfinite(found).all())
        section = json.loads((out / "config.json").read_text())["quantization_config"]
        assert section["embeddings"] == [*packed(model)] == EMBEDDINGS.get(name, section["embeddings"])
        assert len(section["embeddings"]) >= 1
        head = model.get_output_embeddings()
        assert isinstance(head, PackedLinear) or head is None
        assert bool(tied(model)) != (head in packed_linears(model).values())
        model.save_pretrained(folder / f"{method}-again")
        again, faults = architectures.load(name, folder / f"{method}-again")
        assert not faults
        assert torch.equal(architectures.logits(again), found)
        assert torch.equal(architectures.logits(expanded(model, plain)), found)


@pytest.mark.parametrize("name", FAST)
def test_a_family_of_each_kind_is_right_with_packed_tables(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_tables_that_cannot_be_quantized_are_refused_before_the_first_block(name: str, tmp_path: Path) -> None:
    trial = Trial(name, tmp_path)
    start, _, end = REFUSED[name].partition("*")
    with pytest.raises(Refused) as refused:
        quantized(trial, "rtn", {"embedding": {"num_bits": 8}})
    assert start in str(refused.value)
    assert str(refused.value).endswith(end)
    assert quantized(trial, "rtn", {"embedding": {"num_bits": 8}, "head": "float"}).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in architectures.architectures() if name not in REFUSED])
def test_a_family_is_right_with_packed_tables_unless_it_is_refused_without(name: str, tmp_path: Path) -> None:
    lines = {step for steps in read_table("refused")["models"].get(name, {}) for step in steps.split()}
    try:
        check(name, tmp_path)
    except Refused:
        assert {"rtn", "gptq"} & lines
