"""``auto-round``: GPTQ's tensors, a grid for each linear, and zero points without GPTQ's offset if asymmetric."""

from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.native_checkpoints import FLOAT32_SCALES, GRIDS, Natives, exported, read_back
from helpers.packed import WEIGHTS, Weight

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig
from qtool.exporters import gptq
from qtool.models.folders import read_config
from qtool.system.errors import InputError


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


@pytest.mark.parametrize("grid", GRIDS)
def test_its_tensors_are_those_of_gptq_without_an_order(grid: str, native: Natives) -> None:
    theirs = tiny.stored(native.export("gptq", grid))
    wanted = {name: tensor for name, tensor in theirs.items() if not name.endswith(".g_idx")}
    found = tiny.stored(native.export("auto-round", grid))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        ("w4g32", "auto_round:auto_gptq"),
        ("mixed", "auto_round:auto_gptq"),
        ("w4g32-asym", "auto_round:gptqmodel"),
        ("mixed-asym", "auto_round:gptqmodel"),
    ],
)
def test_zero_points_are_stored_as_they_are_as_soon_as_one_is_not_the_middle(
    grid: str, kind: str, native: Natives
) -> None:
    out = native.export("auto-round", grid)
    section = read_config(out)["quantization_config"]
    assert section["packing_format"] == kind
    assert section["sym"] == ("asym" not in grid)
    assert f"written as {kind}" in (out / "README.md").read_text()


def test_one_asymmetric_linear_changes_the_zero_points_of_all(native: Natives, tmp_path: Path) -> None:
    quant = {"num_bits": 4, "group_size": 32, "overrides": {"*.k_proj": {"symmetric": False}}}
    written = tiny.quantize(native.floats(), tmp_path / "q", QuantConfig.model_validate(quant))
    out = exported(tmp_path / "q", "auto-round", tmp_path / "out")
    zeros = tiny.stored(out)["model.layers.0.self_attn.q_proj.qzeros"]
    assert int(zeros[0, 0]) & 0xFFFFFFFF == 0x88888888
    section = read_config(out)["quantization_config"]
    grid = {"bits": 4, "group_size": 32, "sym": False}
    assert section["extra_config"] == {"model.layers.0.self_attn.k_proj": grid}
    assert torch.equal(read_back(out), tiny.logits(written.model))


def test_each_linear_that_differs_is_named_with_its_whole_grid(native: Natives) -> None:
    section = read_config(native.export("auto-round", "mixed"))["quantization_config"]
    assert (section["bits"], section["group_size"], section["sym"]) == (4, 32, True)
    assert section["block_name_to_quantize"] == "model.layers"
    specs = NativeCheckpoint(native("mixed")).specs
    extra = section["extra_config"]
    for name, spec in specs.items():
        grid = {"bits": spec.num_bits, "group_size": spec.group_size, "sym": spec.symmetric}
        assert extra.get(name, {"bits": 4, "group_size": 32, "sym": True}) == grid
    assert extra["model.layers.0.self_attn.v_proj"] == {"bits": 2, "group_size": -1, "sym": True}
    assert len(extra) == 5
    section = read_config(native.export("auto-round", "skipped"))["quantization_config"]
    assert section["extra_config"] == {"model.layers.1.mlp.up_proj": {"bits": 16}}


def test_it_refuses_shapes_and_scales_that_its_layout_cannot_hold(native: Natives, tmp_path: Path) -> None:
    tiny.quantize(tiny.llama(tmp_path / "float", intermediate=80), tmp_path / "q", QuantConfig(group_size=16))
    with pytest.raises(
        InputError, match=r"mlp\.\w+_proj is (80 x 64|64 x 80), and auto-round readers need multiples of"
    ):
        exported(tmp_path / "q", "auto-round", tmp_path / "out")
    tiny.quantize(native.floats(), tmp_path / "q32", QuantConfig.model_validate(FLOAT32_SCALES))
    with pytest.raises(
        InputError, match=r"weight_scale has values that float16 does not hold; quantize with scale_dtype"
    ):
        exported(tmp_path / "q32", "auto-round", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@WEIGHTS
def test_the_layout_gives_the_same_weight_back(weight: Weight) -> None:
    for version in (1, 2) if weight.quantized.spec.symmetric else (2,):
        parts = gptq.packed(weight.quantized, version)
        assert torch.equal(gptq.unpacked(parts, weight.quantized.spec.num_bits, 2 - version), weight.dense)
