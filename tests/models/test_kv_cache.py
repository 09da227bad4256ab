"""Rounding of activations, keys and values in whole models: where it acts, and that no export drops it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaAttention

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job, load_method
from qtool.blocks.stages import stages
from qtool.blocks.task import BlockTask
from qtool.checkpoints import native, output_folder
from qtool.checkpoints.native import NativeCheckpoint, PlannedCheckpoint
from qtool.checkpoints.quantization_config import grids_label, section_of, specs_of
from qtool.config import catalog
from qtool.config.quant import ActivationGrid, QuantConfig
from qtool.config.recipe import Recipe, resolved
from qtool.config.sections import ExportConfig, ModelConfig
from qtool.exporters import _base
from qtool.models.cache_argument import with_cache
from qtool.models.kv_cache import key_value_linears
from qtool.models.linears import linear_bias, packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.targets import select_targets
from qtool.pipelines import export, quantize
from qtool.quant.activations import round_tokens
from qtool.quant.packed_weight import ACTIVATIONS_VERSION, FORMAT_VERSION
from qtool.quant.trained_linear import QuantLinear
from qtool.system.errors import InputError
from qtool.training.linears import Start, pack_linears, put_linears

A8KV4 = QuantConfig(num_bits=4, group_size=16, symmetric=False, preset="a8kv4")
ATTENTION = "model.layers.{}.self_attn.{}"

# ----------------------------------------------------------------------------------------------- whole models


def witness(loaded: LoadedModel, folder: Path) -> Tensor:
    """Return the logits of the float model with dequantized weights and each rounding as a hook on its linear."""
    other = tiny.load(folder).model
    with torch.no_grad():
        for name, packed in packed_linears(loaded.model).items():
            linear = other.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight.copy_(packed.dequantized())
            linear.register_forward_pre_hook(lambda module, args: (round_tokens(args[0], 8),))
            if name.endswith(("k_proj", "v_proj")):
                linear.register_forward_hook(lambda module, args, out: round_tokens(out, 4, 16))
    return tiny.logits(other)


@pytest.mark.parametrize("name", ["rtn", "gptq", "signround", "lsq"])
def test_every_kind_of_method_ships_what_its_roundings_are(
    name: str, make_llama: Callable[[], LoadedModel], tokens: Tensor, llama_folder: Path, tmp_path: Path
) -> None:
    """The trained model, the one that transformers loads, and the witness agree."""
    method = load_method(name)
    short = {"signround": {"iterations": 3}, "lsq": {"steps": 2, "batch_size": 2}}
    loaded = make_llama()
    method.run(Job.select(loaded, A8KV4, tokens), method.config(**short.get(name, {})))
    with output_folder.atomic_folder(tmp_path / "out", overwrite=False) as partial:
        native.save(partial, loaded, tiny.specs(loaded))
    found = tiny.logits(loaded.model)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), found)
    assert torch.equal(
        tiny.logits(load_model(ModelConfig(path=str(tmp_path / "out"), device="cpu"), quantized=True).model), found
    )
    assert torch.equal(witness(loaded, llama_folder), found)


def test_training_computes_what_is_loaded_bit_for_bit(llama: LoadedModel, tmp_path: Path) -> None:
    """Compare the trainable layers before packing with the checkpoint made from them."""
    targets = select_targets(llama, A8KV4)
    layers = put_linears(llama.model, targets, lambda t: QuantLinear(t.weight, linear_bias(t.linear), t.spec))
    trained = tiny.logits(llama.model)
    pack_linears(llama.model, layers)
    with output_folder.atomic_folder(tmp_path / "out", overwrite=False) as partial:
        native.save(partial, llama, tiny.specs(llama))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(tiny.logits(loaded), trained)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), trained)


def test_the_driver_goes_on_from_rounded_blocks(llama: LoadedModel, tokens: Tensor) -> None:
    """A paused forward, on weights that are expanded meanwhile, equals that of the packed block."""

    def quantize_block(task: BlockTask) -> None:
        for stage in stages(task):
            for target in stage.targets:
                task.pack(target, QuantLinear(target.weight, None, target.spec).quantized)
        assert task.outputs is not None
        for paused, plain in zip(task.outputs, task.through(task.inputs), strict=True):
            assert torch.equal(paused, plain)

    run_blocks(Job.select(llama, A8KV4, tokens), quantize_block)
    assert len(packed_linears(llama.model)) == 14


def test_decoding_rounds_what_reading_at_once_does(llama_folder: Path) -> None:
    """float64, so that differences between product shapes do not move a value to another code."""
    model = tiny.packed(llama_folder, A8KV4).model.double()
    probe = tiny.probe()[:, :12]
    whole = model(probe).logits
    cache = DynamicCache(config=model.config)
    steps = [model(probe[:, i : i + 1], **with_cache(model, cache)).logits for i in range(12)]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-8)
    first = cache.layers[0]
    assert isinstance(first, DynamicLayer)
    assert first.keys is not None
    assert len(first.keys[0, 0, 3].unique()) > 1


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
    specs = {target.name: target.spec for target in select_targets(llama, A8KV4)}
    makers = {ATTENTION.format(i, name) for i in (0, 1) for name in ("k_proj", "v_proj")}
    assert {name for name, spec in specs.items() if spec.kv_cache} == makers
    assert {(spec.kv_cache, spec.kv_group_size) for name, spec in specs.items() if name in makers} == {(4, 16)}
    assert {(str(spec.activations), spec.kv_group_size) for name, spec in specs.items() if name not in makers} == {
        ("8", None)
    }


@pytest.mark.parametrize(
    ("family", "keys", "linear", "channels"),
    [
        (
            "llama",
            {"num_key_value_heads": 4},
            ATTENTION.format(0, "k_proj"),
            16,
        ),  # q, k and v have equal shapes
        ("opt", {}, "model.decoder.layers.1.self_attn.v_proj", 16),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}, ATTENTION.format(1, "k_proj"), 8),  # then a norm
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
    message = (
        r"^kv_cache: .*cannot be rounded in this model: keys come from .*, not from one linear .*; leave kv_cache out$"
    )
    with pytest.raises(InputError, match=message):
        key_value_linears(config)


def test_keys_that_come_from_two_linears_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sum(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(64, size), nn.Linear(64, size)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.one(x) + self.other(x)
            return out

    def init(self: LlamaAttention, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_module("k_proj", Sum(64))

    original = LlamaAttention.__init__
    monkeypatch.setattr(LlamaAttention, "__init__", init)
    with pytest.raises(InputError, match=r"keys come from \S*k_proj\.one and \S*k_proj\.other, not from one"):
        key_value_linears(LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=64))


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
    with pytest.raises(InputError, match=r"keys come from \S*c_attn, not from one linear"):
        quantize.quantize(recipe)
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
        select_targets(llama, QuantConfig.model_validate({"group_size": 16, **quant}))


def test_overrides_change_the_rounding_of_some_linears(llama: LoadedModel) -> None:
    overrides = {"*.down_proj": {"activations": 8}, "*.v_proj": {"kv_cache": None}, "*.1.*": {"activations": None}}
    quant = QuantConfig.model_validate(
        {"group_size": 16, "preset": "a4kv4", "kv_group_size": 8, "overrides": overrides}
    )
    specs = {target.name: target.spec for target in select_targets(llama, quant)}
    assert specs["model.layers.0.mlp.down_proj"].activations == ActivationGrid(num_bits=8)
    assert specs["model.layers.0.mlp.up_proj"].activations == ActivationGrid(num_bits=4)
    assert specs["model.layers.1.mlp.down_proj"].activations is None
    assert (specs[ATTENTION.format(0, "k_proj")].kv_cache, specs[ATTENTION.format(0, "k_proj")].kv_group_size) == (4, 8)
    assert specs[ATTENTION.format(0, "v_proj")].kv_cache is None
    assert specs_of(json.loads(json.dumps(section_of(specs)))) == specs
    assert grids_label(specs) == "w4g16 a4/8 kv4"


# ------------------------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize(("preset", "bits"), [("a8", (8, 8)), ("a8kv4", (8, 4)), ("a4kv4", (4, 4))])
def test_presets_fill_what_is_not_given(preset: str, bits: tuple[int, int], tmp_path: Path) -> None:
    quant = QuantConfig.model_validate({"preset": preset})
    assert (quant.activations, quant.kv_cache) == (ActivationGrid(num_bits=bits[0]), bits[1])
    assert QuantConfig.model_validate({"preset": preset, "activations": 6}).activations == ActivationGrid(num_bits=6)
    recipe = recipe_for(tmp_path, tmp_path / "out", {"preset": preset, "kv_cache": 6})
    assert Recipe.model_validate(resolved(recipe)) == recipe
    assert recipe.quant.kv_cache == 6


def test_a_group_without_bits_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"kv_group_size acts only with kv_cache.*give both, or neither"):
        QuantConfig.model_validate({"kv_group_size": 64})


# -------------------------------------------------------------------------------------- checkpoints and exports


def test_a_checkpoint_says_that_it_rounds_and_older_readers_stop_at_its_version(llama: LoadedModel) -> None:
    specs = {target.name: target.spec for target in select_targets(llama, A8KV4)}
    section = json.loads(json.dumps(section_of(specs)))
    assert section["format_version"] == ACTIVATIONS_VERSION == FORMAT_VERSION + 1
    assert (section["activations"], section["kv_cache"]) == (8, None)
    assert section["overrides"][ATTENTION.format(0, "k_proj")] == {"kv_cache": 4, "kv_group_size": 16}
    assert specs_of(section) == specs
    assert grids_label(specs) == "w4g16 asym a8 kv4"
    plain = section_of({name: spec.weights_only for name, spec in specs.items()})
    assert plain["format_version"] == FORMAT_VERSION
    assert not {"activations", "kv_cache", "kv_group_size"} & plain.keys()


SYMMETRIC: dict[str, Any] = {"activations": {"num_bits": 8, "symmetric": True}}
UNHELD: dict[str, tuple[dict[str, Any], str]] = {
    "activations": ({"activations": 8}, r"rounds activations .*; use the native"),
    "symmetric": (SYMMETRIC, r"rounds activations .*; use the native checkpoint or, for symmetric 8-bit ones, comp"),
    "4 bits": ({"activations": {"num_bits": 4, "symmetric": True}}, r"rounds activations .*; use the native"),
    "kv_cache": ({"kv_cache": 8}, r"rounds keys or values .*vLLM\); use the native"),
    "both": (SYMMETRIC | {"kv_cache": 4}, r"rounds "),
}


@pytest.mark.parametrize("name", catalog.export_formats())
@pytest.mark.parametrize("kind", UNHELD)
def test_no_export_leaves_it_out(name: str, kind: str, llama_folder: Path, llama: LoadedModel, tmp_path: Path) -> None:
    """It is refused after the run and, if the recipe asks for the export, before the run."""
    quant, reason = UNHELD[kind]
    if name == "compressed-tensors" and kind == "symmetric":
        pytest.skip("compressed-tensors holds it")
    config = QuantConfig.model_validate({"group_size": 16, **quant})
    tiny.quantize(llama_folder, tmp_path / "native", config)
    wanted = ExportConfig(format=name, path=tmp_path / "export")
    message = rf"cannot be exported as {name}: model\.layers\.0\.self_attn\.\w+ {reason}"
    with pytest.raises(InputError, match=message):
        export.export(tmp_path / "native", wanted, False)
    assert _base.refusal(name, NativeCheckpoint(tmp_path / "native"), wanted)
    targets = select_targets(llama, config)
    planned = PlannedCheckpoint(llama, {t.name: t.spec for t in targets}, {t.name: t.weight_shape for t in targets})
    assert _base.refusal(name, planned, wanted)
    entry = [{"format": name, "path": str(tmp_path / "export")}]
    with pytest.raises(InputError, match=message):
        quantize.quantize(recipe_for(llama_folder, tmp_path / "out", quant, export=entry))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "export").exists()


def test_a_training_with_rounding_starts_from_weights_without_it(
    llama: LoadedModel, tmp_path: Path, llama_folder: Path
) -> None:
    tiny.quantize(llama_folder, tmp_path / "start", QuantConfig(num_bits=4, group_size=16, symmetric=False))
    job = Job.select(llama, A8KV4)
    layers = put_linears(llama.model, job.targets, lambda t: QuantLinear(t.weight, None, t.spec))
    Start(str(tmp_path / "start"), job).take_codes(layers)
    source = NativeCheckpoint(tmp_path / "start")
    for name, layer in layers.items():
        assert torch.equal(layer.quantized.codes, source.quantized(name).codes)
        assert layer.freeze().spec.activations == ActivationGrid(num_bits=8)
