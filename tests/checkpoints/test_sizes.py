"""Sizes of checkpoints: the bits per weight and the bytes on disk follow the formula."""

from pathlib import Path

import pytest
from helpers import tiny

from qtool.checkpoints import sizes
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import BITS, QuantConfig, QuantSpec

GRIDS = [(bits, symmetric, group) for bits in BITS for symmetric in (True, False) for group in (-1, 32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize(("bits", "symmetric", "group"), GRIDS)
def test_packed_tensors_on_disk_have_exactly_the_bits_per_weight_of_the_formula(
    bits: int, symmetric: bool, group: int, folder: Path, tmp_path: Path
) -> None:
    quant = QuantConfig(num_bits=bits, symmetric=symmetric, group_size=group)
    tiny.quantize(folder, tmp_path / "out", quant)
    source = NativeCheckpoint(tmp_path / "out")
    tensors = tiny.stored(tmp_path / "out")
    shapes = {name: tuple(tensors[f"{name}.weight_shape"].tolist()) for name in source.specs}
    payload = 0
    for name, (rows, columns) in shapes.items():
        parts = [f"{name}.{part}" for part in ("weight_packed", "weight_scale", "weight_zero_point")]
        size = sum(tensors[part].nbytes for part in parts if part in tensors)
        assert size * 8 == pytest.approx(quant.bits_per_weight(columns) * rows * columns, rel=1e-12), name
        payload += size
    weights = sum(rows * columns for rows, columns in shapes.values())
    assert payload * 8 == pytest.approx(sizes.bits_per_weight(source.specs, shapes) * weights, rel=1e-12)
    # the rest of the file is the float tensors, 17 bytes for each linear, and the header
    rest = sum(source.tensor(name).nbytes for name in source.float_names()) + 17 * len(shapes)
    file = tmp_path / "out" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == source.num_bytes() == header + payload + rest


def test_three_bits_take_three_eighths_of_a_byte() -> None:
    assert QuantSpec(num_bits=3, group_size=128).bits_per_weight(4096) == 3 + 16 / 128
    assert QuantSpec(num_bits=3, group_size=128, symmetric=False).bits_per_weight(4096) == 3 + 19 / 128
    assert QuantSpec(num_bits=8, group_size=-1, scale_dtype="float32").bits_per_weight(64) == 8.5
