"""``awq``: the order of nibbles, one group size for all linears, and what the layout has no place for."""

from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.native_checkpoints import FLOAT32_SCALES, Q_PROJ, Natives, exported, read_back
from helpers.packed import WEIGHTS, Weight

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig
from qtool.exporters import awq
from qtool.models.folders import read_config
from qtool.system.errors import InputError


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


@WEIGHTS
def test_the_layout_gives_the_same_weight_back(weight: Weight) -> None:
    if weight.quantized.spec.num_bits > 4 or weight.dense.shape[0] % 8:
        return
    columns, groups = weight.dense.shape[1], weight.quantized.scale.shape[1]
    exact = weight.quantized._replace(scale=weight.quantized.scale.half().float())
    parts = awq.packed(exact, columns // groups)
    assert parts["qweight"].shape == (columns, weight.dense.shape[0] // 8)
    assert parts["qzeros"].shape == (groups, weight.dense.shape[0] // 8)
    if torch.equal(exact.scale, weight.quantized.scale):
        assert torch.equal(awq.unpacked(parts), weight.dense)


@pytest.mark.parametrize("grid", ["w4g32", "w4g32-asym"])
def test_a_nibble_is_the_code_of_the_output_that_the_format_says(grid: str, native: Natives) -> None:
    source, stored = NativeCheckpoint(native(grid)), tiny.stored(native.export("awq", grid))
    codes, scale, zero_point, _ = source.quantized(Q_PROJ)
    for i, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        assert torch.equal((stored[f"{Q_PROJ}.qweight"] >> (4 * i)) & 15, codes.T[:, output::8].int())
        assert torch.equal((stored[f"{Q_PROJ}.qzeros"] >> (4 * i)) & 15, zero_point.T[:, output::8].int())
    assert torch.equal(stored[f"{Q_PROJ}.scales"].float(), scale.T)
    section = read_config(native.export("awq", grid))["quantization_config"]
    assert section["quant_method"] == "awq"
    assert (section["bits"], section["group_size"], section["zero_point"], section["version"]) == (4, 32, True, "gemm")


def test_float_linears_are_named(native: Natives) -> None:
    section = read_config(native.export("awq", "skipped"))["quantization_config"]
    assert sorted(section["modules_to_not_convert"]) == ["lm_head", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("quant", "group"),
    [
        ({"group_size": -1}, -1),
        ({"group_size": 256}, 128),
        ({"group_size": 128, "overrides": {"*.down_proj": {"group_size": 64}}}, 64),
        ({"group_size": 32, "overrides": {"*.down_proj": {"group_size": -1, "num_bits": 2}}}, 32),
        ({"num_bits": 3, "group_size": 64, "symmetric": False}, 64),
    ],
    ids=str,
)
def test_groups_of_several_sizes_are_written_as_one_that_divides_all(
    quant: dict[str, object], group: int, tmp_path: Path
) -> None:
    loaded = tiny.quantize(tiny.BUILTIN, tmp_path / "q", QuantConfig.model_validate(quant))
    out = exported(tmp_path / "q", "awq", tmp_path / "out")
    assert read_config(out)["quantization_config"]["group_size"] == group
    assert torch.equal(read_back(out), tiny.logits(loaded.model))


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        ({"num_bits": 8, "group_size": 32}, r"has 8 bits, and AWQ's gemm layout has 4; quantize with at most 4 bits"),
        ({"group_size": 8}, r"has groups of 8 input channels, and readers of AWQ take 16 to 128; quantize with"),
        ({"group_size": 32, "head": {"num_bits": 4}}, r"lm_head is quantized, .*quantize with quant\.head: float"),
        ({"group_size": 32, "embedding": {"num_bits": 4}}, r"embed_tokens is quantized, .*quant\.embedding: float"),
        (FLOAT32_SCALES, r"weight_scale has values that float16 does not hold"),
    ],
    ids=str,
)
def test_what_the_layout_has_no_place_for_is_refused(
    quant: dict[str, object], words: str, native: Natives, tmp_path: Path
) -> None:
    tiny.quantize(native.floats(), tmp_path / "q", QuantConfig.model_validate(quant))
    with pytest.raises(InputError, match=words):
        exported(tmp_path / "q", "awq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"bits": 8}], ids=str)
def test_another_layout_of_awq_is_not_read(change: dict[str, object], native: Natives, tmp_path: Path) -> None:
    from qtool.checkpoints.files import write_json

    out = tiny.copied(native.export("awq"), tmp_path / "out")
    config = read_config(out)
    config["quantization_config"] |= change
    write_json(out / "config.json", config)
    with pytest.raises(InputError, match="which qtool cannot read"):
        read_back(out)
