"""What ``qtool verify`` and ``qtool reproduce`` find in a finished run."""

import json
from pathlib import Path

import pytest
from helpers.stopped_runs import make, quantize

from qtool.pipelines import reproduce, verify
from qtool.system.errors import InputError, RunError


@pytest.fixture
def written(folder: Path, tmp_path: Path) -> Path:
    quantize(make(folder, tmp_path / "out"))
    return tmp_path / "out"


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


def test_reproduce_makes_the_same_bytes(written: Path) -> None:
    assert reproduce.reproduce(written) == []
    assert [path.name for path in written.parent.iterdir() if path.is_dir()] == ["out"]


def test_reproduce_names_the_first_block_that_differs(written: Path) -> None:
    from safetensors.torch import load_file, save_file

    shard = sorted(written.glob("*.safetensors"))[2]  # the second block's
    tensors = load_file(shard)
    name = "model.layers.1.mlp.up_proj.weight_packed"
    tensors[name] = tensors[name] ^ 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"the first difference is in model\.layers\.1\.mlp\.up_proj\.weight_packed"):
        reproduce.reproduce(written)


def test_reproduce_refuses_another_model(written: Path, folder: Path) -> None:
    file = written / "qtool.json"
    manifest = json.loads(file.read_text())
    manifest["lock"]["model_files"]["config.json"] = "0" * 64
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was made from another model"):
        reproduce.reproduce(written)
