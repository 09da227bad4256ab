"""Reading the manifest of a checkpoint, one that is missing or damaged included."""

from pathlib import Path

import pytest
from helpers import tiny
from helpers.records import locked

from qtool.config.quant import QuantConfig
from qtool.pipelines.manifest import Manifest, read_manifest
from qtool.system.errors import InputError


def test_a_folder_without_manifest_has_an_empty_one_and_a_damaged_one_is_refused(
    llama_folder: Path, tmp_path: Path
) -> None:
    tiny.quantize(llama_folder, tmp_path / "out", QuantConfig(group_size=32))
    assert read_manifest(tmp_path / "out") is None
    folder = tiny.copied(tmp_path / "out", tmp_path / "damaged")
    (folder / "qtool.json").write_text('{"recipe": ')
    with pytest.raises(InputError, match=r"qtool\.json"):
        read_manifest(folder)


def test_a_manifest_on_disk_has_no_secrets(tmp_path: Path) -> None:
    address = "https://alice:s3cretpw@host/m"
    manifest = Manifest(
        format_version=1,
        recipe={"model": {"path": address}},
        seed=0,
        data=None,
        label="w4",
        bits_per_weight=4.0,
        float_bytes=2,
        quantized_bytes=1,
        series=(),
        weight_errors={},
        seconds={},
        versions={},
        date="",
        command=f"qtool ptq {address}",
        lock=locked(model={"path": address}),
        files={},
    )
    manifest.write(tmp_path)
    text = (tmp_path / "qtool.json").read_text(encoding="utf-8")
    assert "s3cretpw" not in text
    assert text.count("https://***@host/m") == 3
