"""Exports of linears that round their inputs: the bytes on disk, what readers compute, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.native_checkpoints import Q_PROJ, exported, plain, read_back
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import ActivationGrid, QuantConfig
from qtool.config.sections import ExportConfig
from qtool.exporters import _base, compressed_tensors
from qtool.exporters._activations import INT8, round_inputs
from qtool.models.folders import read_config
from qtool.models.linears import packed_linears
from qtool.quant import activations
from qtool.quant.affine import dequantize
from qtool.quant.packed_linear import PackedLinear
from qtool.system.errors import InputError, RunError

A8 = {"num_bits": 8, "symmetric": True}
GRIDS: dict[str, dict[str, Any]] = {
    "w8a8": {"num_bits": 8, "group_size": -1, "activations": A8},
    "w8g32a8": {"num_bits": 8, "group_size": 32, "activations": A8},
    "w4a8": {"num_bits": 4, "group_size": 32, "activations": A8},
    "w3a8": {"num_bits": 3, "group_size": 32, "activations": A8},
    "w2a8": {"num_bits": 2, "group_size": 32, "activations": A8},
    "mixed": {
        "num_bits": 4,
        "group_size": 32,
        "activations": A8,
        "overrides": {
            "*.down_proj": {"num_bits": 8, "group_size": -1},
            "*.v_proj": {"num_bits": 8, "group_size": -1, "activations": None},
        },
    },
}
COARSE = (
    0.05  # largest difference of logits by rounding inputs on another grid of 8 bits, relative to the largest logit
)


class Case:
    """A tiny Llama on one of ``GRIDS``: its native checkpoint, its logits, and its export."""

    def __init__(self, grid: str, at: Path) -> None:
        self.folder = at / "native"
        model = tiny.quantize(tiny.llama(at / "float"), self.folder, QuantConfig.model_validate(GRIDS[grid])).model
        self.model, self.logits = model, tiny.logits(model)
        self.out = exported(self.folder, "compressed-tensors", at / "ct")


@pytest.fixture(params=GRIDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path)


@pytest.fixture
def w8a8(tmp_path: Path) -> Case:
    return Case("w8a8", tmp_path)


def grid_of_127_5(x: Tensor, num_bits: int) -> Tensor:
    """Round to 8 bits as compressed-tensors 0.20 does: a step of the largest value / 127.5, codes of -128 .. 127."""
    assert num_bits == 8
    step = x.detach().abs().amax(-1, keepdim=True) / 127.5
    step = torch.where(step > 0, step, 1.0)
    return torch.clamp(torch.round(x / step), -128, 127) * step


def largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def test_an_export_is_read_with_the_same_logits(case: Case) -> None:
    """So ``qtool eval`` rounds inputs of an export too: without that the logits differ."""
    assert torch.equal(read_back(case.out), case.logits)
    source, exporter = NativeCheckpoint(case.folder), _base.get("compressed-tensors")
    opened = exporter.open(case.out)
    assert exporter.rounds is not None
    for linear, spec in source.specs.items():
        assert torch.equal(exporter.read(opened, linear), dequantize(*source.quantized(linear))), linear
        assert exporter.rounds(opened, linear) == spec.activations
    for layer in packed_linears(case.model).values():
        layer.spec = layer.spec.weights_only
    assert largest_difference(tiny.logits(case.model), case.logits) > 1e-3


def test_transformers_reads_the_same_model_and_rounds_inputs_by_127_5(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its grid our logits are equal up to the order of sums; on ours, vLLM's, they differ by their rounding."""
    pytest.importorskip("compressed_tensors")
    theirs = tiny.logits(plain(case.out))
    assert 1e-4 < largest_difference(theirs, case.logits) < COARSE
    monkeypatch.setattr(activations, "round_symmetric", grid_of_127_5)
    assert largest_difference(theirs, tiny.logits(case.model)) < 1e-5


def test_w8a8_is_int_quantized_with_the_bytes_of_its_formula(w8a8: Case) -> None:
    tensors, source = tiny.stored(w8a8.out), NativeCheckpoint(w8a8.folder)
    for linear, (rows, columns) in source.shapes.items():
        parts = {key: each for key, each in tensors.items() if key.startswith(f"{linear}.")}
        assert parts.keys() == {f"{linear}.weight", f"{linear}.weight_scale"}
        weight, scale = parts[f"{linear}.weight"], parts[f"{linear}.weight_scale"]
        assert (weight.dtype, weight.shape) == (torch.int8, (rows, columns))
        assert (scale.dtype, scale.shape) == (torch.float16, (rows, 1))
        assert sum(each.nbytes for each in parts.values()) == rows * columns + 2 * rows
        assert torch.equal(weight.int() + 128, source.quantized(linear).codes.int())
    floats = sum(math.prod(each.shape) * 2 for key, each in tensors.items() if each.is_floating_point())
    sizes = [rows * columns for rows, columns in source.shapes.values()]
    assert sum(each.nbytes for each in tensors.values()) == sum(sizes) + floats
    section = read_config(w8a8.out)["quantization_config"]
    assert section["format"] == section["config_groups"]["group_0"]["format"] == "int-quantized"
    inputs = section["config_groups"]["group_0"]["input_activations"]
    assert inputs.items() >= {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}.items()
    card = (w8a8.out / "README.md").read_text()
    assert "127.5" in card
    assert "Turing to Hopper (not Blackwell)" in card


def test_several_layouts_are_named_by_group(tmp_path: Path) -> None:
    section = read_config(Case("mixed", tmp_path).out)["quantization_config"]
    assert section["format"] == "mixed-precision"
    groups = {
        (g["format"], g["weights"]["num_bits"]): g["input_activations"] for g in section["config_groups"].values()
    }
    assert {key: inputs is not None for key, inputs in groups.items()} == {
        ("pack-quantized", 4): True,
        ("pack-quantized", 8): False,
        ("int-quantized", 8): True,
    }


def test_a_damaged_export_is_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, w8a8: Case) -> None:
    original = compressed_tensors.EXPORTER

    def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
        notes = original.write(source, out, config)
        tensors = load_file(out / "model.safetensors")
        tensors[f"{Q_PROJ}.weight"][3, 7] ^= 1
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return notes

    monkeypatch.setattr(compressed_tensors, "EXPORTER", original._replace(write=write))
    with pytest.raises(RunError, match=r"q_proj differs after export by up to .*; the export was not kept"):
        exported(w8a8.folder, "compressed-tensors", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(compressed_tensors, "ARGUMENTS", None)
    with pytest.raises(RunError, match=r"q_proj rounds its input otherwise after export; the export was not kept"):
        exported(w8a8.folder, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_activations": {**A8, "type": "int", "strategy": "tensor", "dynamic": False}}, "rounds activations by"),
        ({"input_activations": {**A8, "type": "float", "strategy": "token", "dynamic": True}}, "rounds activations by"),
        ({"input_activations": {**A8, "symmetric": False, "type": "int", "strategy": "token", "dynamic": True}}, "by"),
        ({"input_activations": [8]}, "rounds activations by"),
        ({"output_activations": A8}, "it rounds outputs"),
        ({"format": "float-quantized"}, "in a format of compressed-tensors that qtool cannot read"),
    ],
)
def test_another_tools_rounding_is_refused_and_not_left_out(
    w8a8: Case, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = tiny.copied(w8a8.out, tmp_path / "theirs")
    config = read_config(out)
    config["quantization_config"]["config_groups"]["group_0"] |= changes
    write_json(out / "config.json", config)
    with pytest.raises(InputError, match=message):
        read_back(out)


def test_auto_round_folders_that_round_activations_are_refused(tmp_path: Path) -> None:
    tiny.quantize(tiny.llama(tmp_path / "float"), tmp_path / "native", QuantConfig(group_size=32))
    out = exported(tmp_path / "native", "auto-round", tmp_path / "ar")
    config = read_config(out)
    config["quantization_config"] |= {"act_bits": 8, "act_dynamic": True}
    write_json(out / "config.json", config)
    with pytest.raises(InputError, match=r"rounds activations to 8 bits, which qtool does not compute"):
        read_back(out)


def test_an_expanded_linear_rounds_like_the_packed_one() -> None:
    assert ActivationGrid(num_bits=8, symmetric=True) == INT8
    spec = QuantConfig(num_bits=8, group_size=-1, activations=INT8).spec_for(Q_PROJ)
    assert spec is not None
    packed = PackedLinear(16, 8, spec)
    packed.weight_packed.random_(generator=torch.Generator().manual_seed(0))
    packed.weight_scale.fill_(0.01)
    dense = nn.Linear(16, 8, bias=False)
    dense.weight.data = packed.dequantized()
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(dense(x), packed(x))
    round_inputs(dense, INT8)
    assert torch.equal(dense(x), packed(x))
