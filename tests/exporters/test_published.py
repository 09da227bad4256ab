"""Exports carry the names and layouts of published checkpoints, whatever transformers makes of those in memory."""

from pathlib import Path

import pytest
import torch
from helpers import architectures, tiny
from helpers.native_checkpoints import exported, read_back
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig
from qtool.exporters._published import Place, Published
from qtool.system.errors import InputError

FAST = (  # renamed, joined, split and stacked linears, transposed ones, stacks of either order, a tower
    "gpt2",
    "gpt_neox",
    "hrm_text",
    "lara_mini",
    "olmo_hybrid",
    "nemotron_h",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "granitemoe",
    "aria_text",
    "inkling2_text",
    "gemma3_vl",
)


def rows_in_memory(model: PreTrainedModel, names: Published, linear: str) -> Tensor:
    """Return the rows ``[rows, in]`` of a linear of a float model, the experts of a layer one after the other."""
    if linear in names.experts:
        weight = model.get_parameter(linear)
        return (weight.transpose(1, 2) if names.experts[linear].column == 1 else weight).flatten(0, 1)
    weight = model.get_parameter(f"{linear}.weight")
    return weight.T if isinstance(model.get_submodule(linear), Conv1D) else weight


def check_against_save_pretrained(name: str, folder: Path) -> None:
    architectures.write(name, folder)
    stored = tiny.stored(folder)
    model, _ = architectures.load(name, folder)
    model.bfloat16()
    names = Published(model)
    found = {
        key: place.shaped(place.gather(lambda linear: rows_in_memory(model, names, linear).bfloat16()))
        for key, place in names.places.items()
    }
    assert all(torch.equal(tensor, stored[key].bfloat16()) for key, tensor in found.items() if key in stored)
    floats = names.floats(model.state_dict())
    assert stored.keys() <= floats.keys()
    assert all(
        torch.equal(floats[key], tensor.bfloat16()) for key, tensor in stored.items() if tensor.dtype.itemsize == 2
    )
    for linear, count in names.rows.items():  # each row is in one place
        rows = [place.linears[linear][1] for place in names.places.values() if linear in place.linears]
        assert torch.equal(torch.cat(rows).sort().values, torch.arange(count)), linear


@pytest.mark.parametrize("name", FAST)
def test_rows_and_tensors_are_where_save_pretrained_writes_them(name: str, tmp_path: Path) -> None:
    check_against_save_pretrained(name, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in architectures.architectures() if name not in FAST])
def test_rows_and_tensors_of_every_family_are_where_save_pretrained_writes_them(name: str, tmp_path: Path) -> None:
    check_against_save_pretrained(name, tmp_path / "model")


def test_a_model_on_the_meta_device_shows_where_an_expert_lies() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architectures.make_config("mixtral"))
    names = Published(model)
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    size = model.config.intermediate_size
    place = names.places["model.layers.1.block_sparse_moe.experts.2.w3.weight"]  # the "up" half of the third expert
    assert place.linears.keys() == {fused}
    assert torch.equal(place.linears[fused][1], torch.arange(5 * size, 6 * size))
    assert (place.shape, place.column, place.plain, place.whole) == ((size,), 1, True, None)
    assert names.name("lm_head.weight") == "lm_head.weight"
    assert names.modules("model.layers.0.mlp.gate") == ["model.layers.0.block_sparse_moe.gate"]


@pytest.mark.parametrize(("name", "interleaved"), [("granitemoe", False), ("gpt_oss", True)])
def test_stacks_have_gate_and_up_apart(name: str, interleaved: bool) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architectures.make_config(name))
    names = Published(model)
    linear = next(each for each in names.experts if each.endswith(".gate_up_proj"))
    count, size = names.experts[linear].shape
    stacks = names.stacks(lambda parent, part: f"{parent}.{part}")
    assert not names.places.keys() & {key for key, place in stacks.items() if linear in place.linears}
    gate = next(place for key, place in stacks.items() if linear in place.linears and key.endswith("gate_proj"))
    rows = torch.arange(count * size).reshape(count, size)
    assert torch.equal(
        gate.linears[linear][1].reshape(gate.shape), rows[:, ::2] if interleaved else rows[:, : size // 2]
    )


def test_rows_that_were_put_back_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(4, 5, generator=generator)}
    a, b = (torch.tensor([0, 3]), torch.tensor([2, 1])), (torch.tensor([1, 2]), torch.tensor([0, 3]))
    place = Place({"a": a, "b": b}, (2, 2), 1)
    rows = place.gather(weights.__getitem__)
    assert torch.equal(rows, torch.stack([weights["a"][2], weights["b"][0], weights["b"][3], weights["a"][1]]))
    assert place.shaped(rows).shape == (2, 5, 2)
    assert torch.equal(place.flat(place.shaped(rows)), rows)
    found: dict[str, Tensor] = {}
    place.scatter(rows, found, {"a": 3, "b": 4})
    assert torch.equal(found["a"][[2, 1]], weights["a"][[2, 1]])
    assert bool(found["a"][0].isnan().all())


# exports of models whose names differ


@pytest.mark.parametrize("name", ["gpt_neox", "nemotron_h", "gemma3_vl", "olmo_hybrid"])
@pytest.mark.parametrize("format", ["dense", "compressed-tensors", "mlx"])
def test_an_export_has_the_names_of_the_published_checkpoint(name: str, format: str, tmp_path: Path) -> None:
    floats = architectures.write(name, tmp_path / "float")
    tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=32))
    published, out = tiny.stored(floats), exported(tmp_path / "q", format, tmp_path / "out")
    parts = (
        ("weight_packed", "weight_scale", "weight_shape") if format == "compressed-tensors" else ("scales", "biases")
    )
    found = {key.rpartition(".")[0] + ".weight" if key.endswith(parts) else key for key in tiny.stored(out)}
    if format != "mlx" or name != "nemotron_h":  # MLX has stacks of experts there
        assert found == published.keys()
    model, faults = architectures.load(name, tmp_path / "q")
    assert not faults
    if format == "dense":
        theirs, faults = architectures.load(name, out)
        assert not faults
        assert torch.equal(architectures.logits(theirs), architectures.logits(model))
    else:
        assert torch.equal(read_back(out), tiny.logits(model))


def test_linears_of_one_published_tensor_must_have_the_same_grid_where_they_are_packed(tmp_path: Path) -> None:
    floats = architectures.write("lara_mini", tmp_path / "float")
    tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=32))  # it leaves in_proj_a and in_proj_b in float
    words = r"in_proj_qkv and \S*in_proj_\w are one tensor, \S*\.in_proj\.weight, in published .* different grids"
    with pytest.raises(InputError, match=words):
        exported(tmp_path / "q", "compressed-tensors", tmp_path / "ct")
    model, _ = architectures.load("lara_mini", tmp_path / "q")
    theirs, faults = architectures.load("lara_mini", exported(tmp_path / "q", "dense", tmp_path / "dense"))
    assert not faults
    assert torch.equal(architectures.logits(theirs), architectures.logits(model))


def test_the_names_of_an_older_export_are_read_too(tmp_path: Path) -> None:
    floats = architectures.write("gpt_neox", tmp_path / "float")
    written = tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=32))
    out = exported(tmp_path / "q", "gptq", tmp_path / "out")
    tensors = tiny.stored(out)
    assert "embed_out.weight" in tensors
    assert "lm_head.weight" in NativeCheckpoint(tmp_path / "q").float_names()
    renamed = {("lm_head.weight" if key == "embed_out.weight" else key): each for key, each in tensors.items()}
    save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(read_back(out), tiny.logits(written.model))
    assert isinstance(written.model.get_output_embeddings(), nn.Linear)
