"""``qtool reproduce`` makes the same bytes again, or names the first difference."""

import json
from pathlib import Path

import pytest
from helpers.stopped_runs import make, quantize

from qtool.cli import main
from qtool.config.target import TargetConfig
from qtool.pipelines import reproduce
from qtool.system.errors import InputError, RunError


def test_reproduce_makes_the_same_bytes(written: Path) -> None:
    assert reproduce.reproduce(written) == []
    assert [path.name for path in written.parent.iterdir() if path.is_dir()] == ["out"]


def test_reproduce_makes_no_export_for_a_target(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make(folder, tmp_path / "out").model_copy(update={"target": TargetConfig(engine="mlx")})
    quantize(recipe)
    assert (tmp_path / "out-mlx").is_dir()
    capsys.readouterr()
    assert main.main(["reproduce", str(tmp_path / "out")]) == 0
    assert "an export to" not in capsys.readouterr().err


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
