"""The memory of a training is what its shapes say, and holds nothing that is not needed."""

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn

from qtool.blocks.job import Job
from qtool.config import recipe
from qtool.config.quant import QuantConfig
from qtool.methods import lrqat
from qtool.models.loaded import LoadedModel
from qtool.pipelines import quantize
from qtool.training import end_to_end

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
from lrqat_memory import BLOCK_AP, FORMS, compared, measure
from memory_accounting import Cell, Shape, peak_bytes

SMALL = Shape(hidden=64, mlp=96, blocks=2, vocabulary=320, heads=4, batch=1, length=24)
WIDE = Shape(hidden=128, mlp=352, blocks=3, vocabulary=512, heads=4, batch=2, length=40)  # weights are most of it
CELLS = {
    **{f"lrqat-{form}": Cell("lrqat", form, rank=4) for form in FORMS},
    "lrqat-groups": Cell("lrqat", "codes", num_bits=3, group_size=32, symmetric=False, rank=4),
    "lrqat-weights-held": Cell("lrqat", weights_again=False, rank=4),
    "lrqat-blocks-again": Cell("lrqat", blocks_again=True, rank=4),
    "lrqat-blocks-again-weights-held": Cell("lrqat", weights_again=False, blocks_again=True, rank=4),
    "lsq": Cell("lsq"),
    "lsq-groups": Cell("lsq", num_bits=2, group_size=32, symmetric=False),
    "lsq-blocks-again": Cell("lsq", blocks_again=True),
    "block-ap": replace(BLOCK_AP, group_size=32),
    "block-ap-symmetric": Cell("efficientqat", num_bits=4, group_size=32),
}


@pytest.mark.parametrize(("shape", "dtype"), [(SMALL, "float32"), (WIDE, "bfloat16")], ids=["small", "wide"])
@pytest.mark.parametrize("name", CELLS)
def test_what_is_held_and_saved_is_what_the_shapes_say_and_the_peak_within_two_per_cent(
    name: str, shape: Shape, dtype: str
) -> None:
    cell = replace(CELLS[name], dtype=dtype)
    row = compared(shape, cell, measure(shape, cell, torch.device("cpu")))
    assert row["held"] == row["held computed"]
    assert row["saved"] == row["saved computed"]
    assert row["live"] == pytest.approx(row["live computed"], rel=0.02)
    if cell.method != "efficientqat":
        assert row["others"] == 2 * 8 * shape.batch * shape.length, "nothing but the two steps' tokens"


def test_a_larger_model_takes_more() -> None:
    """The peak grows with every size that the accounting knows."""
    for name, cell in CELLS.items():
        for key in ("hidden", "mlp", "blocks", "batch", "length"):
            larger = replace(WIDE, **{key: 2 * getattr(WIDE, key)})
            more = peak_bytes(larger, cell) > peak_bytes(WIDE, cell)
            assert more or (key == "blocks" and cell.method == "efficientqat"), (name, key)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of float weights alive when a training of the whole model begins, without those of before the test."""
    gc.collect()
    before = {id(each) for each in gc.get_objects() if type(each) is nn.Linear}
    found: list[int] = []
    real = end_to_end.train_model

    def look(job: Job, *arguments: Any, **others: Any) -> Any:
        gc.collect()
        linears = [each for each in gc.get_objects() if type(each) is nn.Linear and id(each) not in before]
        found.append(sum(each.weight is not job.loaded.model.lm_head.weight for each in linears))
        return real(job, *arguments, **others)

    monkeypatch.setattr("qtool.training.linears.train_model", look)
    return found


@pytest.mark.parametrize(("loss", "count"), [("ce", 0), ("kl", 14)])
def test_float_weights_go_when_they_are_replaced_unless_a_teacher_has_them(
    loss: Any, count: int, alive: list[int], make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    quant = QuantConfig(num_bits=4, group_size=16)
    lrqat.run(Job.select(make_llama(), quant, tokens), lrqat.Config(rank=4, steps=1, loss=loss))
    assert alive == [count]


@pytest.mark.parametrize("method", ["lrqat", "lsq"])
def test_a_run_holds_no_float_weights_either(method: str, alive: list[int], llama_folder: Path, tmp_path: Path) -> None:
    raw = {
        "model": {"path": str(llama_folder)},
        "method": {"name": method, "loss": "ce", "steps": 1},
        "quant": {"num_bits": 4, "group_size": 16},
        "data": {"source": str(tiny.text(tmp_path)), "num_samples": 4, "seq_len": 16},
        "output": {"path": str(tmp_path / "out")},
    }
    quantize.quantize(recipe.Recipe.model_validate(raw))
    assert alive == [0]
