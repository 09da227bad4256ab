"""Distances of methods that train all blocks at once: the deeper the model, the shorter."""

from pathlib import Path
from typing import Any, NoReturn

import pytest
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.blocks.job import Job, load_method
from qtool.config.quant import QuantConfig
from qtool.models.described import keep_first
from qtool.training.fit import ParamGroup
from qtool.training.linears import Start
from qtool.training.rates import START_MARGIN, end_to_end_total, of_depth

QUANT = QuantConfig(num_bits=3, group_size=32, symmetric=False)
METHODS: dict[str, dict[str, Any]] = {
    "efficientqat": {"epochs": 0},
    "lrqat": {"rank": 4, "factors": "zero"},
    "lsq": {},
    "paretoq": {},
    "qat": {},
}


class Begun(Exception):
    """The training would begin."""


@given(st.floats(1e-3, 1e6), st.integers(1, 200))
def test_a_model_of_n_blocks_has_four_nths_of_the_distances(total: float, num_blocks: int) -> None:
    expected = total if num_blocks <= 4 else total * num_blocks / 4
    assert end_to_end_total(total, num_blocks) == pytest.approx(expected)


@given(st.floats(0, 10), st.integers(1, 200))
def test_a_distance_and_the_total_that_divides_it_follow_depth_alike(distance: float, num_blocks: int) -> None:
    assert of_depth(distance, num_blocks) / 7.0 == pytest.approx(distance / end_to_end_total(7.0, num_blocks))


def test_starts_are_nearer_to_the_edges_of_their_cells_in_deep_models(
    tmp_path: Path, tokens: Tensor, rates: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    margins: list[float] = []

    def take(start: Start, layers: Any, margin: float) -> None:
        margins.append(margin)

    monkeypatch.setattr(Start, "take_codes", take)
    for blocks in (2, 8):
        folder = tiny.llama(tmp_path / f"model-{blocks}", blocks=blocks)
        tiny.quantize(folder, tmp_path / f"start-{blocks}", QUANT)
        begin_training(folder, blocks, "lsq", tokens, {"init_from": str(tmp_path / f"start-{blocks}")})
    assert set(margins[:2]) == {START_MARGIN}
    assert set(margins[2:]) == {START_MARGIN / 2}


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The rates of all trainings that would begin, none of which does."""
    found: list[list[float]] = []

    def begin(job: Job, teacher: Any, groups: list[ParamGroup], *args: Any, **kwargs: Any) -> NoReturn:
        found.append([group.lr for group in groups])
        raise Begun

    for module in ("qtool.training.linears", "qtool.methods.efficientqat.e2e_qp"):
        monkeypatch.setattr(f"{module}.train_model", begin)
    return found


def begin_training(folder: Path, blocks: int, method: str, tokens: Tensor, keys: dict[str, Any]) -> None:
    """Begin a training of the first ``blocks`` blocks of a model."""
    loaded, chosen = tiny.load(folder), load_method(method)
    keep_first(loaded, blocks)
    with pytest.raises(Begun):
        chosen.run(Job.select(loaded, QUANT, tokens, seed=0), chosen.config.model_validate(keys))


@pytest.mark.parametrize("method", METHODS)
def test_twice_as_many_blocks_have_half_of_each_rate_but_of_low_rank_factors(
    method: str, tmp_path: Path, tokens: Tensor, rates: list[list[float]]
) -> None:
    folder = tiny.llama(tmp_path / "model", blocks=8)
    for blocks in (4, 8):
        begin_training(folder, blocks, method, tokens, METHODS[method])
    shallow, deep = rates
    # the groups of a linear of lrqat: A and B, and its scales
    factors = [1.0, 0.5] * (len(shallow) // 2) if method == "lrqat" else [0.5] * len(shallow)
    assert deep[: len(shallow)] == pytest.approx([rate * by for rate, by in zip(shallow, factors, strict=True)])


def test_a_rate_that_is_given_does_not_depend_on_depth(
    tmp_path: Path, tokens: Tensor, rates: list[list[float]]
) -> None:
    folder = tiny.llama(tmp_path / "model", blocks=8)
    begin_training(folder, 8, "efficientqat", tokens, {"epochs": 0, "e2e": {"lr": 2e-5}})
    assert set(rates[0]) == {2e-5}
