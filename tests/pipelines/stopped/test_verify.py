"""``qtool verify`` finds damage in the files of a finished run."""

import json
import os
from pathlib import Path

import pytest

from qtool.config.sections import ExportConfig
from qtool.pipelines import export as exporting
from qtool.pipelines import verify
from qtool.system.errors import InputError, RunError


def test_verify_accepts_what_was_written(written: Path) -> None:
    assert verify.verify(written).linears == 3 * 7


def test_verify_finds_a_changed_bit_a_missing_and_a_new_file(written: Path) -> None:
    first, second = sorted(written.glob("*.safetensors"))[:2]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.rename(written / "new.safetensors")
    with pytest.raises(RunError) as found:
        verify.verify(written)
    message = str(found.value)
    assert f"{first.name} was changed" in message
    assert f"{second.name} is missing" in message
    assert "new.safetensors is not in the manifest" in message


def test_verify_compares_the_manifest_with_the_tensors(written: Path) -> None:
    file = written / "qtool.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"bits_per_weight": 4.0}))
    with pytest.raises(RunError, match=r"the manifest says 4\.0"):
        verify.verify(written)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_verify_finds_a_change_in_what_a_reader_computes_with(name: str, written: Path) -> None:
    (written / name).write_bytes((written / name).read_bytes() + b"\n")
    with pytest.raises(RunError, match=f"{name} was changed after it was written"):
        verify.verify(written)


def test_verify_finds_a_tokenizer_that_was_added(written: Path) -> None:
    (written / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(RunError, match=r"tokenizer\.model is not in the manifest"):
        verify.verify(written)


def test_verify_is_silent_on_reports_and_cards(written: Path) -> None:
    for name in ("README.md", "report.json", "notes.txt"):
        (written / name).write_text("changed")
    verify.verify(written)


def test_a_manifest_of_an_earlier_version_still_verifies(written: Path) -> None:
    file = written / "qtool.json"
    manifest = json.loads(file.read_text())
    weights = {name: value for name, value in manifest["files"].items() if name.endswith(".safetensors")}
    assert len(weights) < len(manifest["files"])
    file.write_text(json.dumps(manifest | {"files": weights}))
    (written / "README.md").write_text("changed")
    assert verify.verify(written).files == len(weights)


def test_verify_reads_an_export_too(written: Path) -> None:
    out = exporting.export(written, ExportConfig(format="gptq", path=written.with_name("gptq")), overwrite=False)
    assert verify.verify(out)[1:] == (3 * 7, None, 0)
    (out / "README.md").write_text("a card may be edited")
    verify.verify(out)
    (out / "huge.bin").touch()
    os.truncate(out / "huge.bin", 2**40)  # is not read
    with pytest.raises(RunError, match=r"huge\.bin is not in the manifest"):
        verify.verify(out)
    (out / "huge.bin").unlink()
    (out / "config.json").write_text((out / "config.json").read_text().replace("silu", "gelu"))
    (out / "new.json").touch()
    (out / "tokenizer.json").unlink()
    with pytest.raises(RunError) as found:
        verify.verify(out)
    for fault in ("config.json was changed", "tokenizer.json is missing", "new.json is not in the manifest"):
        assert fault in str(found.value)


@pytest.mark.parametrize(
    ("key", "value"), [("files", ["x"]), ("source", {"../x": "0" * 64}), ("exported", None), ("format_version", "one")]
)
def test_a_damaged_manifest_of_an_export_is_an_input_error(key: str, value: object, written: Path) -> None:
    out = exporting.export(written, ExportConfig(format="dense", path=written.with_name("dense")), overwrite=False)
    manifest = json.loads((out / "qtool_export.json").read_text())
    (out / "qtool_export.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(InputError, match=rf"qtool_export\.json is damaged, .*{key}"):
        verify.verify(out)
    manifest["exported"]["format"] = "_folder"
    (out / "qtool_export.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="format '_folder' is none of"):
        verify.verify(out)
