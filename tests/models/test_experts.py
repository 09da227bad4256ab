"""Mixtures of experts: every family computes as before, and a streamed model leaves its experts in their files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.architectures import architectures, write
from helpers.notes import Notes
from transformers import AutoModelForCausalLM

from qtool.blocks.job import Job
from qtool.blocks.moments import TokenWeights
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.methods import gptq, signround
from qtool.models.experts import ExpertsLinear, expert_linears, fused_parameters, on_disk
from qtool.models.loaded import LoadedModel, from_files
from qtool.models.loading import load_model
from qtool.models.targets import select_targets
from qtool.quant.affine import quantize
from qtool.quant.ranges import search_qparams
from qtool.reports.records import EXPERT_TOKENS
from qtool.system import progress

W4 = QuantConfig(num_bits=4, group_size=16)
MIXTURES = [name for name, each in architectures().items() if each.kind == "mixtures"]
KINDS = ["qwen3_moe", "gpt_oss", "granitemoe"]  # a tensor for each expert; stacked and transposed; stacked
FEW = ["qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3", "nemotron_h", "mixtral"]


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def streamed(folder: Path) -> LoadedModel:
    return load_model(ModelConfig(path=str(folder), device="cpu", dtype="float32"), streamed=True)


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in MIXTURES]
)
def test_experts_as_linears_give_the_logits_of_transformers_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path / "model")
    theirs = plain(folder)
    if not fused_parameters(theirs):
        pytest.skip("its experts are not of a class that transformers' decorator marks")
    ours = from_files(folder, torch.float32)[0].eval()
    assert expert_linears(ours)
    assert torch.equal(tiny.logits(ours), tiny.logits(theirs))


@pytest.mark.parametrize("name", KINDS)
def test_a_streamed_model_computes_from_the_tensors_of_its_files(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path / "model")
    loaded, whole = streamed(folder), from_files(folder, torch.bfloat16)[0]
    layers = expert_linears(loaded.model)
    assert all(layer.weight.is_meta for layer in layers.values()) == (name != "granitemoe")
    for path, layer in layers.items():
        expected = whole.get_submodule(path).weight
        assert torch.equal(torch.cat(list(layer.expert_weights())), expected), path
        assert loaded.extremes[f"{path}.weight"] == tuple(float(end) for end in expected.aminmax())
    before = type(loaded.model)
    assert before is type(whole)
    loaded.gather()
    assert not any(parameter.is_meta for parameter in loaded.model.parameters())
    assert torch.equal(tiny.logits(loaded.model), tiny.logits(whole.float().eval()))


def test_published_tensors_cover_each_row_of_the_experts_once(tmp_path: Path) -> None:
    model = from_files(write("qwen3_moe", tmp_path / "model"), torch.float32)[0]
    for name, layer in expert_linears(model).items():
        places = on_disk(model, name, layer.out_features)
        assert sorted(torch.cat(list(places.values())).tolist()) == list(range(layer.out_features))
        first = model.config.num_experts - 1
        assert any(key.endswith(f"experts.{first}.down_proj.weight") for key in places) == name.endswith("down_proj")


@pytest.fixture
def mixture(tmp_path: Path) -> LoadedModel:
    return load_model(ModelConfig(path=str(write("qwen3_moe", tmp_path / "model")), device="cpu", dtype="float32"))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_every_choice_of_a_token_is_counted_once(method: str, mixture: LoadedModel, tokens: torch.Tensor) -> None:
    job = Job.select(mixture, W4, tokens)
    result = gptq.run(job, gptq.Config()) if method == "gptq" else signround.run(job, signround.Config(iterations=2))
    series = next(each for each in result.series if each.name == EXPERT_TOKENS)
    config = mixture.model.config
    assert series.per == "expert"
    assert series.at == tuple(block for block in range(config.num_hidden_layers) for _ in range(config.num_experts))
    assert sum(series.values) == tokens.numel() * config.num_experts_per_tok * config.num_hidden_layers


def experts_of(loaded: LoadedModel) -> list[str]:
    return [target.name for target in select_targets(loaded, W4) if isinstance(target.linear, ExpertsLinear)]


def test_experts_below_the_least_number_of_tokens_are_rounded_in_a_searched_range(
    mixture: LoadedModel, tokens: torch.Tensor
) -> None:
    floats = {name: mixture.model.get_submodule(name).get_parameter("weight").clone() for name in experts_of(mixture)}
    notes = Notes()
    with progress.use(notes):
        gptq.run(Job.select(mixture, W4, tokens), gptq.Config(min_expert_tokens=10**9))
    said = "4 of 4 experts (the first is 0) saw fewer than 1000000000 calibration tokens"
    assert sum(said in note for note in notes.texts) == len(floats)
    for name, weight in floats.items():
        layer: Any = mixture.model.get_submodule(name)
        scale, zero_point = search_qparams(weight, layer.spec, gptq.Config().norm)
        assert torch.equal(layer.quantized.scale, scale)
        codes = quantize(weight, scale, zero_point, layer.spec)
        assert torch.equal(layer.quantized.codes, codes)


@pytest.mark.parametrize("token_weights", ["plain", "relative"])
def test_the_hessian_of_an_expert_counts_by_its_tokens(token_weights: TokenWeights) -> None:
    """With the tokens of one expert only, its result is that of a plain linear on them and on the others' blend."""
    from qtool.blocks.moments import Statistics
    from qtool.blocks.task import Rows
    from qtool.methods.gptq import factorise, solve, solve_experts
    from qtool.models.linears import Target
    from qtool.quant.hessian import even_scale, gram

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2 * 8, 32, generator=generator)
    own, other = torch.randn(40, 32, generator=generator), 9 * torch.randn(24, 32, generator=generator)
    linear = ExpertsLinear(weight, 2)
    target = Target.of("experts", linear, W4.spec_for("experts"), 0)  # type: ignore[arg-type]
    config = gptq.Config(min_expert_tokens=0, token_weights=token_weights)
    (found,) = solve_experts(target, [Rows(torch.cat([own, other]), [40, 24])], [target.spec], config)
    if token_weights == "relative":
        own, other = own * even_scale(own), other * even_scale(other)
    shared = gram([torch.cat([own, other])])
    for expert, x in enumerate((own, other)):
        share = len(x) / (len(x) + 32)
        hessian = share * gram([x]) + (1 - share) * shared
        factor = factorise(Statistics(hessian, None), target.spec, config, "expert")
        expected = solve(weight[expert * 8 : expert * 8 + 8], factor, target.spec, config)
        assert torch.equal(found.codes[expert * 8 : expert * 8 + 8], expected.codes)
        assert torch.equal(found.scale[expert * 8 : expert * 8 + 8], expected.scale)


def test_the_stages_of_experts_have_the_same_bits_paused_and_run_again(tmp_path: Path, tokens: torch.Tensor) -> None:
    found = []
    for paused in (True, False):
        loaded = load_model(ModelConfig(path=str(write("qwen3_moe", tmp_path / str(paused))), device="cpu"))
        with pytest.MonkeyPatch.context() as patch:
            if not paused:
                from qtool.blocks import stages

                patch.setattr("qtool.methods.gptq.stages", stages.repeated_stages)
            gptq.run(Job.select(loaded, W4, tokens), gptq.Config())
        found.append({name: tensor for name, tensor in loaded.model.state_dict().items() if "packed" in name})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
