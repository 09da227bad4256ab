"""``token_weights``: what a token counts in GPTQ's second moments."""

from collections.abc import Callable

import torch
from helpers.methods import W4, correlated_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.blocks.job import Job
from qtool.blocks.moments import Statistics, TokenWeights, collect
from qtool.blocks.stages import Stage
from qtool.blocks.task import Rows
from qtool.methods import gptq
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel


@given(st.lists(st.integers(-9, 9), min_size=6, max_size=6), st.sampled_from([torch.bfloat16, torch.float32]))
def test_relative_statistics_do_not_see_how_large_a_token_is(powers: list[int], dtype: torch.dtype) -> None:
    """Scaling a token by a power of two changes no bit of the Hessian, nor of the drift from the float model."""
    x = correlated_inputs(6, 32, seed=5)
    x, floats = ((each / x.square().mean(1, keepdim=True).sqrt()).to(dtype) for each in (x, x + 0.1 * x.flip(0)))

    def statistics(by: list[int], kind: TokenWeights) -> Statistics:
        size = torch.tensor(by).exp2().unsqueeze(1).to(dtype)
        return collect(Stage([], [Rows(x * size)], [Rows(floats * size)]), kind)

    for found, expected in zip(statistics(powers, "relative"), statistics([0] * 6, "relative"), strict=True):
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
    alone = collect(Stage([], [Rows(x)], None), "relative")
    assert torch.equal(statistics(powers, "relative").hessian, alone.hessian)
    if any(powers):
        assert not torch.equal(statistics(powers, "plain").hessian, statistics([0] * 6, "plain").hessian)


def test_end_loss_weights_count_instead_of_token_weights_and_a_full_section_is_read_back() -> None:
    config = gptq.Config.model_validate({"guided": {"power": 1}})
    assert gptq.Config.model_validate(config.model_dump(mode="json")) == config


def test_a_run_reads_its_inputs_with_the_chosen_weights(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    """The setting reaches the second linear of an MLP, whose inputs differ in size, and a run repeats its codes."""
    found = []
    for chosen in ("plain", "relative", "relative"):
        loaded = make_llama()
        gptq.run(Job.select(loaded, W4, tokens), gptq.Config(token_weights=chosen))
        found.append({name: layer.quantized.codes for name, layer in packed_linears(loaded.model).items()})
    down = "model.layers.0.mlp.down_proj"
    assert not torch.equal(found[0][down], found[1][down])
    assert all(torch.equal(found[1][name], found[2][name]) for name in found[1])
