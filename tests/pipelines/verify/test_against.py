"""``qtool verify`` of exports: weights that other software re-reads, and what is recorded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor

from qtool.cli import main
from qtool.pipelines import verified
from qtool.pipelines.export_manifest import EXPORT_MANIFEST, VERIFIED, files_of, read_export_manifest
from qtool.pipelines.verify import verify, verify_export
from qtool.system.errors import InputError, RunError

LINEAR = "model.layers.1.mlp.gate_proj"


def listed_again(out: Path) -> None:
    """Write the hashes of the files as they are now into the manifest: only their content can show a fault."""
    manifest = read_export_manifest(out)
    assert manifest is not None
    again = manifest.model_copy(update={"files": files_of(out)})
    (out / EXPORT_MANIFEST).write_text(json.dumps(again.model_dump(mode="json")))


def changed(out: Path, change: Callable[[Tensor], Tensor], *parts: str) -> Path:
    tiny.change(out, **{f"{LINEAR}.{part}": change(tiny.stored(out)[f"{LINEAR}.{part}"]) for part in parts})
    listed_again(out)
    return out


def one_code(words: Tensor) -> Tensor:
    words[0, 0] ^= 1
    return words


def one_scale(scales: Tensor) -> Tensor:
    scales[0, 0] *= 1.5
    return scales


# weights


@pytest.mark.parametrize(
    ("name", "reader"), [("compressed-tensors", "compressed-tensors"), ("gguf", "gguf"), ("dense", "qtool")]
)
def test_weights_are_equal_as_the_formats_reader_unpacks_them(name: str, reader: str, made: Path) -> None:
    check = verify_export(made / name, against=made / "q").against
    assert check is not None
    assert check.ok
    assert (check.reader, check.by_qtool) == (reader, 0)
    assert check.versions[reader]
    assert check.weights == 14
    assert check.numbers == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)


@pytest.mark.parametrize("name", ["gptq", "mlx"])
def test_without_the_reader_qtool_reads_itself_and_says_so(name: str, made: Path) -> None:
    check = verify_export(made / name, against=made / "q").against
    assert check is not None
    if check.missing:  # else it is installed
        assert check.ok
        assert check.reader == "qtool"
        assert "is not installed: pip install" in check.missing


BROKEN: dict[str, dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...], int]]] = {
    "compressed-tensors": {
        "a code": (one_code, ("weight_packed",), 1),
        "a scale": (one_scale, ("weight_scale",), 31),  # some code is the zero point
        "rows": (lambda each: each.flip(0).contiguous(), ("weight_packed", "weight_scale"), 5000),
    },
    "gptq": {
        "a code": (one_code, ("qweight",), 1),
        "a scale": (one_scale, ("scales",), 31),
        "rows": (lambda each: each.flip(1).contiguous(), ("qweight", "scales"), 5000),
    },
    "mlx": {
        "a code": (one_code, ("weight",), 1),
        "a scale": (one_scale, ("scales",), 31),
        "rows": (lambda each: each.flip(0).contiguous(), ("weight", "scales", "biases"), 5000),
    },
}


@pytest.mark.parametrize("fault", ["a code", "a scale", "rows"])
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_changed_in_an_export_is_found_and_named(
    name: str, fault: str, made: Path, export: Callable[[str], Path]
) -> None:
    change, parts, least = BROKEN[name][fault]
    view = torch.int32 if name == "mlx" else None  # torch has no exclusive or of uint32

    def viewed(tensor: Tensor) -> Tensor:
        seen = tensor.view(view) if view is not None and tensor.dtype == torch.uint32 else tensor
        return change(seen.clone()).view(tensor.dtype)

    out = changed(export(name), viewed, *parts)
    verify(out)  # the hashes are those of the files
    check = verify_export(out, against=made / "q").against
    assert check is not None
    assert not check.ok
    (difference,) = check.differing
    assert difference.name == LINEAR
    assert difference.numbers >= (1 if fault == "a code" else least // 2)
    assert fault != "a code" or difference.numbers == 1
    assert difference.largest > 0


def test_a_changed_byte_of_a_gguf_file_is_found(made: Path, export: Callable[[str], Path]) -> None:
    import gguf

    out = export("gguf")
    found = next(t for t in gguf.GGUFReader(out / "model.gguf").tensors if t.name == "blk.1.ffn_gate.weight")
    content = bytearray((out / "model.gguf").read_bytes())
    content[found.data_offset + 2] ^= 1  # after the scale of the first block
    (out / "model.gguf").write_bytes(content)
    listed_again(out)
    check = verify_export(out, against=made / "q").against
    assert check is not None
    assert [(each.name, each.numbers) for each in check.differing] == [(LINEAR, 1)]


def test_a_changed_norm_is_found_too(made: Path, export: Callable[[str], Path]) -> None:
    out, norm = export("compressed-tensors"), "model.layers.0.input_layernorm.weight"
    tiny.change(out, **{norm: tiny.stored(out)[norm] * 2})
    listed_again(out)
    check = verify_export(out, against=made / "q").against
    assert check is not None
    assert check.other_fault == f"{norm} differs"
    assert not check.ok


def test_a_float_model_must_resemble_the_weights(made: Path, export: Callable[[str], Path], tmp_path: Path) -> None:
    check = verify_export(made / "compressed-tensors", against=made / "float").against
    assert check is not None
    assert check.ok
    assert check.kind == "float model"
    assert check.least_cosine is not None
    assert check.least_cosine > 0.98
    out = changed(export("compressed-tensors"), BROKEN["compressed-tensors"]["rows"][0], "weight_packed")
    check = verify_export(out, against=made / "float").against
    assert check is not None
    assert [each.name for each in check.differing] == [LINEAR]
    tiny.opt(tmp_path / "other")
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.0"):
        verify_export(made / "compressed-tensors", against=tmp_path / "other")


# what is recorded


def test_a_record_of_other_files_is_not_believed(export: Callable[[str], Path], made: Path) -> None:
    out = export("compressed-tensors")
    verify_export(out, against=made / "q")
    assert verify_export(out).against is not None
    changed(out, one_code, "weight_packed")
    assert verify_export(out).against is None
    (out / VERIFIED).write_text("{}")
    assert verified.read(out) == verified.VerifiedRecord(manifest=verified.read(out).manifest)


def test_files_that_were_changed_are_found_before_anything_else(export: Callable[[str], Path], made: Path) -> None:
    out = export("dense")
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    with pytest.raises(RunError, match=r"config\.json was changed"):
        verify_export(out, against=made / "q")


def test_an_edited_card_keeps_what_was_edited_and_a_removed_one_stays_away(
    export: Callable[[str], Path], made: Path
) -> None:
    out = export("compressed-tensors")
    card = out / "README.md"
    card.write_text("# Mine\n\nOwn words.\n")
    verify_export(out, against=made / "q")
    first = card.read_text()
    assert first.startswith("# Mine\n\nOwn words.\n\n<!-- qtool verify: begin -->")
    assert "equal bit for bit" in first
    verify_export(out, against=made / "q")
    assert card.read_text() == first
    card.unlink()
    verify_export(out, against=made / "q")
    assert not card.exists()


def test_without_options_it_says_which_software_reads_the_export(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["verify", str(made / "mlx"), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["linears"] == 14
    rows = {row["name"]: row for row in found["software"]}
    assert list(rows) == ["mlx"] * (len(rows) == 1) or {"mlx"} <= set(rows)
    assert all(row["version"] or "pip install" in row["install"] for row in found["software"])
    assert main.main(["verify", str(made / "compressed-tensors")]) == 0
    said = capsys.readouterr().out
    assert "compressed-tensors | --against" in said
    assert "| vllm | --engine vllm | not installed | pip install vllm, or set QTOOL_VLLM_PYTHON |" in said
