"""Reading the manifest of a checkpoint, one that is missing or damaged included."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.records import locked

import qtool
from qtool.config.quant import QuantConfig
from qtool.pipelines.manifest import Manifest, read_manifest
from qtool.pipelines.reproduce import reproduce
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


@pytest.fixture(scope="module")
def written(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a whole run with its manifest; only read it."""
    out = tmp_path_factory.mktemp("run") / "q"
    sections = {"model": {"path": str(llama_folder)}, "method": {"name": "rtn"}, "quant": {"group_size": 32}}
    qtool.quantize({**sections, "output": {"path": out}})
    return out


def put(manifest: dict[str, Any], key: str, value: object) -> None:
    """Put ``value`` at a dotted key; ``...`` removes the key."""
    *before, last = key.split(".")
    for part in before:
        manifest = manifest[part]
    if value is ...:
        del manifest[last]
    else:
        manifest[last] = value


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("files", [1], "files"),
        ("files", {"../x": "0" * 64}, r"files\.\.\./x\.\[key\]: Value error, should be the name of a file, not a path"),
        ("files", {"..": "0" * 64}, "files"),
        ("files", {"a": "x"}, r"files\.a"),
        ("bits_per_weight", ..., "bits_per_weight: Field required"),
        ("bits_per_weight", -1, "bits_per_weight"),
        ("bits_per_weight", float("nan"), "bits_per_weight"),
        ("bits_per_weight", "4", "bits_per_weight"),
        ("float_bytes", -1, "float_bytes"),
        ("quantized_bytes", 10**30, "quantized_bytes"),
        ("lock", ..., "lock: Field required"),
        ("lock.threads", "x", r"lock\.threads"),
        ("seed", ..., "seed: Field required"),
        ("seed", True, "seed"),
        ("data", ..., "data: Field required"),
        ("data", {"tokens": [1], "sha256": "0" * 64}, r"data\.tokens"),
        ("series", None, "series"),
        ("series", [{"name": "x", "per": "block", "at": [0, 1], "values": [1.0]}], r"series\.0: .*at has 2 entries"),
        ("weight_errors", "x", "weight_errors"),
        ("seconds", {"load": -1}, r"seconds\.load"),
        ("recipe", [], "recipe"),
        ("recipe.model.path", 3, r"recipe\.model\.path"),
        ("recipe.data.seq_len", -3, r"recipe\.data\.seq_len"),
        ("recipe.method", ..., r"recipe\.method: Field required"),
        ("plan", {}, r"plan\.model"),
    ],
)
def test_a_wrong_value_is_refused_with_file_key_and_what_to_do(
    written: Path, tmp_path: Path, key: str, value: object, named: str
) -> None:
    manifest = json.loads((written / "qtool.json").read_text())
    put(manifest, key, value)
    (tmp_path / "qtool.json").write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match=rf"qtool\.json is damaged.* \({named}.*remove it to use the folder without it"
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("command", "qat", r"qtool\.json is damaged: command is qat, but method rtn runs as qtool ptq"),
        ("recipe.method.name", "x", r"method\.name: no such method; .*found \"x\""),
        ("recipe.quant.num_bits", 5, r"quant\.num_bits: "),
        ("recipe.output.path", "~nosuchuser/x", r"output\.path: this machine has no user"),
    ],
)
def test_a_recorded_recipe_is_checked_like_a_new_one(
    written: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    shutil.copytree(written, tmp_path / "q")
    manifest = json.loads((written / "qtool.json").read_text())
    put(manifest, key, value)
    (tmp_path / "q" / "qtool.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        reproduce(tmp_path / "q")


@pytest.mark.parametrize("key", ["recipe.model.path", "recipe.data.source"])
def test_a_path_of_another_machine_in_a_manifest_is_no_error(
    written: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    shutil.copytree(written, tmp_path / "q")
    manifest = json.loads((written / "qtool.json").read_text())
    manifest["data"] = {"tokens": [2, 16], "sha256": "0" * 64}
    put(manifest, key, "~nosuchuser/x")
    (tmp_path / "q" / "qtool.json").write_text(json.dumps(manifest))
    report = qtool.evaluate(tmp_path / "q", "generated", limit=1, context=8)
    assert report.results[0].value is not None


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
