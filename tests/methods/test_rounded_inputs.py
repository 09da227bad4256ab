"""Methods with rounded inputs: what they pack survives the disk, and those that read text see the rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.methods import TRAINED, generator, run, same, with_outliers
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.blocks.job import Job, Method, load_method
from qtool.checkpoints import native, output_folder
from qtool.config import catalog
from qtool.config.quant import ActivationGrid, QuantConfig, QuantSpec
from qtool.methods import awq
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.quant.activations import round_input

# where inputs are rounded scales are positive by default; these runs differ in the inputs alone
W4 = QuantConfig(num_bits=4, group_size=16, negative_scales=False)
SYMMETRIC = ActivationGrid(num_bits=8, symmetric=True)
COARSE = ActivationGrid(num_bits=3, symmetric=True)
LEARNING: dict[str, dict[str, Any]] = {  # a method of each kind: searched, trained by blocks, trained as a whole
    "awq": {},
    "signround": {"iterations": 40},
    "efficientqat": {},
    "lrqat": TRAINED | {"epochs": 2},
    "qat": TRAINED | {"epochs": 2},
}


def rounding(grid: ActivationGrid) -> QuantConfig:
    return W4.model_copy(update={"activations": grid})


@pytest.fixture(params=catalog.methods())
def method(request: pytest.FixtureRequest) -> Method[Any]:
    return load_method(request.param)


def test_symmetric_rounding_survives_disk_with_equal_logits(
    method: Method[Any], llama: LoadedModel, tokens: Tensor, tmp_path: Path
) -> None:
    result = run(method, llama, tokens, rounding(SYMMETRIC))
    assert {weight.spec.activations for weight in result.values()} == {SYMMETRIC}
    with output_folder.atomic_folder(tmp_path / "packed", overwrite=False) as partial:
        native.save(partial, llama, tiny.specs(llama))
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert {layer.spec.activations for layer in packed_linears(restored).values()} == {SYMMETRIC}
    assert torch.equal(tiny.logits(restored), tiny.logits(llama.model))


def test_coarse_inputs_change_the_codes_of_methods_that_read_text_and_of_no_other(
    method: Method[Any], make_llama: Callable[[], LoadedModel], tokens: Tensor
) -> None:
    plain, rounded = (run(method, make_llama(), tokens, quant) for quant in (W4, rounding(COARSE)))
    assert same(plain, rounded) != method.needs_data(method.config())


@pytest.mark.parametrize("name", LEARNING)
def test_learning_through_the_rounding_is_better_than_rounding_afterwards(
    name: str, make_llama: Callable[[], LoadedModel]
) -> None:
    """AWQ learns where channels are loud: without such channels its search has nothing to find."""
    strength = 10.0 if name == "awq" else 1.0
    tokens = torch.randint(2, tiny.VOCABULARY, (16, 48), generator=generator(0))
    exact = with_outliers(make_llama(), strength).model(tokens).logits
    errors = []
    for quant in (rounding(COARSE), W4):
        loaded = with_outliers(make_llama(), strength)
        run(load_method(name), loaded, tokens, quant, **LEARNING[name])
        for layer in packed_linears(loaded.model).values():
            layer.spec = layer.spec.model_copy(update={"activations": COARSE})
        errors.append(float((loaded.model(tokens).logits - exact).norm() / exact.norm()))
    assert errors[0] < errors[1]


def test_awq_clips_for_rounded_inputs(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    """In the first block, whose inputs are the same with and without rounding; one ratio alone scales nothing."""
    plain, rounded = (
        {
            name: weight
            for name, weight in run(load_method("awq"), make_llama(), tokens, quant, num_ratios=1).items()
            if name.startswith("model.layers.0.mlp")
        }
        for quant in (W4, rounding(COARSE))
    )
    assert not same(plain, rounded)


def test_awq_leaves_no_hook_behind_and_searches_what_the_packed_layer_computes(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scale ``s`` and exact weights, a reader computes ``R(x / s) (W diag(s))^T``."""
    seen: list[Tensor] = []

    def watched(x: Tensor, spec: QuantSpec) -> Tensor:
        seen.append(x)
        return round_input(x, spec)

    monkeypatch.setattr(awq, "round_input", watched)
    quant = rounding(COARSE)
    job = Job.select(llama, quant, tokens)
    linears = [target.linear for target in job.targets]
    x = torch.randn(3, 64, generator=generator(0))
    s = torch.rand(64, generator=generator(1)) + 0.5
    with awq._rounding_inputs(job.targets[:1], s), torch.no_grad():
        found = linears[0](x)
    assert torch.equal(seen[0], x / s)
    weight = job.targets[0].weight
    assert torch.allclose(found, round_input(x / s, job.targets[0].spec) @ (weight * s).T, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, linears[0](x))
    run(load_method("awq"), llama, tokens, quant)
    assert not any(linear._forward_pre_hooks for linear in linears)
