"""``qtool reproduce`` makes the same bytes again, or names the first difference."""

import json
from pathlib import Path

import pytest

from qtool.pipelines import reproduce
from qtool.system.errors import InputError, RunError


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
