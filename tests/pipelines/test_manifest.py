"""Reading the manifest of a checkpoint, one that is missing or damaged included."""

from pathlib import Path

import pytest
from helpers import tiny

from qtool.config.quant import QuantConfig
from qtool.pipelines.manifest import read_manifest
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
