"""``mlx``: codes in our packing, float32 scales and biases whose products are exact, and MLX's group sizes."""

from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.native_checkpoints import FLOAT32_SCALES, GRIDS, Natives, exported, read_back
from helpers.packed import WEIGHTS, Weight
from hypothesis import given
from hypothesis import strategies as st

from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import BITS, QuantConfig, QuantSpec
from qtool.exporters import mlx
from qtool.models.folders import read_config
from qtool.system.errors import InputError


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


@WEIGHTS
def test_the_layout_gives_the_same_weight_back_in_float32(weight: Weight) -> None:
    parts = mlx.packed(weight.quantized)
    assert {name: tensor.dtype for name, tensor in parts.items()} == {
        "weight": torch.uint32,
        "scales": torch.float32,
        "biases": torch.float32,
    }
    assert weight.dense.shape[1] // parts["scales"].shape[1] in (32, 64, 128)
    assert torch.equal(mlx.unpacked(parts, weight.quantized.spec.num_bits), weight.dense)


def test_half_precision_would_change_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = (torch.rand(64, 2, generator=generator) + 0.5).half().float()
    bias = -scale * 11
    assert float(((bias.half().float() - bias) / bias).abs().max()) > 1e-4


@given(bits=st.sampled_from(BITS), scale=st.floats(2.0**-100, 2.0**110, width=32), cut=st.integers(0, 23))
def test_scales_are_refused_exactly_when_a_product_is_rounded(bits: int, scale: float, cut: int) -> None:
    found = torch.tensor([scale]).view(torch.int32) & -(1 << cut)
    value = found.view(torch.float32)
    codes = torch.arange(2**bits)
    exact = torch.equal((value * codes).double(), value.double() * codes)
    assert mlx.exact(value, QuantSpec(num_bits=bits)) == exact


def test_scales_that_engines_take_for_zero_or_that_overflow_are_refused() -> None:
    spec = QuantSpec(num_bits=8)
    assert not mlx.exact(torch.tensor([1e-40]), spec)
    assert not mlx.exact(torch.tensor([2.0**127]), spec)


@pytest.mark.parametrize("grid", GRIDS)
def test_its_codes_are_ours_and_its_biases_what_the_zero_points_come_to(grid: str, native: Natives) -> None:
    source, theirs = NativeCheckpoint(native(grid)), tiny.stored(native.export("mlx", grid))
    for name in source.specs:
        _, scale, zero_point, _ = source.quantized(name)
        repeat = theirs[f"{name}.scales"].shape[1] // scale.shape[1]
        assert torch.equal(theirs[f"{name}.weight"].view(torch.int32), source.tensor(f"{name}.weight_packed"))
        assert torch.equal(theirs[f"{name}.scales"], scale.repeat_interleave(repeat, 1))
        assert torch.equal(theirs[f"{name}.biases"], (-scale * zero_point).repeat_interleave(repeat, 1))


def test_each_linear_that_differs_is_named_and_what_stays_float_is_false(native: Natives) -> None:
    section = read_config(native.export("mlx", "mixed"))["quantization"]
    assert (section["group_size"], section["bits"], section["mode"]) == (32, 4, "affine")
    assert section["model.layers.0.self_attn.v_proj"] == {"group_size": 64, "bits": 2}  # 64 channels, one group per row
    assert section["model.layers.1.mlp.up_proj"] == {"group_size": 32, "bits": 3}
    assert "model.layers.0.mlp.up_proj" not in section
    assert section["lm_head"] is False
    assert read_config(native.export("mlx", "skipped"))["quantization"]["model.layers.1.mlp.up_proj"] is False


def test_it_says_what_the_float32_scales_cost_and_that_rows_were_split(native: Natives) -> None:
    card = (native.export("mlx", "w4pc-asym") / "README.md").read_text()
    assert "library_name: mlx" in card
    # a scale and a bias take 64 bits for each 64 channels, or for each 32 where a row has 96
    assert "5.20 bits per weight as written" in card
    assert "groups of w4pc asym are written as smaller ones with the same scale" in card
    assert "smaller" not in (native.export("mlx", "w4g32") / "README.md").read_text()


def test_it_refuses_groups_that_no_group_of_mlx_divides(tmp_path: Path) -> None:
    floats = tiny.llama(tmp_path / "float", intermediate=80)
    tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=16))
    with pytest.raises(
        InputError, match=r"q_proj has groups of 16 input channels, .* groups of 32, 64 and 128; quantize"
    ):
        exported(tmp_path / "q", "mlx", tmp_path / "out")
    tiny.quantize(floats, tmp_path / "rows", QuantConfig(group_size=-1))
    with pytest.raises(InputError, match=r"down_proj has groups of 80 input channels"):
        exported(tmp_path / "rows", "mlx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_refuses_float32_scales_and_takes_bfloat16_ones(native: Natives, tmp_path: Path) -> None:
    tiny.quantize(native.floats(), tmp_path / "q32", QuantConfig.model_validate(FLOAT32_SCALES))
    words = r"weight_scale times a code is not exact in float32, .*; quantize with scale_dtype: float16"
    with pytest.raises(InputError, match=words):
        exported(tmp_path / "q32", "mlx", tmp_path / "out")
    written = tiny.quantize(
        native.floats(), tmp_path / "q", QuantConfig(num_bits=8, scale_dtype="bfloat16", group_size=32)
    )
    assert torch.equal(read_back(exported(tmp_path / "q", "mlx", tmp_path / "out")), tiny.logits(written.model))


def test_a_folder_that_describes_its_grids_once_is_read_too(native: Natives, tmp_path: Path) -> None:
    for key in ("quantization", "quantization_config"):
        out = tiny.copied(native.export("mlx", "mixed"), tmp_path / key)
        config = read_config(out)
        del config[key]
        write_json(out / "config.json", config)
        assert torch.equal(read_back(out), native.logits[native("mixed")])
