"""AWQ: what its scales and clips do, and that they never do harm."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.methods import W4, correlated_inputs, generator, random_weight, run, same, with_outliers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.blocks.driver import run_blocks
from qtool.blocks.folds import find_folds
from qtool.blocks.job import Job, load_method
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.config.sections import ModelConfig
from qtool.methods import awq, rtn
from qtool.models.linears import Target, dense_weight, packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.quant.affine import dequantize, minmax_qparams, quantize


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_that_scales_and_clips_nothing_is_rtn(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, symmetric: bool
) -> None:
    """``num_ratios: 1`` tries only the ratio 0, whose scale is one everywhere."""
    quant = QuantConfig(num_bits=4, group_size=16, symmetric=symmetric)
    ours, theirs = with_outliers(make_llama()), with_outliers(make_llama())
    found = run(load_method("awq"), ours, tokens, quant, num_ratios=1, clip=False)
    assert same(found, run(load_method("rtn"), theirs, tokens, quant))
    for name, parameter in theirs.model.named_parameters():
        assert torch.equal(ours.model.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    # the min-max grid of 4 bits with negative scales has the largest weight on its lowest level: clipping gains less
    ("bits", "negative", "most"),
    [(3, None, 0.95), (4, None, 0.98), (3, False, 0.95), (4, False, 0.95)],
)
def test_awq_lowers_the_block_error_where_channels_are_loud(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, bits: int, negative: bool | None, most: float
) -> None:
    quant = QuantConfig(num_bits=bits, group_size=32, negative_scales=negative)

    def first_output(loaded: LoadedModel) -> Tensor:
        outputs: list[Tensor] = []
        run_blocks(Job(loaded, (), tokens), lambda task: outputs.append(task.forward(task.inputs[0])))
        return outputs[0]

    def error(**settings: Any) -> float:
        loaded = with_outliers(make_llama(), 10)
        before = first_output(loaded)
        run(load_method("awq"), loaded, tokens, quant, **settings)
        return float((first_output(loaded) - before).norm() / before.norm())

    nearest, scaled, clipped = error(num_ratios=1, clip=False), error(clip=False), error(num_ratios=1)
    assert scaled < 0.75 * nearest
    assert clipped < most * nearest
    assert error() < 0.75 * nearest


def test_awq_scales_loud_channels_up_and_moves_the_rest_into_the_norm(llama: LoadedModel, tokens: Tensor) -> None:
    """The function of the float parts is kept: norm and dequantized readers together are what they were."""
    loaded = with_outliers(llama)
    floats = copy.deepcopy(loaded)
    run(load_method("awq"), loaded, tokens, QuantConfig(num_bits=8, group_size=16, scale_dtype="float32"))
    for block in (0, 1):
        name = f"model.layers.{block}.input_layernorm.weight"
        norms = [model.model.get_parameter(name) for model in (floats, loaded)]
        s = norms[0] / norms[1]
        assert float(s[[3, 17, 40]].min()) > float(s.median()), "loud channels are not scaled up"
        linear = f"model.layers.{block}.self_attn.k_proj"
        old = dense_weight(floats.model.get_submodule(linear)) * norms[0]
        new = packed_linears(loaded.model)[linear].dequantized() * norms[1]
        assert float((new - old).norm() / old.norm()) < 0.02


@given(count=st.integers(1, 70), data=st.data())
def test_coarse_to_fine_finds_the_lowest_of_errors_that_fall_and_rise(count: int, data: st.DataObject) -> None:
    lowest = data.draw(st.integers(0, count - 1))
    slopes = data.draw(st.tuples(*[st.floats(0.1, 10)] * 2))
    asked: list[int] = []

    def errors(places: Sequence[int]) -> list[float]:
        asked.extend(places)
        return [abs(place - lowest) * slopes[place > lowest] for place in places]

    assert awq.coarse_to_fine(errors, count) == lowest
    assert len(set(asked)) == len(asked) <= 2 * count.bit_length() + 2


def test_coarse_to_fine_takes_the_first_of_equal_errors_and_no_error_that_is_not_a_number() -> None:
    assert awq.coarse_to_fine(lambda places: [1.0] * len(places), 20) == 0
    assert awq.coarse_to_fine(lambda places: [math.nan] * len(places), 20) == 0
    assert awq.coarse_to_fine(lambda places: [math.nan if place < 8 else place for place in places], 20) == 8


def test_awq_judges_by_the_module_around_the_readers(llama: LoadedModel, tokens: Tensor) -> None:
    found: list[dict[str, str]] = []

    def visit(task: BlockTask) -> None:
        folds = find_folds(task, task.inputs[0][:1])
        names = {module: name for name, module in task.block.named_modules()}
        found.append({names[fold.source]: names[awq.judged_module(task.block, fold)] for fold in folds})
        for target in task.targets:
            task.pack(target, rtn.round_to_nearest(target.weight, target.spec, rtn.Config()))

    run_blocks(Job.select(llama, W4, tokens), visit)
    assert (
        found
        == [{"input_layernorm": "self_attn", "post_attention_layernorm": "mlp", "mlp.up_proj": "mlp.down_proj"}] * 2
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_is_never_worse_than_not_clipping_and_leaves_queries_and_keys(symmetric: bool) -> None:
    spec = QuantSpec(num_bits=3, group_size=16, symmetric=symmetric)
    weight = random_weight(8, 64)
    weight[:, ::16] *= 4  # one large weight in every group
    linear = nn.Linear(64, 8, bias=False)
    linear.weight.data.copy_(weight)
    x = correlated_inputs(300, 64).view(300, 4, 16).transpose(0, 1)
    moment = x.transpose(1, 2) @ x

    def errors(grid: tuple[Tensor, Tensor]) -> Tensor:
        change = (dequantize(quantize(weight, *grid, spec), *grid, spec) - weight).view(8, 4, 16)
        return torch.einsum("rgi,gti->rgt", change, x).square().sum(-1)

    minmax = minmax_qparams(weight, spec)
    clipped = awq.clipped_qparams(weight, Target.of("mlp.up_proj", linear, spec, 0), moment, awq.Config())
    assert bool((errors(clipped) <= errors(minmax) * (1 + 1e-4)).all())
    assert float(errors(clipped).sum()) < 0.9 * float(errors(minmax).sum())
    for kept in (
        awq.clipped_qparams(weight, Target.of("attn.q_proj", linear, spec, 0), moment, awq.Config()),
        awq.clipped_qparams(weight, Target.of("mlp.up_proj", linear, spec, 0), moment, awq.Config(clip=False)),
        awq.clipped_qparams(weight, Target.of("mlp.up_proj", linear, spec, 0), moment, awq.Config(clip_steps=1)),
    ):
        assert torch.equal(kept[0].abs(), minmax[0].abs())  # one step tries both signs
        assert torch.equal(kept[1], minmax[1])


def test_awq_on_a_checkpoint_in_half_precision_writes_norms_that_disk_holds(tmp_path: Path, tokens: Tensor) -> None:
    loaded = with_outliers(tiny.load(tiny.llama(tmp_path / "m", dtype=torch.bfloat16)))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.copy_(parameter.bfloat16())
    run(load_method("awq"), loaded, tokens, W4)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter.bfloat16().float(), parameter), name


def test_awq_folds_the_same_norms_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model has a residual stream beside which the branches are small, as real ones have."""
    monkeypatch.setattr(awq, "search_scale", lambda task, fold, mean, *_: torch.linspace(0.5, 2, mean.numel()))
    tokens = torch.randint(2, 4096, (1, 48), generator=generator(0))
    folded: dict[str, list[str]] = {}
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(ModelConfig(path="builtin:wiki-llama-3m", dtype=dtype, device="cpu"))
        before = {
            name: parameter.clone() for name, parameter in loaded.model.named_parameters() if parameter.dim() == 1
        }
        run(load_method("awq"), loaded, tokens, QuantConfig(num_bits=3, group_size=32), clip=False)
        after = dict(loaded.model.named_parameters())
        folded[dtype] = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert len(folded["float32"]) == 8  # both norms of four blocks
    assert folded["bfloat16"] == folded["float32"]
