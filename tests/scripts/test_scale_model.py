"""``scripts/bench/scale_model.py`` and ``scale_rates.py``: laws of predictions, and runs put beside them."""

import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import scale_model
import scale_rates
import torch
from transformers import LlamaConfig

TEXT = scale_model.Text(8, 128)
RATES = scale_model.Rates(**{field.name: 1e9 for field in fields(scale_model.Rates)} | {"wait": 0.0, "column": 0.0})


def blocks(count: int) -> Any:
    """The blocks of a small Llama, counted."""
    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "vocab_size": 8}
    return scale_model.blocks_of(scale_model.described(LlamaConfig(num_hidden_layers=count, **sizes)))


def row(method: str, ranks: int, peak: int, kept: int = 0) -> dict[str, Any]:
    """A row as ``ranks.py`` writes it."""
    run = {"model": "some", "method": method, "ranks": ranks, "windows": TEXT.windows, "length": TEXT.length}
    return run | {"blocks": kept, "seconds": 1.0, "rank_bytes": [peak, peak // 2]}


@pytest.mark.parametrize("method", sorted(scale_model.METHODS))
def test_time_grows_with_blocks_and_falls_with_processes(method: str) -> None:
    one, two = (scale_model.predict(blocks(count), method, TEXT, 1, RATES) for count in (1, 2))
    assert two["seconds"] == pytest.approx(2 * one["seconds"])
    assert sum(two["parts"].values()) == pytest.approx(two["seconds"])
    assert two["sent"] == 0
    several = scale_model.predict(blocks(2), method, TEXT, 4, replace(RATES, link=1e30))
    assert several["seconds"] - several["parts"].get("check", 0.0) < two["seconds"]
    assert several["sent"] > 0


def test_a_measured_run_is_predicted_by_the_blocks_that_it_had() -> None:
    rows = [row("rtn", 1, 100), row("gptq", 1, 700), row("gptq", 1, 600, kept=1), row("awq", 1, 500)]
    rows.append(row("gptq", 1, 9) | {"model": "other"})
    whole, part = list(scale_model.beside("some", blocks(2), rows, RATES))[1:]
    assert [whole["blocks"], part["blocks"]] == [2, 1]
    assert whole["seconds"] == pytest.approx(2 * part["seconds"])
    assert [whole["measured_bytes"], part["measured_bytes"]] == [600, 500], "less what rtn takes in one process"


def test_every_rate_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    monkeypatch.setattr(scale_rates, "seconds_of", once)
    rates = asdict(scale_rates.measure(64, 128, torch.float32))
    assert {name for name, rate in rates.items() if not rate > 0} <= {"column"}, "too small a matrix to see it"
