"""One contract for every method, and the limits of round-to-nearest."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.methods import W4, run, same
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.blocks.job import Job, Method, load_method
from qtool.checkpoints import native, output_folder
from qtool.config import catalog
from qtool.config.quant import BITS, QuantConfig
from qtool.config.sections import ModelConfig
from qtool.methods import rtn
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.targets import select_targets

# ---------------------------------------------------------------------------- the contract, for every method there is


@pytest.fixture(params=catalog.methods())
def method(request: pytest.FixtureRequest) -> Method[Any]:
    return load_method(request.param)


def test_there_are_the_methods_that_users_know() -> None:
    trained = {"efficientqat", "llmqat", "lrqat", "lsq", "paretoq", "qat"}
    assert {"awq", "gptq", "gsq", "hqq", "rtn", "signround", "smoothquant"} | trained <= set(catalog.methods())


def test_a_method_says_what_it_is(method: Method[Any], request: pytest.FixtureRequest) -> None:
    assert method.config.model_fields["name"].default == request.node.callspec.params["method"]
    assert method.summary
    assert not method.summary.endswith(".")
    for name, field in method.config.model_fields.items():
        assert field.description or name == "name", f"{name} has no description"
        assert not field.is_required(), f"{name} has no default"


@pytest.mark.parametrize("symmetric", [True, False])
def test_packs_every_target_and_no_other_linear(
    method: Method[Any], llama: LoadedModel, tokens: Tensor, symmetric: bool
) -> None:
    quant = QuantConfig(num_bits=4, group_size=16, symmetric=symmetric)
    targets = {target.name: target.spec for target in select_targets(llama, quant)}
    result = run(method, llama, tokens, quant)
    assert {name: weight.spec for name, weight in result.items()} == targets
    assert [name for name, m in llama.model.named_modules() if isinstance(m, nn.Linear)] == ["lm_head"]
    for name, weight in result.items():
        assert int(weight.codes.max()) <= weight.spec.qmax, name
        assert bool((weight.zero_point == weight.spec.middle).all()) == symmetric, name
        assert float(weight.codes.float().std()) > 1, f"{name} has hardly any codes"


def test_same_arguments_same_bits(method: Method[Any], make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    """The global random state is no argument."""
    first, second = make_llama(), make_llama()
    torch.manual_seed(1)
    once = run(method, first, tokens, W4)
    torch.manual_seed(2)
    assert same(run(method, second, tokens, W4), once)
    for (name, one), other in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_survives_disk_with_equal_logits(method: Method[Any], family: str, tmp_path: Path, tokens: Tensor) -> None:
    loaded = tiny.load(tiny.FAMILIES[family](tmp_path / "float"))
    run(method, loaded, tokens, QuantConfig(num_bits=3, group_size=16, symmetric=False))
    with output_folder.atomic_folder(tmp_path / "packed", overwrite=False) as partial:
        native.save(partial, loaded, tiny.specs(loaded))
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert set(packed_linears(restored)) == set(packed_linears(loaded.model))
    assert torch.equal(tiny.logits(restored), tiny.logits(loaded.model))


def test_markers_have_the_dtype_that_the_float_weights_had(method: Method[Any], tmp_path: Path, tokens: Tensor) -> None:
    """Models cast hidden states to ``linear.weight.dtype``, whatever class the linear has."""
    folder = tiny.llama(tmp_path / "float")
    loaded = load_model(ModelConfig(path=str(folder), dtype="bfloat16", device="cpu"))
    run(method, loaded, tokens, W4)
    assert {layer.weight.dtype for layer in packed_linears(loaded.model).values()} == {torch.bfloat16}


def test_keeps_zero_points_between_codes_where_asked_to(
    method: Method[Any], llama: LoadedModel, tmp_path: Path, tokens: Tensor
) -> None:
    result = run(method, llama, tokens, QuantConfig(num_bits=3, group_size=16, symmetric=False, float_zero=True))
    assert all(bool((weight.zero_point != weight.zero_point.round()).any()) for weight in result.values())
    with output_folder.atomic_folder(tmp_path / "packed", overwrite=False) as partial:
        native.save(partial, llama, tiny.specs(llama))
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(tiny.logits(restored), tiny.logits(llama.model))


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_8_bits_leave_the_model_as_good_as_it_was(
    method: Method[Any], family: str, tmp_path: Path, tokens: Tensor
) -> None:
    loaded = tiny.load(tiny.FAMILIES[family](tmp_path / "float"))
    before = tiny.logits(loaded.model)
    run(method, loaded, tokens, QuantConfig(num_bits=8, group_size=16))
    assert 0 < float((tiny.logits(loaded.model) - before).norm() / before.norm()) < 0.03


def test_a_block_whose_linears_are_all_skipped_stays_as_it_is(
    method: Method[Any], llama: LoadedModel, tokens: Tensor
) -> None:
    before = {name: weight.clone() for name, weight in llama.model.state_dict().items() if ".layers.0." in name}
    quant = QuantConfig(num_bits=4, group_size=16, overrides={"*.layers.0.*": {"skip": True}})
    result = run(method, llama, tokens, quant)
    assert result
    assert all(".layers.1." in name for name in result)
    linears = [name for name in before if "_proj" in name]
    assert linears
    for name in linears:
        assert torch.equal(llama.model.state_dict()[name], before[name]), name


def test_overrides_are_respected(method: Method[Any], llama: LoadedModel, tokens: Tensor) -> None:
    overrides: dict[str, Any] = {
        "*.q_proj": {"num_bits": 8},  # in one group with k and v, which have 4
        "*.v_proj": {"symmetric": False, "group_size": -1},
        "*.up_proj": {"skip": True},  # beside gate, which is quantized
        "*.down_proj": {"num_bits": 2, "scale_dtype": "float32"},
        "model.layers.1.mlp.*": {"skip": True},
    }
    floats = copy.deepcopy(llama)
    result = run(method, llama, tokens, QuantConfig(num_bits=4, group_size=16, overrides=overrides))
    labels = {name.removeprefix("model.layers."): weight.spec.label() for name, weight in result.items()}
    attention = {"q_proj": "w8g16", "k_proj": "w4g16", "v_proj": "w4pc asym", "o_proj": "w4g16"}
    assert labels == {
        **{f"{block}.self_attn.{name}": label for block in (0, 1) for name, label in attention.items()},
        "0.mlp.gate_proj": "w4g16",
        "0.mlp.down_proj": "w2g16",
    }
    for name, module in llama.model.named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(module.weight, floats.model.get_parameter(f"{name}.weight")), name
    assert bool(torch.isfinite(tiny.logits(llama.model)).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_less_error(
    method: Method[Any], make_llama: Callable[[], LoadedModel], tokens: Tensor, symmetric: bool
) -> None:
    before = tiny.logits(make_llama().model)
    errors = []
    for bits in BITS:
        loaded = make_llama()
        run(method, loaded, tokens, QuantConfig(num_bits=bits, group_size=16, symmetric=symmetric))
        errors.append(float((tiny.logits(loaded.model) - before).norm() / before.norm()))
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.05 * errors[0]


def test_unknown_settings_are_refused(method: Method[Any]) -> None:
    with pytest.raises(ValidationError, match="dampp"):
        method.config(dampp=1)


# -------------------------------------------------------------------------------------------------------------- rtn


@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_is_the_nearest_code_of_the_min_max_grid(llama: LoadedModel, symmetric: bool) -> None:
    quant = QuantConfig(num_bits=3, group_size=32, symmetric=symmetric, scale_dtype="bfloat16")
    weights = {target.name: target.weight.clone() for target in select_targets(llama, quant)}
    for name, found in run(load_method("rtn"), llama, torch.empty(0), quant).items():
        w = weights[name].view(weights[name].shape[0], -1, 32)
        grid = ((torch.arange(8) - found.zero_point.unsqueeze(-1)) * found.scale.unsqueeze(-1)).unsqueeze(2)
        distance = (grid - w.unsqueeze(-1)).abs()
        chosen = distance.gather(-1, found.codes.view_as(w).long().unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(chosen, distance.amin(-1), rtol=0, atol=1e-6)


def test_rtn_reports_the_weight_error_of_each_block(llama: LoadedModel) -> None:
    targets = select_targets(llama, W4)
    weights = {target.name: target.weight.clone() for target in targets}
    result = rtn.run(Job.select(llama, W4), rtn.Config())
    packed = packed_linears(llama.model)
    for block, error in enumerate(result.values("weight_error")):
        names = [target.name for target in targets if target.block == block]
        change = sum(float((packed[name].dequantized() - weights[name]).square().sum()) for name in names)
        assert error == pytest.approx(change / sum(float(weights[name].square().sum()) for name in names), rel=1e-5)


def test_rtn_with_a_searched_range_has_less_weight_error(make_llama: Callable[[], LoadedModel]) -> None:
    quant = QuantConfig(num_bits=3, group_size=32)
    plain, searched = (
        rtn.run(Job.select(make_llama(), quant), rtn.Config(range=kind, norm=2.0)).values("weight_error")
        for kind in ("minmax", "search")
    )
    assert all(ours < 0.95 * theirs for ours, theirs in zip(searched, plain, strict=True))
