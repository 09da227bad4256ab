"""SignRound: its limits, its gradients in closed form, what it keeps, and what it must never do."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.rounding_layers import random_layer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.blocks.driver import run_blocks
from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.job import Job
from qtool.blocks.task import BlockTask
from qtool.config import recipe
from qtool.config.quant import BITS, QuantConfig, QuantSpec
from qtool.methods import rtn, signround
from qtool.methods.signround import RoundingTraining, checked_after
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight, minmax_qparams, quantize
from qtool.quant.ranges import search_qparams
from qtool.training.block_loss import BlockLoss, Windows

W3 = QuantConfig(num_bits=3, group_size=16)
W2A = QuantConfig(num_bits=2, group_size=16, symmetric=False)


def run(loaded: LoadedModel, tokens: Tensor, quant: QuantConfig, seed: int = 0, **settings: Any) -> tuple[float, ...]:
    config = signround.Config(**{"iterations": 24} | settings)
    return signround.run(Job.select(loaded, quant, tokens, seed=seed), config).values("block_error")


def weights(loaded: LoadedModel) -> dict[str, QuantizedWeight]:
    return {name: layer.quantized for name, layer in packed_linears(loaded.model).items()}


def same(one: LoadedModel, other: LoadedModel) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(
        torch.equal(a, b) for name in ours for a, b in zip(ours[name][:3], theirs[name][:3], strict=True)
    )


def captured(monkeypatch: pytest.MonkeyPatch) -> list[RoundingTraining]:
    """Collect the training of every block that follows, with its layers as the last step left them."""
    found: list[RoundingTraining] = []
    original = RoundingTraining.run

    def keep(self: RoundingTraining, seed: int) -> list[QuantizedWeight]:
        found.append(self)
        return original(self, seed)

    monkeypatch.setattr(RoundingTraining, "run", keep)
    return found


# ------------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_no_iterations_on_min_max_ranges_are_round_to_nearest(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, bits: int, symmetric: bool
) -> None:
    quant = QuantConfig(num_bits=bits, group_size=16, symmetric=symmetric)
    ours, nearest = make_llama(), make_llama()
    run(ours, tokens, quant, iterations=0, range="minmax")
    rtn.run(Job.select(nearest, quant), rtn.Config())
    assert same(ours, nearest)


@pytest.mark.parametrize("quant", [W3, W2A], ids=QuantConfig.label)
def test_parameters_that_cannot_travel_change_nothing(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, quant: QuantConfig
) -> None:
    still, untrained = make_llama(), make_llama()
    run(still, tokens, quant, travel=0, range_travel=0)
    run(untrained, tokens, quant, iterations=0)
    assert same(still, untrained)


def test_the_search_weighs_channels_by_the_mean_square_of_what_the_linear_reads(
    make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    ours, floats = make_llama(), make_llama()
    name = "model.layers.0.mlp.down_proj"
    run(ours, tokens, W3, iterations=0, range="search")
    found: list[Tensor] = []
    floats.model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, 1)))
    floats.model(tokens)
    spec, weight = weights(ours)[name].spec, floats.model.get_parameter(f"{name}.weight").detach()
    expected = search_qparams(weight, spec, 3.0, found[0].square().mean(0))
    plain = search_qparams(weight, spec, 3.0)
    assert torch.equal(weights(ours)[name].scale, expected[0])
    assert not torch.equal(expected[0], plain[0])


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("quant", [W3, W2A], ids=QuantConfig.label)
def test_training_lowers_the_error_of_every_block(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, quant: QuantConfig
) -> None:
    nearest = run(make_llama(), tokens, quant, iterations=0, range="minmax")
    start = run(make_llama(), tokens, quant, iterations=0)
    trained = run(make_llama(), tokens, quant, iterations=60)
    assert all(ours < 0.6 * theirs for ours, theirs in zip(trained, nearest, strict=True)), (trained, nearest)
    assert all(ours < 0.8 * theirs for ours, theirs in zip(trained, start, strict=True)), (trained, start)


@pytest.mark.parametrize("quant", [W3, W2A], ids=QuantConfig.label)
def test_when_every_step_does_harm_the_start_is_kept(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, quant: QuantConfig
) -> None:
    wild, untrained = make_llama(), make_llama()
    run(wild, tokens, quant, iterations=8, travel=200, range_travel=0)
    run(untrained, tokens, quant, iterations=0)
    assert same(wild, untrained)


@pytest.mark.parametrize("quant", [W3, W2A], ids=QuantConfig.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packed_block_has_the_very_loss_that_the_best_state_had(
    quant: QuantConfig, dtype: torch.dtype, make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    """So training and the packed file multiply by the same bits."""
    loaded = make_llama()
    tiny.moved(loaded.model, dtype)
    seen: list[float] = []
    measure = RoundingTraining.measure

    def recorded(self: RoundingTraining, indices: list[int]) -> float:
        seen.append(measure(self, indices))
        return seen[-1]

    def step(task: BlockTask) -> None:
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RoundingTraining, "measure", recorded)
            signround.quantize_block(task, signround.Config(iterations=24, outliers=0), 0)
        assert task.float_outputs is not None
        distance = BlockLoss(task.float_outputs)
        assert float(distance.summed(range(len(task.inputs[0])), task.forward(task.inputs[0]))) == min(seen)
        assert min(seen) < seen[0]

    run_blocks(Job.select(loaded, quant, tokens), step, with_float_states=True)


def test_the_goal_is_the_float_model_and_the_input_the_quantized_one(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings, loaded = captured(monkeypatch), make_llama()
    model, last = make_llama().model, []
    model.get_submodule("model.layers.1").register_forward_hook(lambda block, args, out: last.append(out))
    floats = model(tokens, output_hidden_states=True).hidden_states  # of which the last is after the norm
    run(loaded, tokens, W2A)
    assert torch.equal(trainings[0].task.inputs[0], floats[0])
    assert torch.allclose(trainings[0].distance.goal.hidden[0], floats[1], atol=1e-5)
    assert torch.allclose(trainings[1].distance.goal.hidden[0], last[0], atol=1e-5)
    drift = (trainings[1].task.inputs[0] - floats[1]).norm() / floats[1].norm()
    assert float(drift) > 0.01


def test_every_trainable_parameter_moves_and_none_beyond_its_travel(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = captured(monkeypatch)
    run(llama, tokens, W2A, travel=0.3, range_travel=0.2)
    for layer in (layer for training in trainings for layer in training.layers):
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["offset", "factors"]
        assert float((layer.offset != 0).float().mean()) > 0.7  # but for weights outside their range all the time
        assert float(layer.offset.detach().abs().max()) <= 0.3 * 1.0001
        for end in layer.factors.detach():
            assert float((end != 1).float().mean()) > 0.7
            assert float((end - 1).abs().max()) <= 0.2 * 1.0001


def test_the_rate_falls_linearly_and_adds_up_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(RoundingTraining, "step", lambda self, indices, share: shares.append(share))
    monkeypatch.setattr(RoundingTraining, "measure", lambda self, indices: 0.0)
    task: Any = SimpleNamespace(inputs=HiddenStates(None, [torch.zeros(1, 2, 4)] * 3), calls={1: None})
    layer = random_layer(QuantSpec(group_size=16))
    RoundingTraining(task, BlockLoss(HiddenStates(None)), [layer], signround.Config(iterations=10)).run(0)
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([shares[-1] * n for n in range(10, 0, -1)])


@pytest.mark.parametrize("batch_size", [1, 3, 6, 40])
def test_a_step_reads_as_many_windows_as_the_recipe_says(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """However many short windows the hidden states hold in one batch."""
    many = tokens.repeat(16, 5)[:20]
    seen: list[list[int]] = []
    held = Windows.held

    def recorded(self: Windows, indices: Sequence[int]) -> list[int]:
        seen.append(list(indices))
        return held(self, indices)

    monkeypatch.setattr(Windows, "held", recorded)
    run(llama, many, W3, batch_size=batch_size, check_samples=20, iterations=4)
    steps = [indices for indices in seen if len(indices) != 20 or batch_size == 40]
    assert {len(indices) for indices in steps} == {min(batch_size, 20)}
    assert all(len({*indices}) == len(indices) for indices in steps)


@given(st.integers(1, 2000))
def test_the_last_state_is_always_compared_and_others_are_some_steps_apart(iterations: int) -> None:
    marks = sorted(checked_after(iterations))
    assert marks[-1] == iterations
    assert len(marks) <= 8
    assert len(marks) == 1 or min(b - a for a, b in pairwise([0, *marks])) >= 12


@pytest.mark.parametrize(("bits", "kept"), [(2, 90), (3, 90), (4, 100), (8, 100)])
def test_the_largest_differences_are_left_out_below_four_bits(bits: int, kept: int) -> None:
    x = torch.randn(1, 10, 10, generator=torch.Generator().manual_seed(0))
    task: Any = SimpleNamespace(inputs=HiddenStates(None, [x]), forward=lambda hidden: hidden + 1, calls={1: None})
    layer = random_layer(QuantSpec(num_bits=bits, group_size=16))
    config = signround.Config(outliers=0.1)
    distance = BlockLoss(HiddenStates(None, [torch.ones_like(x)]), signround.outliers_of([layer], config))
    training = RoundingTraining(task, distance, [layer], config)
    expected = x.flatten().square().sort().values[:kept].sum()
    assert float(next(training.losses([0]))) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_keep_their_sign_however_far_ranges_travel(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, symmetric: bool
) -> None:
    trainings = captured(monkeypatch)
    quant = QuantConfig(num_bits=2, group_size=16, symmetric=symmetric)
    run(llama, tokens, quant, range_travel=30, iterations=6)
    layers = [layer for training in trainings for layer in training.layers]
    assert any(bool((layer.scale < 0).any()) for layer in layers) == symmetric
    assert all(bool((layer.qparams()[0] * layer.scale.sign() > 0).all()) for layer in layers)
    factors = torch.cat([layer.factors.detach().flatten() for layer in layers])
    assert (float(factors.min()), float(factors.max())) == pytest.approx(signround.FACTORS)
    signs = [layer.scale.sign() for layer in layers]
    found = [weight.scale.sign() for weight in weights(llama).values()]
    assert all(torch.equal(one, other) for one, other in zip(found, signs, strict=True))


# ---------------------------------------------------------------------------------------------- seeds, presets, keys


def test_the_seed_decides_the_minibatches(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    many = tokens.repeat(16, 5)  # several batches of several windows
    first, again, other = make_llama(), make_llama(), make_llama()
    for loaded, seed in ((first, 0), (again, 0), (other, 1)):
        run(loaded, many, W3, seed, iterations=4)
    assert same(first, again)
    assert not same(first, other)


def test_a_block_does_not_depend_on_how_those_before_it_were_made(
    make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    """What resuming a run relies on: its seed and its index fix a block, no state is carried over."""
    whole, resumed = make_llama(), make_llama()
    run(whole, tokens, W3)
    finished = weights(whole)

    def step(task: BlockTask) -> None:
        if task.index == 1:
            return signround.quantize_block(task, signround.Config(iterations=24), 0)
        assert task.float_inputs is not None
        task.float_outputs = task.through(task.float_inputs)
        for target in task.targets:
            task.pack(target, finished[target.name])
        return None

    run_blocks(Job.select(resumed, W3, tokens), step, with_float_states=True)
    assert same(whole, resumed)


def test_float_parameters_are_left_alone(llama: LoadedModel, tokens: Tensor) -> None:
    before = copy.deepcopy(llama.model)
    run(llama, tokens, W3)
    for name, parameter in llama.model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)), name
        assert not parameter.requires_grad, name


def test_a_preset_asks_for_its_number_of_windows_and_the_recipe_decides(tmp_path: Path) -> None:
    def windows(*overrides: str) -> int:
        return recipe.load("signround-w4g64", [f"output.path={tmp_path}/out", *overrides]).data.num_samples

    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{path: m}}\nmethod: {{name: signround, preset: best}}\noutput: {{path: {tmp_path}/out}}\n"
    )
    assert recipe.load(file).data.num_samples == 512
    assert recipe.load(file, ["data.num_samples=7"]).data.num_samples == 7
    assert recipe.load(file, ["method.preset=light"]).data.num_samples == 128
    resolved = recipe.resolved(recipe.load(file))
    assert recipe.Recipe.model_validate(resolved).data.num_samples == 512
    assert windows() == 128


class Choice(nn.Module):
    """An activation that passes no gradient on, as a choice does."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.detach() > 0).to(x)


def test_a_linear_whose_output_only_chooses_stays_rounded_to_nearest(llama: LoadedModel, tokens: Tensor) -> None:
    gates = [f"{name}.mlp.gate_proj" for name, _ in llama.blocks()]
    for _, block in llama.blocks():
        block.set_submodule("mlp.act_fn", Choice())
    float_weights = {name: llama.model.get_parameter(f"{name}.weight").detach().clone() for name in gates}
    run(llama, tokens, W2A)
    for name, weight in float_weights.items():
        found = weights(llama)[name]
        assert torch.equal(found.codes, quantize(weight, *minmax_qparams(weight, found.spec), found.spec))
