"""EfficientQAT: its limits, and what trains and how far."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.efficientqat import STILL, W2A, W3, Make, captured, config, random_layer, run, same, weights
from helpers.weights import gradient
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job
from qtool.blocks.task import BlockTask
from qtool.checkpoints import native, output_folder
from qtool.config import recipe
from qtool.config.quant import BITS, QuantConfig, QuantSpec
from qtool.config.training import OptimConfig
from qtool.methods import efficientqat, gptq, rtn
from qtool.methods.efficientqat import block_ap, e2e_qp
from qtool.methods.efficientqat.block_ap import LowRankBlockLinear
from qtool.methods.efficientqat.config import PARTS, ScaleConfig
from qtool.methods.efficientqat.e2e_qp import ScaleLinear
from qtool.models.loaded import LoadedModel
from qtool.quant import affine
from qtool.quant.affine import minmax_qparams
from qtool.quant.packed_linear import PackedLinear
from qtool.system.errors import InputError
from qtool.training.block_loss import BlockLoss
from qtool.training.block_training import BlockLinear, BlockTraining, Norm, norms_of
from qtool.training.fit import total_factor


def folder(loaded: LoadedModel, path: Path) -> str:
    """``loaded`` as a native checkpoint."""
    with output_folder.atomic_folder(path, overwrite=False) as partial:
        native.save(partial, loaded, tiny.specs(loaded))
    return str(path)


# ------------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_no_epochs_are_round_to_nearest(make_llama: Make, tokens: Tensor, bits: int, symmetric: bool) -> None:
    quant = QuantConfig(num_bits=bits, group_size=16, symmetric=symmetric)
    ours, nearest = make_llama(), make_llama()
    run(ours, tokens, quant, epochs=0)
    rtn.run(Job.select(nearest, quant), rtn.Config())
    assert same(ours, nearest)


@pytest.mark.parametrize("quant", [W3, W2A], ids=QuantConfig.label)
@pytest.mark.parametrize("rank", [0, 4])
def test_what_cannot_travel_changes_nothing(make_llama: Make, tokens: Tensor, quant: QuantConfig, rank: int) -> None:
    still, untrained = make_llama(), make_llama()
    run(still, tokens, quant, low_rank=rank, **STILL)
    run(untrained, tokens, quant, epochs=0)
    assert same(still, untrained)


@pytest.mark.parametrize("settings", [{"scale_share": 0, "zero_travel": 0}, {"lr": 0}, {"steps": 0}], ids=str)
def test_scales_that_cannot_travel_change_nothing(make_llama: Make, tokens: Tensor, settings: dict[str, Any]) -> None:
    both, first = make_llama(), make_llama()
    run(both, tokens, W2A, e2e=settings)
    run(first, tokens, W2A)
    assert same(both, first)


def test_no_steps_are_no_phase_and_the_default_trains(llama: LoadedModel, tokens: Tensor) -> None:
    """The released code's default of its step count, 0, trained nothing without a word."""
    assert not efficientqat.METHOD.end_to_end(config(e2e={"steps": 0}))
    assert efficientqat.METHOD.end_to_end(efficientqat.Config())
    series = run(llama, tokens, W2A, e2e={"batch_size": 2, "epochs": 3})
    assert len(series["e2e_loss"]) == 8  # 3 epochs of 5 windows, two in a step


def test_starting_at_gptq_without_training_is_gptq(make_llama: Make, tokens: Tensor) -> None:
    ours, theirs = make_llama(), make_llama()
    run(ours, tokens, W2A, epochs=0, init="gptq")
    gptq.run(Job.select(theirs, W2A, tokens), gptq.Config())
    assert same(ours, theirs)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("quant", [W3, W2A], ids=QuantConfig.label)
@pytest.mark.parametrize("settings", [{}, {"low_rank": 8}, {"init": "search"}], ids=str)
def test_training_lowers_the_error_of_every_block(
    make_llama: Make, tokens: Tensor, quant: QuantConfig, settings: dict[str, Any]
) -> None:
    start = run(make_llama(), tokens, quant, epochs=0)
    trained = run(make_llama(), tokens, quant, min_steps=60, **settings)
    pairs = list(zip(trained["block_error"], start["block_error"], strict=True))
    most = 1.2 if "low_rank" in settings else 0.7  # the second block's inputs are those of a worse first one
    assert all(ours < most * theirs for ours, theirs in pairs), pairs
    assert pairs[0][0] < 0.5 * pairs[0][1]
    assert all(ours <= theirs for ours, theirs in zip(trained["loss"], trained["start_loss"], strict=True))


def test_the_second_phase_brings_the_model_closer(make_llama: Make, tokens: Tensor) -> None:
    floats = make_llama()
    one, both = make_llama(), make_llama()
    run(one, tokens, W2A)
    series = run(both, tokens, W2A, e2e={"batch_size": 2, "epochs": 10})
    with torch.no_grad():
        goal = floats.model(tokens).logits
        first, second = (float((x.model(tokens).logits - goal).norm()) for x in (one, both))
    assert second < 0.9 * first
    assert sum(series["e2e_loss"][-5:]) < 0.9 * sum(series["e2e_loss"][:5])


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_second_phase_changes_scales_alone(make_llama: Make, tokens: Tensor, loss: str) -> None:
    first, both = make_llama(), make_llama()
    run(first, tokens, W2A)
    run(both, tokens, W2A, e2e={"batch_size": 2, "loss": loss, "trains": ["scales"]})
    before, after = first.model.state_dict(), both.model.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith("weight_scale"):
            assert float((before[name] != after[name]).float().mean()) > 0.5, name
        else:
            assert torch.equal(before[name], after[name]), name


def test_the_second_phase_moves_zero_points_where_asked_to(make_llama: Make, tokens: Tensor) -> None:
    quant = W2A.model_copy(update={"float_zero": True})
    first, both = make_llama(), make_llama()
    run(first, tokens, quant)
    run(both, tokens, quant, e2e={"batch_size": 2, "trains": ["zero_points"]})
    for name, before in weights(first).items():
        after = weights(both)[name]
        assert torch.equal(before.codes, after.codes)
        assert torch.equal(before.scale, after.scale)
        assert float((before.zero_point != after.zero_point).float().mean()) > 0.5, name


@pytest.mark.parametrize("rank", [0, 4])
def test_every_trainable_parameter_moves(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    trainings, floats = captured(monkeypatch), copy.deepcopy(llama.model)
    run(llama, tokens, W2A, low_rank=rank)
    for training in trainings:
        assert len(training.norms) == 2
        for layer in training.layers:
            names = {name for name, p in layer.named_parameters() if p.requires_grad}
            assert names == {"scale", "zero_point", *(("up", "down") if rank else ("weight",))}
    for index, training in enumerate(trainings):
        for name, layer in zip((t.name for t in training.task.targets), training.layers, strict=True):
            scale, zero_point = minmax_qparams(floats.get_parameter(f"{name}.weight").detach(), layer.spec)
            assert float((layer.scale != scale).float().mean()) > 0.9, name
            assert float((layer.zero_point != zero_point).float().mean()) > 0.2, name  # only where something clips
            if isinstance(layer, LowRankBlockLinear):
                assert float((layer.up != 0).float().mean()) > 0.9
            else:
                moved = (layer.weight - floats.get_parameter(f"{name}.weight")).abs() > 1e-6
                assert float(moved.float().mean()) > 0.6, name  # clipped ones have no gradient
        prefix = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            before = floats.get_parameter(f"{prefix}.{norm}.weight")
            after = llama.model.get_parameter(f"{prefix}.{norm}.weight")
            assert float((before != after).float().mean()) > 0.9, norm


@pytest.mark.parametrize("part", PARTS)
def test_only_what_is_asked_for_trains(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    trainings, floats = captured(monkeypatch), copy.deepcopy(llama.model)
    run(llama, tokens, W2A, trains=[part])
    for training in trainings:
        trained = {name for layer in training.layers for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == ({part.removesuffix("s")} if part != "norms" else set())
        assert bool(training.norms) == (part == "norms")
    changed = {
        name
        for name, p in floats.named_parameters()
        if "norm" in name and not torch.equal(p, llama.model.get_parameter(name))
    }
    assert len(changed) == (4 if part == "norms" else 0)
    assert not any(parameter.requires_grad for parameter in llama.model.parameters())


def test_the_goal_is_the_float_model_and_the_input_the_quantized_one(
    make_llama: Make, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings, loaded = captured(monkeypatch), make_llama()
    model, last = make_llama().model, []
    model.get_submodule("model.layers.1").register_forward_hook(lambda block, args, out: last.append(out))
    floats = model(tokens, output_hidden_states=True).hidden_states  # of which the last is after the norm
    run(loaded, tokens, W2A)
    every = list(range(5))
    assert torch.equal(trainings[0].inputs[every], floats[0])
    assert torch.allclose(trainings[0].distance.goal[every], floats[1], atol=1e-5)
    assert torch.allclose(trainings[1].distance.goal[every], last[0], atol=1e-5)
    assert float((trainings[1].inputs[every] - floats[1]).norm() / floats[1].norm()) > 0.01


# --------------------------------------------------------------------------------------------------------- the rates


def test_rates_are_travels_over_the_schedule() -> None:
    optim = OptimConfig(schedule="linear", final_share=0.0)
    settings = config(travel=0.5, scale_share=0.2, zero_travel=3, norm_travel=0.1, optim=optim)
    layer, total = random_layer(QuantSpec(num_bits=2, group_size=16, symmetric=False)), total_factor(40, optim)
    norm = Norm(nn.Parameter(torch.ones(4)), nn.Parameter(torch.tensor([1.0, -3.0])), torch.float32)
    step = float(layer.scale.detach().mean())
    groups = block_ap.groups_of([layer], [norm], total, settings)
    found = {id(group.parameters[0]): group.lr * total for group in groups}
    asked = {layer.weight: 0.5 * step, layer.scale: 0.2, layer.zero_point: 3.0, norm.master: 0.1 * 2}
    assert found == pytest.approx({id(parameter): value for parameter, value in asked.items()})
    absolute = settings.model_copy(update={"weight_lr": 2e-5, "quant_lr": 1e-4})
    rates = {id(group.parameters[0]): group.lr for group in block_ap.groups_of([layer], [norm], total, absolute)}
    assert rates == {id(layer.weight): 2e-5, id(norm.master): 2e-5, id(layer.scale): 1e-4, id(layer.zero_point): 1e-4}


def test_rates_of_the_second_phase_are_travels_over_the_schedule() -> None:
    packed = random_layer(QuantSpec(num_bits=2, group_size=16, symmetric=False)).freeze()
    layer = ScaleLinear.of(packed, True, True)
    settings = ScaleConfig(scale_share=0.2, zero_travel=3)
    groups = e2e_qp.groups_of(layer, 10.0, settings)
    assert [group.lr for group in groups] == pytest.approx([0.02, 0.3])
    assert [group.relative for group in groups] == [True, False]
    fixed = e2e_qp.groups_of(layer, 10.0, settings.model_copy(update={"lr": 2e-5}))
    assert [(group.lr, group.relative) for group in fixed] == [(2e-5, False)] * 2


@pytest.mark.parametrize("key", ["scale_travel", "e2e.scale_travel"])
def test_the_former_name_of_a_share_is_refused_with_the_new_one(key: str) -> None:
    with pytest.raises(InputError) as refusal:
        recipe.load("efficientqat-w2g64-asym", [f"method.{key}=0.15"])
    assert str(refusal.value).splitlines()[1:] == [
        f"  method.{key}: this key is now scale_share, a share of the scale itself (scale_travel of other "
        "methods is in quantization steps); found 0.15"
    ]


def test_no_weight_goes_far_beyond_its_travel(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's step can be a little more than its rate, when gradients grow."""
    trainings, floats = captured(monkeypatch), copy.deepcopy(llama.model)
    run(llama, tokens, W2A, travel=0.2)
    for training in trainings:
        for target, layer in zip(training.task.targets, training.layers, strict=True):
            weight = floats.get_parameter(f"{target.name}.weight")
            step = float(minmax_qparams(weight.detach(), layer.spec)[0].mean())
            assert 0.05 < float((layer.weight.detach() - weight).abs().max()) / step < 0.3


@pytest.mark.parametrize("bits", [2, 4])
def test_minibatch_gradients_are_those_of_the_mean_loss(llama: LoadedModel, tokens: Tensor, bits: int) -> None:
    """Parts, summed gradients and one pass through the rounding give what autograd gives on the whole."""

    def step(task: BlockTask) -> None:
        assert task.float_inputs is not None
        task.float_outputs = task.through(task.float_inputs)
        layers = {}
        for target in task.targets:
            layers[target] = BlockLinear(target.weight, None, target.spec)
            task.block.set_submodule(target.name.removeprefix(f"{task.name}."), layers[target])
        norms = norms_of(task, llama)
        training = BlockTraining(task, BlockLoss(task.float_outputs), list(layers.values()), norms)
        with torch.enable_grad():
            training.loss([0, 1, 2]).backward()  # three parts of one window
            pairs = [(layer.weight, gradient(layer.weight)) for layer in layers.values()]
            pairs += [(norm.master, gradient(norm.master)) for norm in norms]
            for layer in layers.values():
                layer.weight.grad, layer.expanded = None, layer.quantized_weight()
            found = training.part_loss([0, 1, 2, 3][:1]) + training.part_loss([1]) + training.part_loss([2])
            (found / training.distance.count([0, 1, 2])).backward()
        for parameter, grad in pairs[: len(layers)]:
            assert torch.allclose(gradient(parameter), grad, rtol=1e-3, atol=1e-6)
        for norm, (_, grad) in zip(norms, pairs[len(layers) :], strict=True):
            assert torch.allclose(gradient(norm.parameter), grad, rtol=1e-3, atol=1e-6)
            norm.parameter.grad = None
        for target, layer in layers.items():
            task.pack(target, layer.quantized)

    quant = QuantConfig(num_bits=bits, group_size=16, symmetric=False)
    run_blocks(Job.select(llama, quant, tokens), step, with_float_states=True)


# ------------------------------------------------------------------------------------------- the layer of the scales


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_scales_are_the_closed_forms(bits: int, symmetric: bool) -> None:
    """In float64 against autograd of ``(q - z) s``; float16 scales times small integers are exact in float32."""
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=symmetric)
    packed = random_layer(spec).freeze()
    layer = ScaleLinear.of(packed, True, True)
    layer.scale.data, layer.zero_point.data = layer.scale.data.double(), layer.zero_point.data.double()
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(2, 5, n, generator=generator, dtype=torch.float64) for n in (32, 6))
    x.requires_grad_()
    layer(x).backward(grad)
    codes, scale, zero_point, _ = packed.quantized
    scale, zero_point = scale.double().requires_grad_(), zero_point.double().requires_grad_()
    other = x.detach().requires_grad_()
    nn.functional.linear(other, affine.dequantize(codes, scale, zero_point, spec)).backward(grad)
    assert torch.allclose(gradient(x), gradient(other), rtol=1e-12)
    assert torch.allclose(gradient(layer.scale), gradient(scale), rtol=1e-10)
    if symmetric:
        assert layer.zero_point.grad is None
    else:
        assert torch.allclose(gradient(layer.zero_point), gradient(zero_point), rtol=1e-10)


@given(st.sampled_from(BITS), st.booleans(), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 99))
def test_packing_the_scales_changes_no_bit(bits: int, symmetric: bool, scale_dtype: Any, seed: int) -> None:
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=symmetric, scale_dtype=scale_dtype)
    before = random_layer(spec, seed=seed).freeze()
    layer = ScaleLinear.of(before, True, True)
    layer.scale.data *= 1 + 0.1 * torch.randn(layer.scale.shape, generator=torch.Generator().manual_seed(seed))
    x = torch.randn(3, 32)
    packed = layer.packed()
    assert type(packed) is PackedLinear
    assert torch.equal(packed(x), layer(x))
    assert torch.equal(packed.weight_packed, before.weight_packed)
    assert packed.state_dict().keys() == before.state_dict().keys()


def test_ranks_of_the_term_leave_the_weight_alone(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings, floats = captured(monkeypatch), copy.deepcopy(llama.model)
    run(llama, tokens, W2A, low_rank=4)
    for training in trainings:
        for target, layer in zip(training.task.targets, training.layers, strict=True):
            assert isinstance(layer, LowRankBlockLinear)
            assert torch.allclose(layer.weight, floats.get_parameter(f"{target.name}.weight"), atol=1e-3)
            term = (layer.up @ layer.down).detach()
            assert int(torch.linalg.matrix_rank(term)) <= 4
            assert float(term.abs().max()) > 0.05
            used = round_codes(layer)
            assert torch.equal(layer.quantized.codes, used)


def round_codes(layer: LowRankBlockLinear) -> Tensor:
    """The plain formula: ``clamp(round(w / s + z + up down))``."""
    scale, zero_point = (side.detach().repeat_interleave(16, 1) for side in layer.qparams())
    grid = layer.weight.detach() / scale + zero_point + (layer.up @ layer.down).detach()
    return grid.round().clamp(0, layer.spec.qmax).to(torch.uint8)
