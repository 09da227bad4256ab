"""What the estimators measure: against their formulas, and on a model with a planted weakness."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from helpers.bit_plans import budgeted, planned
from torch import Tensor

from qtool.allocation import sensitivity
from qtool.allocation.plan import units_of
from qtool.allocation.rounded import compensated, nearest, rounded_unit
from qtool.allocation.sensitivity import COST_ESTIMATORS
from qtool.allocation.units import Unit
from qtool.blocks.job import Job
from qtool.config.quant import QuantConfig
from qtool.evaluation import perplexity
from qtool.methods import gptq
from qtool.models.linears import Target, dense_weight, packed_linears, weight_of
from qtool.models.loaded import LoadedModel
from qtool.models.targets import select_targets
from qtool.quant.affine import dequantize
from qtool.quant.affine import quantize as codes_of
from qtool.quant.ranges import search_qparams
from qtool.system.errors import RunError


def job(loaded: LoadedModel, units: Sequence[Unit], tokens: Tensor, labels: Tensor | None = None) -> Job:
    """Return a job of the targets of ``units``."""
    return Job(loaded, tuple(target for unit in units for target in unit.targets), tokens, labels)


def units_with(loaded: LoadedModel) -> list[Unit]:
    return units_of(loaded, budgeted(average_bits=8.5))


@pytest.mark.parametrize("estimator", COST_ESTIMATORS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_estimators_rank_a_planted_unit_above_a_harmless_one(
    estimator: str, family: str, tmp_path: Path, tokens: Tensor
) -> None:
    loaded = tiny.load(tiny.FAMILIES[family](tmp_path / family))
    loud, quiet = {
        "llama": ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"),
        "gpt2": ("transformer.h.1.mlp.c_proj", "transformer.h.0.attn.c_proj"),
    }[family]
    for name, factor in ((loud, 30), (quiet, 1e-3)):
        weight = weight_of(loaded.model.get_submodule(name))
        weight.data = weight.data * factor  # not in place: it lies in a mapped file, whose pages may be dropped
    units = units_with(loaded)
    costs = COST_ESTIMATORS[estimator].measure(job(loaded, units, tokens), units, nearest)
    by_name = {unit.targets[0].name: cost for unit, cost in zip(units, costs, strict=True)}
    for bits in (2, 3, 4):
        assert by_name[loud][bits] > 100 * by_name[quiet][bits]


@pytest.mark.parametrize("estimator", COST_ESTIMATORS)
def test_more_bits_cost_less_and_the_model_stays_what_it_was(
    estimator: str, llama: LoadedModel, tokens: Tensor
) -> None:
    before = copy.deepcopy(llama.model.state_dict())
    costs = COST_ESTIMATORS[estimator].measure(job(llama, units_with(llama), tokens), units_with(llama), nearest)
    assert all(c[2] > c[3] > c[4] > c[8] > 0 for c in costs)
    after = llama.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad or p.grad is not None for p in llama.model.parameters())


def error_of(target: Target, bits: int) -> torch.Tensor:
    spec = target.spec.model_copy(update={"num_bits": bits})
    grid = search_qparams(target.weight, spec)
    return dequantize(codes_of(target.weight, *grid, spec), *grid, spec) - target.weight


def test_hessian_is_the_trace_times_the_error(llama: LoadedModel, tokens: Tensor) -> None:
    units = units_with(llama)
    read: dict[str, torch.Tensor] = {}
    for target in select_targets(llama, QuantConfig(group_size=32)):
        target.linear.register_forward_pre_hook(lambda _, args, name=target.name: read.__setitem__(name, args[0]))
    costs = COST_ESTIMATORS["hessian"].measure(job(llama, units, tokens), units, nearest)
    llama.model(tokens)
    for unit, cost in zip(units, costs, strict=True):
        expected = sum(float(read[t.name].square().mean() * error_of(t, 3).square().sum()) for t in unit.targets)
        assert cost[3] == pytest.approx(expected, rel=1e-4)


def test_block_is_the_mean_change_of_the_blocks_output_relative_to_tokens_and_channels(
    llama: LoadedModel, tokens: Tensor
) -> None:
    units = units_with(llama)
    costs = COST_ESTIMATORS["block"].measure(job(llama, units, tokens), units, nearest)
    first = [(unit, cost) for unit, cost in zip(units, costs, strict=True) if unit.targets[0].block == 0]
    outputs: list[Tensor] = []
    llama.blocks()[0][1].register_forward_hook(
        lambda module, args, out: outputs.append(out[0] if tuple is type(out) else out)
    )
    llama.model(tokens)
    for unit, cost in first:
        with rounded_unit(llama, unit, 3):
            llama.model(tokens)
        size = outputs[0].double().square().mean(-1, keepdim=True).sqrt()  # root mean square of each token, [n, t, 1]
        change, share = (
            (x.double() / size).square().flatten(0, 1).mean(0) for x in (outputs[-1] - outputs[0], outputs[0])
        )
        assert cost[3] == pytest.approx(float((change / share).mean()), rel=1e-3)


def test_fisher_is_the_mean_square_of_gradients_times_the_error(llama: LoadedModel, tokens: Tensor) -> None:
    units = units_with(llama)
    costs = COST_ESTIMATORS["fisher"].measure(job(llama, units, tokens), units, nearest)
    target = units[3].targets[0]
    weight = weight_of(llama.model.get_submodule(target.name)).requires_grad_(True)
    squares = torch.zeros_like(weight)
    for window in tokens:
        logits = llama.model(window[None]).logits[0, :-1]
        squares += torch.autograd.grad(F.cross_entropy(logits, window[1:]), weight)[0].square() / len(tokens)
    expected = float((squares * error_of(target, 2).square()).sum()) * tokens.shape[1] / 2
    assert costs[3][2] == pytest.approx(expected, rel=1e-4)


def test_loss_is_the_divergence_when_one_unit_is_rounded(llama: LoadedModel, tokens: Tensor) -> None:
    units, reference = units_with(llama)[:2], copy.deepcopy(llama.model)
    costs = COST_ESTIMATORS["loss"].measure(job(llama, units, tokens), units, nearest)
    for unit, cost in zip(units, costs, strict=True):
        with rounded_unit(llama, unit, 2):
            for target in unit.targets:
                moved = dense_weight(llama.model.get_submodule(target.name)) - target.weight
                assert moved.abs().max() == 0  # the target's own linear is rounded here, too
            expected = perplexity.divergence(llama.model, reference, tokens, "auto")["kl"]
        assert cost[2] == pytest.approx(expected.value, rel=1e-3)


def test_compensated_weights_are_those_of_gptq(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    """In the first block, whose first linears read the same in a model that is quantized and in one that is not."""
    loaded = make_llama()
    units = units_with(loaded)
    weights = compensated(job(loaded, units, tokens), units)
    quantized = make_llama()
    gptq.run(Job.select(quantized, QuantConfig(num_bits=3, group_size=32), tokens), gptq.Config())
    layers = packed_linears(quantized.model)
    for target in units[0].targets:
        same = weights(target, 3) == dequantize(*layers[target.name].quantized)
        assert same.float().mean() > 0.99  # there q, k and v are solved in one product, whose sums have another order
    work = job(loaded, units, tokens)
    nearer = COST_ESTIMATORS["block"].measure(work, units, weights)
    for cost, plain in zip(nearer, COST_ESTIMATORS["block"].measure(work, units, nearest), strict=True):
        assert cost[3] < plain[3]


def test_delta_loss_is_the_gradient_at_the_rounded_weight_times_the_error(llama: LoadedModel, tokens: Tensor) -> None:
    unit = units_with(llama)[3]
    cost = COST_ESTIMATORS["delta-loss"].measure(job(llama, [unit], tokens), [unit], nearest)[0][3]
    target = unit.targets[0]
    error, weight = error_of(target, 3), weight_of(llama.model.get_submodule(target.name))
    weight.data += error
    weight.requires_grad_(True)
    logits = llama.model(tokens).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert cost == pytest.approx(float((torch.autograd.grad(loss, weight)[0] * error).abs().sum()), rel=1e-3)


def test_only_learned_tokens_count(llama: LoadedModel, tokens: Tensor) -> None:
    """Labels that leave out a window's tokens give what the other windows give alone."""
    labels = tokens.clone()
    labels[2:] = -100
    units = units_with(llama)[:1]
    for name in ("loss", "delta-loss"):
        masked = COST_ESTIMATORS[name].measure(job(llama, units, tokens, labels), units, nearest)
        alone = COST_ESTIMATORS[name].measure(job(llama, units, tokens[:2]), units, nearest)
        assert masked[0][2] == pytest.approx(alone[0][2], rel=1e-4)


def test_a_cost_that_is_no_number_ends_the_run(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = sensitivity.CostEstimator(
        lambda _, units, *rest: [dict.fromkeys(u.choices, math.nan) for u in units], False, False, "unit"
    )
    monkeypatch.setitem(COST_ESTIMATORS, "variance", broken)
    with pytest.raises(RunError, match=r"layers\.0\.self_attn: q_proj, k_proj, v_proj: estimator variance found"):
        planned(llama, budgeted(average_bits=3, estimator="variance"), tokens)
