"""Runs with packed tables on a GPU, whose float weights stay in mapped files on the CPU until they are needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.stopped_runs import make, quantize

from qtool.config.sections import ModelConfig
from qtool.models.linears import packed_weights
from qtool.models.loading import load_model

TABLES: dict[str, Any] = {"quant__embedding": {"num_bits": 8}}
HEAD: dict[str, Any] = {"quant__head": {"num_bits": 4, "group_size": 32}}


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", ["gptq", "lsq", "efficientqat"])
def test_a_gpu_packs_embedding_and_head(tmp_path: Path, tied: bool, method: str) -> None:
    """The embedding has the bits of a run on the CPU, and the whole model about the same logits."""
    tiny.llama(tmp_path / "float", tied=tied)
    (tmp_path / "text.txt").write_text("\n".join(tiny.PROSE * 40), encoding="utf-8")
    logits, tables = {}, {}
    for device in ("cpu", "cuda"):
        keys = {**TABLES, **({} if tied else HEAD), "model__device": device}
        quantize(make(tmp_path, tmp_path / device, method, **keys))
        loaded = load_model(ModelConfig(path=str(tmp_path / device), device="cpu", dtype="float32"), quantized=True)
        logits[device] = tiny.logits(loaded.model)
        tables[device] = packed_weights(loaded.model)["model.embed_tokens"].quantized
    assert all(torch.equal(a, b) for a, b in zip(tables["cpu"][:3], tables["cuda"][:3], strict=True))
    change = (logits["cuda"] - logits["cpu"]).norm() / logits["cpu"].norm()
    assert float(change) < 0.05  # codes near the middle between two may go to the other one
