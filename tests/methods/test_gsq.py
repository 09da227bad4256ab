"""GSQ: its gradient and its noise in closed form, its limits, where it starts and what it keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.methods import W4, generator, run, same
from helpers.notes import Notes
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.job import Job, load_method
from qtool.blocks.task import BlockTask
from qtool.config.quant import BITS, QuantConfig, QuantSpec
from qtool.methods.gsq import Config, assignment, quantize_block, training
from qtool.methods.gsq.assignment import AssignmentLinear, Candidates, Draw, Ramp, soft_codes
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight, minmax_qparams, quantize
from qtool.system import progress
from qtool.training.block_loss import BlockLoss, Windows
from qtool.training.block_training import split_windows

W2A = QuantConfig(num_bits=2, group_size=16, symmetric=False)
ROWS, COLUMNS = 5, 8


def candidates(every: bool) -> Candidates:
    """All codes of 2 bits, or the shifts from start codes of 3 bits, of which some leave the grid."""
    if every:
        return Candidates((0, 1, 2, 3), None, 3)
    base = torch.randint(8, (ROWS, COLUMNS), generator=generator(2)).to(torch.uint8)
    base[0, :2] = torch.tensor([0, 7])
    return Candidates((-2, -1, 0, 1, 2), base, 7)


def logits_of(found: Candidates) -> Tensor:
    size = (len(found.values), ROWS, COLUMNS)
    return torch.randn(size, generator=generator(0), dtype=torch.float64).requires_grad_()


def by_definition(logits: Tensor, found: Candidates, draw: Draw, rows: int) -> Tensor:
    """The mean code, from noise that is drawn for ``rows`` rows at a time, by operations that autograd knows."""
    source, noise = generator(draw.seed), []
    for part in logits.detach().split(rows, dim=1):
        uniform = torch.empty_like(part, memory_format=torch.contiguous_format).uniform_(generator=source)
        noise.append(-torch.log(-torch.log(uniform)))
    codes = torch.tensor(found.values, dtype=torch.float64).view(-1, 1, 1).expand_as(logits)
    if found.base is not None:
        codes = codes + found.base
    legal = (codes >= 0) & (codes <= found.highest)
    noisy = torch.where(legal, (draw.strength * logits + torch.cat(noise, 1)) / draw.temperature, -1e9)
    return (noisy.softmax(0) * codes).sum(0)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("rows", [2, 100])
def test_value_and_gradient_are_those_of_the_definition(
    every: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the weight is processed a few rows at a time, with the noise of each drawn again."""
    monkeypatch.setattr(assignment, "CHUNK_NUMBERS", {"cpu": rows * COLUMNS})
    found, draw = candidates(every), Draw(3.0, 0.7, 11)
    weights = torch.randn(ROWS, COLUMNS, generator=generator(1), dtype=torch.float64)
    ours, theirs = logits_of(found), logits_of(found)
    value, expected = soft_codes(ours, found, draw), by_definition(theirs, found, draw, rows)
    assert torch.allclose(value, expected, rtol=0, atol=1e-12)
    (value * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert float(theirs.grad.abs().max()) > 0.1
    assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_nothing_but_the_logits_is_kept_for_the_backward() -> None:
    found, kept = candidates(True), list[Tensor]()
    logits = logits_of(found)

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        soft_codes(logits, found, Draw(3.0, 0.7, 0))
    assert [each.data_ptr() for each in kept] == [logits.data_ptr()]


def test_a_cold_choice_is_a_sample_of_the_softmax_of_the_logits() -> None:
    """The Gumbel-max law: the largest of logits and noise has the probabilities of their softmax."""
    logits = torch.tensor([0.0, 1.0, -0.5, 0.3]).view(4, 1, 1).expand(4, 200, 200)
    chosen = soft_codes(logits, Candidates((0, 1, 2, 3), None, 3), Draw(1.5, 1e-6, 5))
    assert float((chosen - chosen.round()).abs().mean()) < 1e-4
    shares = torch.stack([(chosen.round() == code).float().mean() for code in range(4)])
    assert torch.allclose(shares, (1.5 * logits[:, 0, 0]).softmax(0), atol=0.01)


@pytest.mark.parametrize("every", [True, False])
def test_strong_logits_leave_the_code_with_the_largest_logit_whatever_the_noise(every: bool) -> None:
    found = candidates(every)
    logits = logits_of(found).detach()
    hard = found.hard(logits)
    assert torch.allclose(soft_codes(logits, found, Draw(1e7, 0.05, 3)), hard)
    assert bool(((hard >= 0) & (hard <= found.highest)).all())


@given(st.sampled_from(BITS), st.booleans(), st.sampled_from(["code", "weight", "beyond"]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_layer_starts_at_the_codes_it_is_given_bit_for_bit(bits: int, symmetric: bool, at: str, seed: int) -> None:
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=symmetric)
    weight = torch.randn(6, 32, generator=generator(seed))
    scale, zero_point = minmax_qparams(weight, spec)
    start = QuantizedWeight(quantize(weight, scale, zero_point, spec), scale, zero_point, spec)
    position = start.codes + {"code": 0.0, "weight": 0.3, "beyond": -7.0}[at]
    layer = AssignmentLinear(start, position, None, Ramp(3, 15), Ramp(2, 0.05), 10, seed)
    for ours, given_part in zip(layer.quantized[:3], start[:3], strict=True):
        assert torch.equal(ours, given_part)
    with torch.no_grad():
        assert torch.equal(layer.quantized_weight(), layer.freeze().dequantized(torch.float32))


def test_the_nearest_other_code_is_tried_first() -> None:
    spec = QuantSpec(num_bits=2, group_size=4, symmetric=False)
    start = QuantizedWeight(torch.tensor([[1, 1, 2, 2]]).to(torch.uint8), torch.ones(1, 1), torch.zeros(1, 1), spec)
    layer = AssignmentLinear(start, torch.tensor([[0.8, 1.3, 2.1, 1.6]]), None, Ramp(3, 15), Ramp(2, 0.05), 10, 0)
    assert layer.logits.topk(2, dim=0).indices[1, 0].tolist() == [0, 2, 3, 1]


def test_every_step_and_layer_has_noise_of_its_own() -> None:
    spec = QuantSpec(num_bits=2, group_size=16, symmetric=False)
    start = QuantizedWeight(torch.ones(4, 16, dtype=torch.uint8), torch.ones(4, 1), torch.zeros(4, 1), spec)
    layers = [AssignmentLinear(start, None, None, Ramp(3, 15), Ramp(2, 0.05), 10, seed) for seed in (0, 10)]
    seen = []
    for layer in layers:
        for step in range(10):
            layer.set_progress(step / 10)
            seen.append(layer.draw.seed)
    assert len(set(seen)) == 20
    layers[0].set_progress(0.5)
    assert (layers[0].draw.strength, layers[0].draw.temperature) == pytest.approx((9, 1.025))


@pytest.mark.parametrize("quant", [W4, W2A], ids=QuantConfig.label)
def test_without_training_it_is_gptq(make_llama: Callable[[], LoadedModel], tokens: Tensor, quant: QuantConfig) -> None:
    assert same(
        run(load_method("gsq"), make_llama(), tokens, quant, epochs=0.0),
        run(load_method("gptq"), make_llama(), tokens, quant),
    )


@pytest.mark.parametrize("init", ["gptq", "search"])
def test_training_lowers_the_loss_and_packs_the_state_that_had_the_lowest(
    llama: LoadedModel, tokens: Tensor, init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    measure = training.AssignmentTraining.measure

    def recorded(self: training.AssignmentTraining, held: list[int]) -> float:
        seen.append(measure(self, held))
        return seen[-1]

    monkeypatch.setattr(training.AssignmentTraining, "measure", recorded)
    config = Config(epochs=1, min_steps=24, travel=1.0, init=init)

    def step(task: BlockTask) -> dict[str, float]:
        seen.clear()
        figures = quantize_block(task, config, 0)
        assert task.float_outputs is not None
        distance = BlockLoss(task.float_outputs)
        count = sum(batch.shape[0] for batch in task.inputs)
        _, held = split_windows(count, config.validation_samples)
        with torch.no_grad():
            outputs = task.forward(Windows(task.inputs)[held])
            loss = float(distance.summed(held, outputs)) / distance.count(held)
        assert loss == pytest.approx(min(seen), rel=1e-6)
        assert (figures["start_loss"], figures["loss"], figures["hard_loss"]) == (seen[0], min(seen), seen[-1])
        return figures

    result = run_blocks(Job.select(llama, W2A, tokens), step, with_float_states=True)
    assert all(after < before for before, after in zip(result.values("start_loss"), result.values("loss"), strict=True))
    assert all(0 < share < 0.5 for share in result.values("changed"))


def test_a_gap_between_soft_and_hard_codes_is_noted(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(epochs=0.1, min_steps=4)
    result = load_method("gsq").run(Job.select(make_llama(), W2A, tokens), config)
    losses = zip(result.values("hard_loss"), result.values("soft_loss"), strict=True)
    gaps = sorted(hard / soft for hard, soft in losses)
    for least, expected in ((0.99 * gaps[0], 2), ((gaps[0] + gaps[1]) / 2, 1), (1.01 * gaps[1], 0)):
        monkeypatch.setattr(training, "SOFT_GAP", least)
        notes = Notes()
        with progress.use(notes):
            load_method("gsq").run(Job.select(make_llama(), W2A, tokens), config)
        assert sum("times that of soft ones" in each for each in notes.texts) == expected


def test_a_loss_that_is_not_finite_leaves_the_block_at_its_start(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(load_method("gptq"), make_llama(), tokens, W2A)
    loss = BlockLoss.summed
    monkeypatch.setattr(
        BlockLoss, "summed", lambda *args: loss(*args) * (torch.nan if torch.is_grad_enabled() else 1.0)
    )
    loaded = make_llama()
    result = load_method("gsq").run(Job.select(loaded, W2A, tokens), Config())
    assert result.values("fallback") == (1.0, 1.0)
    assert same({name: layer.quantized for name, layer in packed_linears(loaded.model).items()}, expected)


def test_the_goal_may_be_the_float_block_on_the_quantized_models_inputs(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    goals: list[Tensor] = []
    before = BlockLoss.__init__

    def kept(self: BlockLoss, goal: HiddenStates, **keys: Any) -> None:
        goals.append(goal[0].clone())
        before(self, goal, **keys)

    monkeypatch.setattr(BlockLoss, "__init__", kept)

    def step(task: BlockTask) -> dict[str, float]:
        expected = task.forward(task.inputs[0]).detach()
        figures = quantize_block(task, Config(epochs=0, goal="inputs"), 0)
        assert torch.equal(goals[-1], expected)
        assert task.float_outputs is not None
        assert torch.equal(goals[-1], task.float_outputs[0]) == (task.index == 0)
        return figures

    run_blocks(Job.select(llama, W2A, tokens), step, with_float_states=True)
    assert len(goals) == 2


def test_predictions_of_the_last_block_are_compared_with_the_float_models_alone() -> None:
    with pytest.raises(ValidationError, match="needs goal: float"):
        Config(goal="inputs", last_block_loss="kl")
    Config(goal="float", last_block_loss="kl")


def test_efficientqat_trains_assignments_from_the_codes_of_its_blocks(
    make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    keys: dict[str, Any] = {"epochs": 0.1, "min_steps": 8, "batch_size": 2, "e2e": {"steps": 0}}
    method = load_method("efficientqat")
    stage = {"epochs": 1, "min_steps": 16, "travel": 1.0}
    with_stage = method.run(Job.select(make_llama(), W2A, tokens), method.config(**keys, gsq=stage))
    alone = method.run(Job.select(make_llama(), W2A, tokens), method.config(**keys))
    assert with_stage.values("loss")[0] == alone.values("loss")[0]
    assert with_stage.values("gsq_start_loss")[0] == pytest.approx(alone.values("loss")[0], rel=1e-5)
    assert all(0 < share < 0.5 for share in with_stage.values("gsq_changed"))
    assert with_stage.values("gsq_loss")[0] < with_stage.values("gsq_start_loss")[0]
    assert not any(series.name.startswith("gsq") for series in alone.series)
