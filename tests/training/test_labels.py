"""Training where only some tokens are learned: the loss, and that a run hands labels to its method."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from helpers.methods import recorded

from qtool.blocks.job import load_method
from qtool.config import catalog
from qtool.config.recipe import Recipe
from qtool.config.sections import IGNORED, DataConfig
from qtool.config.training import EndToEndConfig
from qtool.data import windows
from qtool.pipelines import quantize
from qtool.training.end_to_end import _Training


@pytest.fixture
def labels(tokens: torch.Tensor) -> torch.Tensor:
    """Labels that learn the last part of each window, of another length in each."""
    learned = torch.arange(tokens.shape[1]) >= torch.tensor([3, 20, 9, 15, 7])[:, None]
    return tokens.where(learned, IGNORED)


def training(llama: Any, tokens: torch.Tensor, labels: torch.Tensor, **keys: Any) -> _Training:
    config = EndToEndConfig(batch_size=3, min_steps=0, **keys)
    return _Training(llama, None if config.loss == "ce" else llama.model, tokens, labels, config, seed=0)


def test_the_loss_is_transformers_own_over_the_learned_tokens(
    llama: Any, tokens: torch.Tensor, labels: torch.Tensor
) -> None:
    one = training(llama, tokens, labels, loss="ce", validation_samples=2)
    with torch.no_grad():
        expected = llama.model(input_ids=tokens[3:], labels=labels[3:]).loss
        assert one.validate() == pytest.approx(expected.item(), rel=1e-5)
        expected = llama.model(input_ids=tokens[:3], labels=labels[:3]).loss
        found = float(sum(one.losses(0)))
        assert found == pytest.approx(expected.item(), rel=1e-5)  # all three windows, in some order


def test_parts_of_a_step_weigh_by_their_learned_tokens(llama: Any, tokens: torch.Tensor, labels: torch.Tensor) -> None:
    whole = training(llama, tokens, labels, loss="ce")
    parts = training(llama, tokens, labels, loss="ce", optim={"accumulation": 3})
    with torch.no_grad():
        found = list(parts.losses(0))
        assert len(found) == 3
        assert float(sum(found)) == pytest.approx(float(sum(whole.losses(0))), rel=1e-5)


def test_tokens_as_labels_are_no_labels(llama: Any, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        logits = llama.model(tokens[3:]).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), tokens[3:, 1:].flatten())
    assert training(llama, tokens, tokens, loss="ce", validation_samples=2).validate() == pytest.approx(expected.item())


def test_a_divergence_counts_only_learned_tokens(llama: Any, tokens: torch.Tensor, labels: torch.Tensor) -> None:
    for loss in ("kl", "cakld"):
        assert training(llama, tokens, labels, loss=loss, validation_samples=2).validate() == pytest.approx(0, abs=1e-6)
    one = training(llama, tokens, labels, loss="cakld")
    with torch.no_grad():
        logs = llama.model(tokens).logits[:, :-1].log_softmax(-1)
    truth = logs.gather(-1, tokens[:, 1:, None])[..., 0].exp()
    assert one.loss.gamma == pytest.approx(truth[labels[:, 1:] != IGNORED].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in catalog.methods() if load_method(name).end_to_end(load_method(name).config())]
)
def test_labels_change_what_is_learned(name: str, llama_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Question number {i}?", "output": f"Answer {i}, and no more than that."} for i in range(60)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = windows.calibration(
        DataConfig(source=str(tmp_path / "a.jsonl"), num_samples=4, seq_len=100), tiny.load(llama_folder), 0
    )
    assert text.labels is not None
    settings: dict[str, Any] = {"loss": "ce", "steps": 1, "batch_size": 4}
    series = "loss"
    if name == "efficientqat":  # the labels are those of its second phase
        settings, series = {"epochs": 0, "e2e": settings}, "e2e_loss"
    losses: list[float] = []
    for path in (tmp_path / "a.jsonl", tmp_path / "all.npy"):
        if path.suffix == ".npy":
            np.save(path, text.tokens.numpy())
        raw = {
            "model": {"path": str(llama_folder), "dtype": "float32", "device": "cpu"},
            "method": {"name": name, **settings},
            "data": {"source": str(path), "num_samples": 4, "seq_len": 100},
            "quant": {"group_size": 32, "num_bits": 8},
            "output": {"path": str(tmp_path / f"q{len(losses)}")},
        }
        quantize.quantize(Recipe.model_validate(raw))
        losses.append(recorded(tmp_path / f"q{len(losses)}" / "qtool.json")[series][0])
    with torch.no_grad():
        model = tiny.load(llama_folder).model
        expected = [model(text.tokens, labels=labels).loss.item() for labels in (text.labels, text.tokens)]
    assert losses == pytest.approx(expected, rel=0.02)
    assert abs(losses[0] - losses[1]) > 0.001
