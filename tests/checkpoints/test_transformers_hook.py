"""After ``import qtool``, transformers loads a native folder bit for bit, and keeps its weights packed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny
from helpers.weights import gradient
from packaging.version import Version
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from qtool.checkpoints import transformers_hook
from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.quantization_config import section_of
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.models.folders import read_config
from qtool.models.linears import packed_linears, replace_linear
from qtool.models.loading import load_model
from qtool.quant.affine import dequantize
from qtool.quant.packed_weight import GRIDS_VERSION
from qtool.system.errors import InputError

MIXED = QuantConfig.model_validate(
    {
        "num_bits": 3,
        "group_size": 32,
        "symmetric": False,
        "overrides": {
            "*.o_proj": {"num_bits": 8, "scale_dtype": "float32", "symmetric": True},
            "*.down_proj": {"num_bits": 2, "scale_dtype": "bfloat16"},
            "*.1.mlp.up_proj": {"skip": True},
        },
    }
)
QUANTS = {
    "llama": MIXED,
    "tied": QuantConfig(num_bits=4, group_size=-1),
    "gpt2": QuantConfig(num_bits=3, group_size=32, symmetric=False),
    "opt": QuantConfig(num_bits=4, group_size=32, symmetric=False),
}
BUILDERS: dict[str, Callable[[Path], Path]] = tiny.FAMILIES | {"tied": lambda folder: tiny.llama(folder, tied=True)}
LINEAR = "model.layers.0.self_attn.q_proj"


class Native:
    """A native folder, and the logits of the model that it was written from."""

    def __init__(self, family: str, at: Path) -> None:
        floats = BUILDERS[family](at / "float")
        self.folder = at / "native"
        written = tiny.quantize(floats, self.folder, QUANTS[family])
        self.logits = tiny.logits(written.model)
        self.specs = {name: layer.spec for name, layer in packed_linears(written.model).items()}
        self.floats = floats

    def load(self, **options: object) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder, **options)
        return model


@pytest.fixture(scope="module")
def natives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Native]:
    return {family: Native(family, tmp_path_factory.mktemp(family)) for family in QUANTS}


@pytest.fixture(params=sorted(QUANTS))
def native(request: pytest.FixtureRequest, natives: dict[str, Native]) -> Native:
    return natives[request.param]


@pytest.fixture(scope="module")
def llama(natives: dict[str, Native]) -> Native:
    return natives["llama"]


@pytest.fixture
def damaged(llama: Native, tmp_path: Path) -> Path:
    """A copy of the folder, to damage."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in llama.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.dequantized() for name, layer in packed_linears(model).items()}


def same_weights(model: nn.Module, native: Native) -> bool:
    source = NativeCheckpoint(native.folder)
    found = weights(model)
    return found.keys() == source.specs.keys() and all(
        torch.equal(weight, dequantize(*source.quantized(name))) for name, weight in found.items()
    )


# exactness


def test_logits_are_those_of_the_model_that_was_written_bit_by_bit(native: Native) -> None:
    assert torch.equal(tiny.logits(native.load(dtype=torch.float32)), native.logits)


def test_logits_are_those_of_the_float_model_with_dequantized_weights(native: Native) -> None:
    source = NativeCheckpoint(native.folder)
    dense = tiny.load(native.floats).model
    for name in source.specs:
        old = dense.get_submodule(name)
        weight = dequantize(*source.quantized(name))
        layer = nn.Linear(weight.shape[1], weight.shape[0], old.bias is not None)
        layer.weight = nn.Parameter(weight)
        if old.bias is not None:
            layer.bias = old.get_parameter("bias")
        replace_linear(dense, name, layer)
    assert torch.equal(tiny.logits(dense), native.logits)


def test_a_bias_is_kept(natives: dict[str, Native]) -> None:
    for family, key in (("opt", "model.decoder.layers.0.fc1.bias"), ("gpt2", "transformer.h.0.attn.c_attn.bias")):
        bias = natives[family].load(dtype="auto").get_parameter(key)
        floats = tiny.stored(natives[family].floats)
        stored = floats.get(key, floats.get(key.replace("transformer.", "")))
        assert stored is not None
        assert torch.equal(bias, stored)
        assert bias.abs().max() > 0


def test_tied_embeddings_are_tied_again(natives: dict[str, Native]) -> None:
    for family in ("tied", "gpt2", "opt"):
        model = natives[family].load()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    llama = natives["llama"].load()
    assert llama.get_output_embeddings().weight is not llama.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto", None], ids=str)
def test_whatever_the_dtype_scales_stay_as_stored_and_no_weight_changes(
    native: Native, dtype: torch.dtype | str | None
) -> None:
    model = native.load(dtype=dtype) if dtype else native.load()
    for name, layer in packed_linears(model).items():
        assert layer.spec == native.specs[name]
        assert str(layer.weight_scale.dtype) == f"torch.{layer.spec.scale_dtype}"
        assert (layer.weight_packed.dtype, layer.weight_shape.dtype) == (torch.int32, torch.int64)
    assert same_weights(model, native)
    logits = tiny.logits(model)
    assert logits.dtype == model.dtype
    assert (logits.float() - native.logits).abs().max() < 0.05 * native.logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casting_the_model_changes_no_weight(native: Native, dtype: torch.dtype) -> None:
    model = tiny.moved(native.load(dtype=torch.float32), dtype)
    assert model.dtype == dtype
    assert same_weights(model, native)
    assert torch.isfinite(tiny.logits(model)).all()
    half = nn.Module.half(model)  # transformers refuses model.half() for every quantized model
    assert same_weights(half, native)


def test_a_device_map_may_be_given(llama: Native) -> None:
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        model = llama.load(dtype=torch.float32, device_map=device_map)
        assert torch.equal(tiny.logits(model), llama.logits)
        assert {str(tensor.device) for tensor in model.state_dict().values()} == {"cpu"}


def test_a_copy_of_the_model_computes_the_same(llama: Native) -> None:
    assert torch.equal(tiny.logits(copy.deepcopy(llama.load(dtype=torch.float32))), llama.logits)


# packed in memory


def test_weights_stay_packed_in_memory(native: Native) -> None:
    model = native.load(dtype=torch.float32)
    tiny.logits(model)  # a forward must not leave weights expanded
    layers = packed_linears(model)
    assert set(layers) == set(native.specs)
    for name, layer in layers.items():
        held = {f"{name}.{key}" for key, _ in [*layer.named_buffers(), *layer.named_parameters()]}
        zero_point = set() if layer.spec.symmetric else {f"{name}.weight_zero_point"}
        bias = {f"{name}.bias"} if layer.bias is not None else set()
        parts = ("weight", "weight_packed", "weight_scale", "weight_shape")
        assert held == {f"{name}.{part}" for part in parts} | zero_point | bias
        bits = layer.spec.bits_per_weight(layer.in_features) * layer.in_features * layer.out_features
        assert sum(buffer.nbytes for buffer in layer.buffers()) == pytest.approx(bits / 8 + 20, rel=1e-9)
        assert not vars(layer).keys() & {"_weight", "_cache"}
    shapes = {(layer.out_features, layer.in_features) for layer in layers.values()}
    wide = {name for name, p in model.named_parameters() if tuple(p.shape) in shapes or tuple(p.shape)[::-1] in shapes}
    assert wide == ({"model.layers.1.mlp.up_proj.weight"} if native.specs.keys() == llama_specs() else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_marker_is_a_byte_in_files_and_has_the_models_dtype_in_memory(native: Native, dtype: torch.dtype) -> None:
    """Models cast hidden states to the dtype of a linear's weight."""
    model = native.load(dtype=dtype)
    markers = {f"{name}.weight" for name in native.specs}
    stored = tiny.stored(native.folder)
    assert all(stored[name].dtype == torch.uint8 and stored[name].tolist() == [1] for name in markers)
    for layer in packed_linears(model).values():
        assert (layer.weight.dtype, layer.weight.tolist()) == (dtype, [1.0])
        assert layer.state_dict()["weight"].dtype == torch.uint8
    half = tiny.moved(model, torch.float16)
    assert {layer.weight.dtype for layer in packed_linears(half).values()} == {torch.float16}


def llama_specs() -> set[str]:
    """Return the names of the quantized linears of the Llama with mixed grids."""
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    names = {f"model.layers.{i}.{part}" for i in (0, 1) for part in [*attention, "mlp.gate_proj", "mlp.down_proj"]}
    return names | {"model.layers.0.mlp.up_proj"}


def test_the_model_takes_less_memory_than_the_float_one(native: Native) -> None:
    assert native.load(dtype=torch.float32).get_memory_footprint() < sum(
        parameter.nbytes for parameter in tiny.load(native.floats).model.parameters()
    )


# use


def test_generate_writes_what_the_written_model_would(native: Native) -> None:
    model = native.load(dtype=torch.float32)
    prompt = tiny.probe()[:1]
    out = tiny.continued(model, prompt, 6)
    assert out.shape == (1, prompt.shape[1] + 6)
    with torch.no_grad():
        for position in range(prompt.shape[1], out.shape[1]):
            assert model(out[:, :position]).logits[0, -1].argmax() == out[0, position]


def test_gradients_flow_through_a_packed_linear_to_what_is_before_it(llama: Native) -> None:
    model = llama.load(dtype=torch.float32)
    embedding = model.get_parameter("model.embed_tokens.weight").requires_grad_(True)
    model(tiny.probe()).logits.sum().backward()
    assert gradient(embedding).abs().sum() > 0


def test_the_bare_model_without_a_head_loads_too(native: Native) -> None:
    whole = native.load(dtype=torch.float32)
    bare = AutoModel.from_pretrained(native.folder, dtype=torch.float32)
    with torch.no_grad():
        expected = whole.base_model(tiny.probe())[0]
        assert torch.equal(bare(tiny.probe())[0], expected)


@pytest.mark.parametrize("dtype", ["auto", torch.float32], ids=str)
def test_save_pretrained_writes_the_same_checkpoint(native: Native, dtype: str | torch.dtype, tmp_path: Path) -> None:
    native.load(dtype=dtype).save_pretrained(tmp_path / "again")
    first, second = tiny.stored(native.folder), tiny.stored(tmp_path / "again")
    assert first.keys() == second.keys()
    packed = set(first) - set(NativeCheckpoint(native.folder).float_names())
    assert len(packed) >= 4 * len(native.specs)
    for name, tensor in first.items():
        if dtype == "auto" or name in packed:
            assert second[name].dtype == tensor.dtype, name
        assert torch.equal(second[name].to(tensor.dtype), tensor), name
    section = read_config(tmp_path / "again")["quantization_config"]
    assert section == read_config(native.folder)["quantization_config"] == section_of(native.specs)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(tiny.logits(again), native.logits)


def test_the_config_can_be_printed_copied_and_written(llama: Native) -> None:
    config = llama.load().config
    assert '"quant_method": "qtool"' in repr(config)
    assert json.loads(config.to_json_string())["quantization_config"] == section_of(llama.specs)
    assert copy.deepcopy(config).quantization_config.specs == llama.specs


# what cannot be loaded


def test_a_config_of_another_version_or_method_is_refused(llama: Native) -> None:
    section = section_of(llama.specs)
    assert transformers_hook.QtoolConfig(**section).to_dict() == section
    with pytest.raises(InputError, match=f"format version {GRIDS_VERSION + 1}.*upgrade qtool"):
        transformers_hook.QtoolConfig(**section | {"format_version": GRIDS_VERSION + 1})
    with pytest.raises(InputError, match="format version None"):
        transformers_hook.QtoolConfig(**{key: value for key, value in section.items() if key != "format_version"})
    with pytest.raises(InputError, match="'gptq', not a qtool checkpoint"):
        transformers_hook.QtoolConfig(**section | {"quant_method": "gptq"})


def test_a_newer_checkpoint_is_refused_by_from_pretrained(damaged: Path) -> None:
    config = read_config(damaged)
    config["quantization_config"]["format_version"] = GRIDS_VERSION + 1
    write_json(damaged / "config.json", config)
    with pytest.raises(InputError, match="upgrade qtool"):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize(
    "section",
    [{"num_bits": 2}, {"group_size": -1}, {"linears": [LINEAR]}, {"overrides": {LINEAR: {"num_bits": 8}}}],
    ids=lambda section: next(iter(section)),
)
def test_tensors_that_do_not_fit_the_section_are_refused(damaged: Path, section: dict[str, object]) -> None:
    config = read_config(damaged)
    config["quantization_config"] |= section
    write_json(damaged / "config.json", config)
    compared = Version(transformers.__version__) >= Version("5.23")  # transformers compares shapes itself since then
    ours = r"weight_\w+ is torch\.\w+ \[.*\]; its grid w.* needs torch\.|is packed in the files, and quantization"
    said = r"has shape \[.*\] in the file, and the config asks for \[" if compared else ours
    with pytest.raises(InputError, match=said):
        load_model(ModelConfig(path=str(damaged)), quantized=True)
    with pytest.raises((InputError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("name", ["model.layers.9.self_attn.q_proj", "model.norm", "model.embed_tokens", "nothing"])
def test_a_section_that_lists_what_is_no_linear_is_refused_by_name(damaged: Path, name: str) -> None:
    config = read_config(damaged)
    config["quantization_config"]["linears"].append(name)
    write_json(damaged / "config.json", config)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_model(ModelConfig(path=str(damaged)), quantized=True)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_tensor_that_is_not_there_is_refused_by_name(damaged: Path, part: str) -> None:
    tensors = tiny.stored(damaged)
    del tensors[f"{LINEAR}.{part}"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"lacks 1 tensor.*{LINEAR}\.{part}"):
        load_model(ModelConfig(path=str(damaged)), quantized=True)
