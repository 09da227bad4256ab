"""SmoothQuant: its limits, that the float model stays what it was, and that outliers no longer cost anything."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import architectures, tiny
from helpers.families import make_config, write
from helpers.methods import run, same
from helpers.notes import Notes
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from qtool.blocks import states
from qtool.blocks.driver import run_blocks
from qtool.blocks.folds import find_folds
from qtool.blocks.job import Job, load_method
from qtool.blocks.task import BlockTask
from qtool.config.quant import ActivationGrid, QuantConfig
from qtool.config.sections import ModelConfig
from qtool.methods import smoothquant
from qtool.methods.smoothquant import largest_inputs, smooth, smoothing_scale
from qtool.models.linears import weight_of
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.targets import select_targets
from qtool.system import progress
from qtool.system.errors import InputError

W8A8 = QuantConfig(num_bits=8, group_size=-1, activations=ActivationGrid(num_bits=8))
LOUD = torch.tensor([3, 17, 40])  # channels of a planted outlier


@torch.no_grad()
def split(loaded: LoadedModel, factor: float) -> LoadedModel:
    """Multiply channels of each norm and of ``up_proj`` by ``factor`` and divide what reads them: the same function."""
    for _, block in loaded.blocks():
        attention, mlp = block.get_submodule("self_attn"), block.get_submodule("mlp")
        for norm, readers in (
            ("input_layernorm", [attention.get_submodule(f"{name}_proj") for name in "qkv"]),
            ("post_attention_layernorm", [mlp.get_submodule(f"{name}_proj") for name in ("gate", "up")]),
        ):
            weight_of(block.get_submodule(norm))[LOUD] *= factor
            for reader in readers:
                weight_of(reader)[:, LOUD] /= factor
        weight_of(mlp.get_submodule("up_proj"))[LOUD] *= factor
        weight_of(mlp.get_submodule("down_proj"))[:, LOUD] /= factor
    return loaded


def tasks(loaded: LoadedModel, tokens: Tensor, visit: Callable[[BlockTask], None]) -> None:
    """Call ``visit`` for each block and leave the block as ``visit`` changed it."""
    targets = select_targets(loaded, W8A8)
    run_blocks(
        Job(loaded, (), tokens),
        lambda task: visit(replace(task, targets=[t for t in targets if t.block == task.index])),
    )


# ------------------------------------------------------------------------------------------------------------ scale


magnitudes = st.floats(2**-30, 2**30, width=32)


@given(magnitudes, magnitudes, st.floats(0, 1))
def test_the_scale_is_equation_4_and_one_at_strength_zero(x: float, w: float, strength: float) -> None:
    found = float(smoothing_scale(torch.tensor([x]), torch.tensor([w]), strength)[0])
    assert found == pytest.approx(x**strength / w ** min(strength, 1 - strength), rel=1e-6)
    assert torch.equal(smoothing_scale(torch.tensor([x]), torch.tensor([w]), 0.0), torch.ones(1))


@given(magnitudes, magnitudes, st.floats(0.5, 1), st.integers(-40, 40))
def test_the_scale_follows_a_power_of_two_exactly(x: float, w: float, strength: float, k: int) -> None:
    inputs, weights = torch.tensor([x]), torch.tensor([w])
    moved = smoothing_scale(inputs * 2.0**k, weights / 2.0**k, strength)
    assert torch.equal(moved, smoothing_scale(inputs, weights, strength) * 2.0**k)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_channels_that_are_always_zero_are_left(strength: float) -> None:
    s = smoothing_scale(torch.tensor([0.0, 2.0, 0.0, 9.0]), torch.tensor([3.0, 0.0, 0.0, 4.0]), strength)
    assert s[:3].tolist() == [1, 1, 1]
    assert float(s[3]) != 1


# ----------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_strength_zero_is_the_method_of_the_weights(
    weights: str, dtype: str, family: str, tmp_path: Path, tokens: Tensor
) -> None:
    folder = write(make_config(family), tmp_path / "m")
    ours, theirs = (load_model(ModelConfig(path=str(folder), dtype=dtype, device="cpu")) for _ in range(2))
    found = run(load_method("smoothquant"), ours, tokens, W8A8, strength=0, weights=weights)
    assert same(found, run(load_method(weights), theirs, tokens, W8A8))
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(("weights", "kind"), [("rtn", "search"), ("gptq", "minmax"), ("gptq", "search")])
def test_range_is_that_of_the_method_of_the_weights(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, weights: str, kind: str
) -> None:
    quant = QuantConfig(num_bits=3, group_size=16)
    found = run(load_method("smoothquant"), make_llama(), tokens, quant, strength=0, weights=weights, range=kind)
    assert same(found, run(load_method(weights), make_llama(), tokens, quant, range=kind))


def test_a_range_that_the_method_of_the_weights_does_not_have_is_refused() -> None:
    with pytest.raises(ValidationError, match="range: weighted needs weights: gptq; rtn has minmax and search"):
        smoothquant.Config(range="weighted")


def test_strength_one_makes_the_input_channels_equally_large(llama: LoadedModel, tokens: Tensor) -> None:
    seen: list[Tensor] = []

    def visit(task: BlockTask) -> None:
        smooth(task, 1.0, torch.float32, {})
        leaders = [fold.readers[0].linear for fold in find_folds(task, task.inputs[0][:1])]
        seen.extend(largest_inputs(task, leaders).values())

    tasks(split(llama, 64), tokens, visit)
    assert len(seen) == 6  # both norms and up_proj of two blocks
    for largest in seen:
        assert torch.allclose(largest, torch.ones_like(largest), rtol=1e-4, atol=0)


def test_the_maxima_are_those_of_all_batches(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = run(load_method("smoothquant"), make_llama(), tokens, W8A8)
    monkeypatch.setattr(states, "TOKENS_PER_BATCH", tokens.shape[1])
    apart, loaded = run(load_method("smoothquant"), make_llama(), tokens, W8A8), make_llama()
    first = run(load_method("smoothquant"), loaded, tokens[-1:], W8A8)
    for name in once:
        assert torch.allclose(apart[name].scale, once[name].scale, rtol=2e-3), name  # float16: sums differ in rounding
    assert not all(torch.allclose(first[name].scale, once[name].scale, rtol=2e-3) for name in once)


def test_strength_one_half_makes_inputs_and_weights_equally_large(llama: LoadedModel, tokens: Tensor) -> None:
    def visit(task: BlockTask) -> None:
        smooth(task, 0.5, torch.float32, {})
        folds = find_folds(task, task.inputs[0][:1])
        inputs = largest_inputs(task, [fold.readers[0].linear for fold in folds])
        for fold in folds:
            found = inputs[fold.readers[0].linear]
            columns = torch.cat([reader.weight for reader in fold.readers]).abs().amax(0)
            assert torch.allclose(columns, found, rtol=1e-4)
            checked.append(found)

    checked: list[Tensor] = []
    tasks(split(llama, 64), tokens, visit)
    assert len(checked) == 6


# --------------------------------------------------------------------------------------------- the float model stays


FAMILIES = {"llama": 3, "gemma3": 3, "opt": 4, "gpt2": 2, "smollm": 4, "phi3": 2, "olmo2": 2}  # folds of a block
MIXTURES = ["qwen3_moe", "gpt_oss", "granitemoe"]


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_the_float_model_computes_what_it_did(family: str, strength: float, tmp_path: Path, tokens: Tensor) -> None:
    """Norms with ``1 + weight``, layer norms with a bias, ReLU, ``Conv1D``, fused linears, and mixtures."""
    mixture = family in MIXTURES
    folder = architectures.write(family, tmp_path / "m") if mixture else write(make_config(family), tmp_path / "m")
    loaded = tiny.load(folder)
    text = tokens % int(loaded.model.config.get_text_config().vocab_size)
    before = copy.deepcopy(loaded)
    found: dict[Any, Any] = {}
    tasks(loaded, text, lambda task: smooth(task, strength, torch.float32, found))
    if not mixture:
        assert {len(folds) for folds in found.values()} == {FAMILIES[family]}
    with torch.no_grad():
        expected, ours = (each.model(input_ids=text).logits for each in (before, loaded))
    assert float((ours - expected).norm() / expected.norm()) < 1e-4
    changed = [n for n, p in loaded.model.named_parameters() if not torch.equal(p, before.model.get_parameter(n))]
    assert changed
    assert not any("router" in name or "mlp.gate.weight" in name for name in changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_that_are_stored_in_half_precision_are_written_as_they_were_used(
    dtype: torch.dtype, tmp_path: Path, tokens: Tensor
) -> None:
    loaded = tiny.load(tiny.llama(tmp_path / "m", dtype=dtype))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.copy_(parameter.to(dtype))
    before = copy.deepcopy(loaded)
    tasks(loaded, tokens, lambda task: smooth(task, 0.5, dtype, {}))
    norms = [name for name, parameter in loaded.model.named_parameters() if parameter.dim() == 1]
    assert len([n for n in norms if not torch.equal(loaded.model.get_parameter(n), before.model.get_parameter(n))]) == 4
    for name in norms:
        parameter = loaded.model.get_parameter(name)
        assert torch.equal(parameter.to(dtype).float(), parameter), name
    expected, ours = (tiny.logits(each.model) for each in (before, loaded))
    assert float((ours - expected).norm() / expected.norm()) < 1e-5  # as close as without storing anything


# --------------------------------------------------------------------------------------------------------- outliers


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
@pytest.mark.parametrize("strength", [0.5, 0.65, 1.0])
@pytest.mark.parametrize("k", [-3, 7])
def test_where_an_outlier_lies_makes_no_difference(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, k: int, strength: float, weights: str
) -> None:
    """Not a bit of the result: a factor of norm, readers, or ``up_proj`` and ``down_proj`` is taken out again."""
    ours, theirs = split(make_llama(), 2.0**k), make_llama()
    settings = {"strength": strength, "weights": weights}
    found = run(load_method("smoothquant"), ours, tokens, W8A8, **settings)
    assert same(found, run(load_method("smoothquant"), theirs, tokens, W8A8, **settings))
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_w8a8_survives_planted_outliers(
    make_llama: Callable[[], LoadedModel], tokens: Tensor, weights: str, symmetric: bool
) -> None:
    """They cost more than a hundred times the squared error; scaled into the weights they cost nothing."""
    inputs = ActivationGrid(num_bits=8, symmetric=symmetric)
    quant = W8A8.model_copy(update={"activations": inputs})

    def error(method: str, factor: float, **settings: Any) -> float:
        chosen, loaded = load_method(method), split(make_llama(), factor)
        # every block is judged on text: rtn reads none by itself
        result = chosen.run(Job.select(loaded, quant, tokens), chosen.config(**settings))
        return max(result.values("block_error"))

    plain, planted = error(weights, 1), error(weights, 64)
    assert planted > 100 * plain
    smoothed = error("smoothquant", 64, weights=weights)
    assert smoothed < 0.005 * planted
    assert smoothed < 1.5 * plain


def test_a_weight_that_the_scale_dtype_no_longer_holds_is_refused(llama: LoadedModel, tokens: Tensor) -> None:
    with torch.no_grad():
        weight_of(llama.blocks()[0][1].get_submodule("input_layernorm"))[3] *= 1e9
    found = (
        r"0\.self_attn\.q_proj\.weight, scaled by method\.strength 1, has weights up to .* quant\.scale_dtype: float32"
    )
    with pytest.raises(InputError, match=found):
        run(load_method("smoothquant"), llama, tokens, W8A8, strength=1)


def test_linears_that_nothing_can_scale_are_named_once(llama: LoadedModel, tokens: Tensor) -> None:
    notes = Notes()
    with progress.use(notes):
        run(load_method("smoothquant"), llama, tokens, W8A8)
    assert [note for note in notes.texts if "scaled" in note] == [
        "the inputs of model.layers.0.self_attn.o_proj, and of linears like these in other blocks, are not scaled: no "
        "module before them can take a scale"
    ]


@pytest.mark.parametrize(("strength", "said"), [(0.5, 1), (0, 0)])
def test_scaling_without_rounded_activations_is_worth_a_note(
    llama: LoadedModel, tokens: Tensor, strength: float, said: int
) -> None:
    notes = Notes()
    with progress.use(notes):
        run(load_method("smoothquant"), llama, tokens, W8A8.model_copy(update={"activations": None}), strength=strength)
    assert len([text for text in notes.texts if text.startswith("quant.activations is unset")]) == said
    assert not any("can take a scale" in text for text in notes.texts)
