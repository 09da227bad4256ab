"""The pitfalls of EfficientQAT's released code, one by one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.efficientqat import STILL, W2A, W3, Make, captured, config, random_layer, run, same, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.job import Job
from qtool.blocks.task import BlockTask
from qtool.config.quant import BITS, QuantSpec
from qtool.methods.efficientqat import block_ap
from qtool.models.loaded import LoadedModel
from qtool.system import progress
from qtool.training import block_training
from qtool.training.block_loss import BlockLoss, Windows
from qtool.training.block_training import BlockTraining, split_windows


@given(st.sampled_from(BITS), st.booleans(), st.sampled_from([0, 3]), st.integers(0, 999))
def test_zero_points_and_codes_stay_on_the_grid_where_they_are_used_and_packed(
    bits: int, float_zero: bool, rank: int, seed: int
) -> None:
    """However far masters drift: what is packed expands to the very weight that training multiplied by."""
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=False, float_zero=float_zero)
    layer = random_layer(spec, rank, seed)
    used = layer.quantized_weight().detach()
    packed = layer.freeze()
    assert torch.equal(packed.dequantized(), used)
    codes, _, zero_point, _ = packed.quantized
    assert int(codes.max()) <= spec.qmax
    if not float_zero:
        assert bool(((zero_point >= 0) & (zero_point <= spec.qmax) & (zero_point == zero_point.round())).all())


def test_zero_points_that_drift_far_are_packed_as_they_were_used(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = captured(monkeypatch)
    run(llama, tokens, W2A, zero_travel=60, travel=0)
    masters = torch.cat([layer.zero_point.detach().flatten() for t in trainings for layer in t.layers])
    assert bool(((masters < -0.5) | (masters > 3.5)).any())  # some are beyond the grid
    assert all(bool(((w.zero_point >= 0) & (w.zero_point <= 3)).all()) for w in weights(llama).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packed_block_has_the_very_loss_that_the_best_state_had(
    dtype: torch.dtype, make_llama: Make, tokens: Tensor
) -> None:
    """The best state of all that were measured, and not the last; norms as they are stored."""
    loaded = make_llama()
    tiny.moved(loaded.model, dtype)
    many = tokens.repeat(4, 1)
    seen: list[float] = []
    measure = BlockTraining.measure

    def recorded(self: BlockTraining, indices: list[int]) -> float:
        assert indices == [5, 15]
        seen.append(measure(self, indices))
        return seen[-1]

    def step(task: BlockTask) -> None:
        seen.clear()
        training: list[BlockTraining] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BlockTraining, "measure", recorded)
            training = captured(patch)
            block_ap.quantize_block(task, loaded, config(travel=8, validation_samples=2), None, 0)
        assert len(seen) == 1 + block_training.NUM_CHECKS
        assert training[0].measure([5, 15]) == min(seen)  # with the packed layers in their places

    run_blocks(Job.select(loaded, W2A, many), step, with_float_states=True)


def test_when_every_step_does_harm_the_start_is_kept(make_llama: Make, tokens: Tensor) -> None:
    wild, untrained = make_llama(), make_llama()
    run(wild, tokens, W2A, travel=500, norm_travel=50)
    run(untrained, tokens, W2A, epochs=0)
    assert same(wild, untrained)


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_loss_that_is_not_finite_is_answered(
    make_llama: Make, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """By the same training at lower rates, and at last by round-to-nearest, with a note and a figure."""
    fine, ours = make_llama(), make_llama()
    lower: dict[str, Any] = (
        {key: value * block_ap.RETRIES[failures] for key, value in travels().items()} if failures < 3 else {}
    )
    run(fine, tokens, W2A, **(lower or {"epochs": 0}))
    notes: list[str] = []
    rounds, loss, original = [0], BlockTraining.part_loss, BlockTraining.run
    monkeypatch.setattr(progress, "note", notes.append)

    def counted(self: BlockTraining, *args: Any) -> Any:
        rounds[0] += 1
        return original(self, *args)

    def broken(self: BlockTraining, indices: list[int]) -> Tensor:
        found = loss(self, indices)
        return (
            found * float("nan")
            if torch.is_grad_enabled() and (rounds[0] - 1) % (failures + 1 if failures < 3 else 3) < failures
            else found
        )

    monkeypatch.setattr(BlockTraining, "run", counted)
    monkeypatch.setattr(BlockTraining, "part_loss", broken)
    series = run(ours, tokens, W2A)
    assert same(fine, ours)
    assert series["retries"] == [min(failures, 2)] * 2
    assert series["fallback"] == [float(failures == 3)] * 2
    assert len(notes) == 2 * (failures + (failures == 3))
    assert "model.layers.0" in notes[0]


def travels() -> dict[str, float]:
    """The default travels of Block-AP."""
    return {key: getattr(config(), key) for key in STILL}


def test_gradients_are_cut_where_asked_to(make_llama: Make, tokens: Tensor) -> None:
    """With a large ``eps`` steps of Adam are in proportion to gradients, so a cut is seen."""
    free, cut, untrained = make_llama(), make_llama(), make_llama()
    optim = {"eps": 1e-3}
    run(free, tokens, W2A, optim=optim)
    run(cut, tokens, W2A, optim=optim | {"max_grad_norm": 1e-12})
    run(untrained, tokens, W2A, epochs=0)
    assert same(cut, untrained)
    assert not same(free, untrained)


def test_windows_are_shuffled_by_the_seed(make_llama: Make, tokens: Tensor) -> None:
    first, again, other = make_llama(), make_llama(), make_llama()
    for loaded, seed in ((first, 0), (again, 0), (other, 1)):
        run(loaded, tokens, W3, seed, min_steps=5, travel=0.3)
    assert same(first, again)
    assert not same(first, other)


@given(st.integers(1, 400), st.integers(1, 40))
def test_windows_held_out_are_not_trained_on(count: int, wanted: int) -> None:
    windows, held = split_windows(count, wanted)
    assert windows
    assert windows == sorted(set(windows))
    assert 1 <= len(held) == len(set(held)) <= wanted
    if count >= block_training.HELD_OUT:
        assert sorted([*windows, *held]) == list(range(count))
        assert len(held) == min(wanted, count // block_training.HELD_OUT)
    else:
        assert windows == list(range(count))


def test_windows_come_from_any_batch_in_the_order_asked_for() -> None:
    x = torch.arange(7 * 2 * 3.0).view(7, 2, 3)
    windows = Windows(HiddenStates(None, x.split(3)))
    assert len(windows) == 7
    assert torch.equal(windows[[6, 0, 4]], x[[6, 0, 4]])


def test_a_step_is_worked_on_in_parts_whose_calls_are_known() -> None:
    task: Any = SimpleNamespace(
        inputs=HiddenStates(None, torch.zeros(9, 2, 3).split(3)), calls={1: None, 3: None, 4: None}
    )
    training = BlockTraining(task, BlockLoss(task.inputs), [], [])
    assert list(training.parts([5, 6, 7, 8, 0, 1, 2, 3, 4])) == [[5, 6, 7, 8], [0, 1, 2, 3], [4]]
    assert list(training.parts([2, 1])) == [[2], [1]]
