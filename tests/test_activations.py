"""Rounding of activations, keys and values: the arithmetic, where it acts, and that it is never left out in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig

from qtool import checkpoint, export, methods, run
from qtool.blocks import BlockTask, run_blocks
from qtool.checkpoint import Planned, Source
from qtool.config import ACTIVATIONS_VERSION, FORMAT_VERSION, ExportConfig, ModelConfig, QuantConfig, QuantSpec
from qtool.errors import InputError
from qtool.keyvalues import key_value_linears
from qtool.layout import describe, label, specs_of
from qtool.methods._trained import Start, pack_linears, put_linears
from qtool.models import LoadedModel, linear_bias, load_model, packed_linears
from qtool.quant.activations import round_tokens
from qtool.quant.linear import PackedLinear, QuantLinear
from qtool.recipe import Recipe, resolved

A8KV4 = QuantConfig(num_bits=4, group_size=16, symmetric=False, preset="a8kv4")
ATTENTION = "model.layers.{}.self_attn.{}"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ the arithmetic


def test_a_token_is_rounded_between_its_smallest_and_its_largest_value() -> None:
    """Golden, by hand: 2 bits on -1 .. 2 have a step of 1, and half of it goes to the even code."""
    x = torch.tensor([[-1.0, -0.4, 0.4, 2.0], [-1.0, -0.5, 0.5, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 3e-30]])
    expected = [[-1.0, 0.0, 0.0, 2.0], [-1.0, -1.0, 1.0, 2.0], [5.0] * 4, [0.0, 0.0, 0.0, 3e-30]]
    assert round_tokens(x, 2).tolist() == [pytest.approx(row) for row in expected]


def test_heads_have_ranges_of_their_own() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0, 10.0, 22.0, 30.0]])
    assert round_tokens(x, 2, 4).tolist() == [[0, 1, 2, 3, 0, 10, 20, 30]]
    assert round_tokens(x, 2).tolist() == [[0, 0, 0, 0, 0, 10, 20, 30]]


@given(st.integers(2, 8), st.sampled_from([None, 4, 8]), st.sampled_from([1e-3, 1.0, 1e4]), st.integers(0, 999))
def test_error_is_half_a_step_and_the_ends_stay(bits: int, size: int | None, magnitude: float, seed: int) -> None:
    x = magnitude * (randn(3, 2, 16, seed=seed) + 1)
    rounded = round_tokens(x, bits, size)
    groups, found = (t.double().unflatten(-1, (-1, size or 16)) for t in (x, rounded))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    assert bool(((found - groups).abs() <= step * 0.501).all())
    assert torch.allclose(found.amin(-1, keepdim=True), low, rtol=1e-5, atol=0)
    assert torch.allclose(found.amax(-1, keepdim=True), high, rtol=1e-4, atol=1e-5 * magnitude)
    codes = (found - low) / step
    assert bool(((codes - codes.round()).abs() < 1e-3).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_shape_stay_and_are_computed_in_no_less_than_float32(dtype: torch.dtype) -> None:
    x = randn(2, 3, 16).to(dtype)
    rounded = round_tokens(x.transpose(0, 1), 6, 8)  # of any strides
    assert (rounded.dtype, rounded.shape) == (dtype, (3, 2, 16))
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(rounded, round_tokens(x.transpose(0, 1).float(), 6, 8).to(dtype))
    assert torch.equal(rounded[1], round_tokens(x[:, 1], 6, 8))  # no token knows of another


def test_the_gradient_passes_unchanged() -> None:
    """By autograd of the formula with its range held constant: every value lies inside, so rounding is all there is."""
    x = randn(3, 16).double().requires_grad_()
    upstream = randn(3, 16, seed=1).double()
    (found,) = torch.autograd.grad(round_tokens(x, 4, 8), x, upstream)
    groups = x.unflatten(-1, (-1, 8))
    low, high = groups.detach().aminmax(dim=-1, keepdim=True)
    steps = (groups - low) / ((high - low) / 15)
    straight = steps + (steps.round() - steps).detach()
    (expected,) = torch.autograd.grad((straight * ((high - low) / 15) + low).flatten(-2), x, upstream)
    assert float((found - expected).abs().max()) < 1e-10
    assert torch.equal(found, upstream)


# ---------------------------------------------------------------------------------------------------- the layers

LAYER = QuantSpec(num_bits=4, group_size=8, symmetric=False, activations=5, kv_cache=3, kv_group_size=4)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, spec: QuantSpec) -> Tensor:
    """The linear on ``spec`` written out."""
    x = x if spec.activations is None else round_tokens(x, spec.activations)
    y = nn.functional.linear(x, weight, bias)
    return y if spec.kv_cache is None else round_tokens(y, spec.kv_cache, spec.kv_group_size)


@pytest.mark.parametrize(
    "spec", [LAYER, LAYER.model_copy(update={"kv_cache": None}), LAYER.model_copy(update={"activations": None})]
)
def test_both_layers_round_what_they_read_and_give(spec: QuantSpec) -> None:
    weight, bias, x = randn(12, 16), randn(12, seed=1), randn(2, 5, 16, seed=2)
    layer = QuantLinear(weight, bias, spec)
    expected = by_hand(x, layer.quantized_weight(), bias, spec)
    assert not torch.equal(expected, nn.functional.linear(x, layer.quantized_weight(), bias))
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.freeze()(x), expected)
    assert "activations=5" in repr(QuantLinear(weight, bias, LAYER).freeze())


def test_a_subclass_with_a_forward_of_its_own_rounds_too() -> None:
    class Other(QuantLinear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, torch.ones(12, 16))

    x = randn(5, 16)
    assert torch.equal(Other(randn(12, 16), None, LAYER)(x), by_hand(x, torch.ones(12, 16), torch.zeros(12), LAYER))


def test_a_kernel_gets_the_rounded_input_and_its_product_is_rounded() -> None:
    spec = QuantSpec(num_bits=4, group_size=32, symmetric=False, activations=3, kv_cache=3, kv_group_size=32)
    layer = QuantLinear(randn(64, 64), None, spec).freeze()
    plain = PackedLinear.from_quantized(layer.quantized._replace(spec=spec.weights_only), None)
    if layer.accelerate():
        pytest.skip("this machine has no kernel")
    plain.accelerate()
    x = randn(1, 64, seed=3)
    assert not torch.equal(plain(x), plain(round_tokens(x, 3)))
    assert torch.equal(layer(x), round_tokens(plain(round_tokens(x, 3)), 3, 32))


@pytest.mark.parametrize("bits", [None, 4])
def test_a_compiled_layer_rounds_too(bits: int | None) -> None:
    layer = QuantLinear(randn(12, 16), None, LAYER.model_copy(update={"activations": bits})).freeze()
    x = randn(5, 16)
    compiled = torch.compile(nn.Sequential(layer), backend="eager")
    assert torch.equal(compiled(x), layer(x))


def test_gradients_reach_weights_through_rounded_inputs() -> None:
    spec = LAYER.model_copy(update={"kv_cache": None, "kv_group_size": None})
    layer, x, upstream = QuantLinear(randn(12, 16), None, spec), randn(5, 16).requires_grad_(), randn(5, 12, seed=1)
    layer(x).backward(upstream)
    weight = layer.quantized_weight()
    (expected,) = torch.autograd.grad(weight, layer.weight, upstream.T @ round_tokens(x, 5))
    assert torch.allclose(layer.weight.grad, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(x.grad, upstream @ weight, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------- whole models


def witness(loaded: LoadedModel, folder: Path) -> Tensor:
    """Logits of the float model with the packed weights put in, and every rounding written out beside its linears."""
    other = tiny.load(folder).model
    with torch.no_grad():
        for name, packed in packed_linears(loaded.model).items():
            linear = other.get_submodule(name)
            linear.weight.copy_(packed.dequantized())
            linear.register_forward_pre_hook(lambda module, args: (round_tokens(args[0], 8),))
            if name.endswith(("k_proj", "v_proj")):
                linear.register_forward_hook(lambda module, args, out: round_tokens(out, 4, 16))
    return tiny.logits(other)


@pytest.mark.parametrize("name", ["rtn", "gptq", "signround", "lsq"])
def test_every_kind_of_method_ships_what_its_roundings_are(
    name: str, make_llama: Callable[[], LoadedModel], tokens: Tensor, llama_folder: Path, tmp_path: Path
) -> None:
    """No method knows of activations; what it trained with, what transformers loads and a witness agree."""
    method = methods.get(name)
    short = {"signround": {"iterations": 3}, "lsq": {"steps": 2, "batch_size": 2}}
    loaded = make_llama()
    method.run(loaded, tokens, A8KV4, method.config(**short.get(name, {})), 0)
    with checkpoint.atomic_folder(tmp_path / "out", overwrite=False) as partial:
        checkpoint.save(partial, loaded, tiny.specs(loaded))
    found = tiny.logits(loaded.model)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), found)
    assert torch.equal(
        tiny.logits(load_model(ModelConfig(path=str(tmp_path / "out"), device="cpu"), quantized=True).model), found
    )
    assert torch.equal(witness(loaded, llama_folder), found)


def test_training_computes_what_is_loaded_bit_for_bit(llama: LoadedModel, tmp_path: Path) -> None:
    """The model with layers that train, before it is packed, and the checkpoint of it."""
    targets = llama.targets(A8KV4)
    layers = put_linears(llama.model, targets, lambda t: QuantLinear(t.weight, linear_bias(t.linear), t.spec))
    trained = tiny.logits(llama.model)
    pack_linears(llama.model, layers)
    with checkpoint.atomic_folder(tmp_path / "out", overwrite=False) as partial:
        checkpoint.save(partial, llama, tiny.specs(llama))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(tiny.logits(loaded), trained)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), trained)


def test_the_driver_goes_on_from_rounded_blocks(llama: LoadedModel, tokens: Tensor) -> None:
    """Forwards that pause, with weights that are expanded for a while, give what the packed block gives."""

    def quantize_block(task: BlockTask) -> None:
        for stage in task.stages():
            for target in stage.targets:
                task.pack(target, QuantLinear(target.weight, None, target.spec).quantized)
        assert task.outputs is not None
        for paused, plain in zip(task.outputs, task.through(task.inputs), strict=True):
            assert torch.equal(paused, plain)

    run_blocks(llama, tokens, llama.targets(A8KV4), quantize_block)
    assert len(packed_linears(llama.model)) == 14


def test_decoding_rounds_what_reading_at_once_does(llama_folder: Path) -> None:
    model = tiny.packed(llama_folder, A8KV4).model
    probe = tiny.probe()[:, :12]
    whole = model(probe).logits
    cache = DynamicCache(config=model.config)
    steps = [model(probe[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(12)]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)
    keys = torch.cat([layer.keys for layer in cache.layers])
    assert len(keys[0, 0, 3].unique()) > 1


def test_fewer_bits_more_error(llama_folder: Path) -> None:
    expected = tiny.logits(tiny.packed(llama_folder, QuantConfig(num_bits=8, group_size=16)).model)
    errors = [
        float(
            (
                tiny.logits(tiny.packed(llama_folder, QuantConfig(num_bits=8, group_size=16, **keys)).model) - expected
            ).norm()
        )
        for keys in ({"activations": 8}, {"preset": "a8"}, {"preset": "a8kv4"}, {"preset": "a4kv4"}, {"activations": 2})
    ]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3] < errors[4]


# --------------------------------------------------------------------------------------------------- where it acts


def test_keys_and_values_are_found_and_get_the_channels_of_a_head(llama: LoadedModel) -> None:
    specs = {target.name: target.spec for target in llama.targets(A8KV4)}
    makers = {ATTENTION.format(i, name) for i in (0, 1) for name in ("k_proj", "v_proj")}
    assert {name for name, spec in specs.items() if spec.kv_cache} == makers
    assert {(spec.kv_cache, spec.kv_group_size) for name, spec in specs.items() if name in makers} == {(4, 16)}
    assert {(spec.activations, spec.kv_group_size) for name, spec in specs.items() if name not in makers} == {(8, None)}


@pytest.mark.parametrize(
    ("family", "keys", "linear", "channels"),
    [
        ("llama", {"num_key_value_heads": 4}, ATTENTION.format(0, "k_proj"), 16),  # all four of one shape
        ("opt", {}, "model.decoder.layers.1.self_attn.v_proj", 16),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}, ATTENTION.format(1, "k_proj"), 8),  # a norm between
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, "transformer.h.0.attn.attention.k_proj", 16),
    ],
)
def test_they_are_found_in_other_architectures(family: str, keys: dict[str, Any], linear: str, channels: int) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    sizes |= {"num_heads": 4, "num_layers": 2} if family == "gpt_neo" else {}
    sizes |= {"word_embed_proj_dim": 64} if family == "opt" else {}
    found = key_value_linears(AutoConfig.for_model(family, **(sizes | keys)))
    assert found[linear] == channels
    assert len(found) == 4
    assert not any("q_proj" in name or "o_proj" in name for name in found)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "falcon"])
def test_fused_projections_are_refused(family: str) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=64)
    message = r"^kv_cache: .*cannot be rounded in this model: .* makes its keys together .*; leave kv_cache out$"
    with pytest.raises(InputError, match=message):
        key_value_linears(config)


def test_a_model_that_does_not_run_without_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such thing\nand a trace")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", fail)
    with pytest.raises(
        InputError, match=r"does not run without weights \(RuntimeError: no such thing\); leave kv_cache"
    ):
        key_value_linears(LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=64))


def recipe_for(folder: Path, out: Path, quant: dict[str, Any], **more: Any) -> Recipe:
    sections = {
        "model": {"path": str(folder), "device": "cpu"},
        "method": {"name": "rtn"},
        "output": {"path": str(out)},
    }
    return Recipe.model_validate({**sections, "quant": {"group_size": 16, **quant}, **more})


def test_what_cannot_be_found_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = recipe_for(tiny.gpt2(tmp_path / "gpt2"), tmp_path / "out", {"kv_cache": 8})
    with pytest.raises(InputError, match="c_attn makes its keys together"):
        run.quantize(recipe, "ptq")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (
            {"kv_cache": 8, "overrides": {"*.k_proj": {"skip": True}}},
            r"kv_cache: model\.layers\.0\.self_attn\.k_proj makes keys or values and stays in floating point.*1 more",
        ),
        ({"kv_cache": 8, "kv_group_size": 24}, r"kv_group_size 24 does not divide the 32 channels that model\.layers"),
    ],
)
def test_rounding_that_cannot_act_is_refused(llama: LoadedModel, quant: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llama.targets(QuantConfig.model_validate({"group_size": 16, **quant}))


def test_overrides_change_the_rounding_of_some_linears(llama: LoadedModel) -> None:
    overrides = {"*.down_proj": {"activations": 8}, "*.v_proj": {"kv_cache": None}, "*.1.*": {"activations": None}}
    quant = QuantConfig.model_validate(
        {"group_size": 16, "preset": "a4kv4", "kv_group_size": 8, "overrides": overrides}
    )
    specs = {target.name: target.spec for target in llama.targets(quant)}
    assert specs["model.layers.0.mlp.down_proj"].activations == 8
    assert specs["model.layers.0.mlp.up_proj"].activations == 4
    assert specs["model.layers.1.mlp.down_proj"].activations is None
    assert (specs[ATTENTION.format(0, "k_proj")].kv_cache, specs[ATTENTION.format(0, "k_proj")].kv_group_size) == (4, 8)
    assert specs[ATTENTION.format(0, "v_proj")].kv_cache is None
    assert specs_of(json.loads(json.dumps(describe(specs)))) == specs
    assert label(specs) == "w4g16 a4/8 kv4"


# ------------------------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize(("preset", "bits"), [("a8", (8, 8)), ("a8kv4", (8, 4)), ("a4kv4", (4, 4))])
def test_presets_fill_what_is_not_given(preset: str, bits: tuple[int, int], tmp_path: Path) -> None:
    quant = QuantConfig.model_validate({"preset": preset})
    assert (quant.activations, quant.kv_cache) == bits
    assert QuantConfig.model_validate({"preset": preset, "activations": 6}).activations == 6
    recipe = recipe_for(tmp_path, tmp_path / "out", {"preset": preset, "kv_cache": 6})
    assert Recipe.model_validate(resolved(recipe)) == recipe
    assert recipe.quant.kv_cache == 6


def test_a_group_without_bits_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"kv_group_size acts only with kv_cache.*give both, or neither"):
        QuantConfig.model_validate({"kv_group_size": 64})


# -------------------------------------------------------------------------------------- checkpoints and exports


def test_a_checkpoint_says_that_it_rounds_and_older_readers_stop_at_its_version(llama: LoadedModel) -> None:
    specs = {target.name: target.spec for target in llama.targets(A8KV4)}
    section = json.loads(json.dumps(describe(specs)))
    assert section["format_version"] == ACTIVATIONS_VERSION == FORMAT_VERSION + 1
    assert (section["activations"], section["kv_cache"]) == (8, None)
    assert section["overrides"][ATTENTION.format(0, "k_proj")] == {"kv_cache": 4, "kv_group_size": 16}
    assert specs_of(section) == specs
    assert label(specs) == "w4g16 asym a8 kv4"
    plain = describe({name: spec.weights_only for name, spec in specs.items()})
    assert plain["format_version"] == FORMAT_VERSION
    assert not {"activations", "kv_cache", "kv_group_size"} & plain.keys()


@pytest.mark.parametrize("name", export.names())
@pytest.mark.parametrize("quant", [{"activations": 8}, {"kv_cache": 8}])
def test_no_export_leaves_it_out(
    name: str, quant: dict[str, Any], llama_folder: Path, llama: LoadedModel, tmp_path: Path
) -> None:
    """After the run and, asked for in its recipe, before it."""
    config = QuantConfig(group_size=16, **quant)
    tiny.quantize(llama_folder, tmp_path / "native", config)
    wanted = ExportConfig(format=name, path=tmp_path / "export")
    message = rf"cannot be exported as {name}: model\.layers\.0\.self_attn\.\w+ rounds activations .*; use the native"
    with pytest.raises(InputError, match=message):
        run.export(tmp_path / "native", wanted, False)
    assert export.refusal(name, Source(tmp_path / "native"), wanted)
    targets = llama.targets(config)
    planned = Planned(llama, {t.name: t.spec for t in targets}, {t.name: t.weight_shape for t in targets})
    assert export.refusal(name, planned, wanted)
    entry = [{"format": name, "path": str(tmp_path / "export")}]
    with pytest.raises(InputError, match=message):
        run.quantize(recipe_for(llama_folder, tmp_path / "out", quant, export=entry), "ptq")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "export").exists()


def test_a_training_with_rounding_starts_from_weights_without_it(
    llama: LoadedModel, tmp_path: Path, llama_folder: Path
) -> None:
    tiny.quantize(llama_folder, tmp_path / "start", QuantConfig(num_bits=4, group_size=16, symmetric=False))
    targets = llama.targets(A8KV4)
    layers = put_linears(llama.model, targets, lambda t: QuantLinear(t.weight, None, t.spec))
    Start(str(tmp_path / "start"), targets).take_codes(layers)
    source = Source(tmp_path / "start")
    for name, layer in layers.items():
        assert torch.equal(layer.quantized.codes, source.quantized(name).codes)
        assert layer.freeze().spec.activations == 8
