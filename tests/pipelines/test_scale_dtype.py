"""``quant.scale_dtype: auto`` follows the model, unless an export or the target holds float16 scales only."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.recipe import Recipe
from qtool.pipelines import scale_dtype
from qtool.pipelines.quantize import quantize


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16, with a tokenizer."""
    folder = tiny.llama(tmp_path_factory.mktemp("models") / "llama")
    floats: Any = tiny.load(folder).model
    floats.to(torch.bfloat16)
    with torch.no_grad():
        floats.get_input_embeddings().weight[0, 0] = 2.0**-40  # as trained models have: float16 holds no such value
    floats.save_pretrained(folder)
    return folder


def recipe(model: Path, tmp_path: Path, **sections: Any) -> Recipe:
    quant = {"num_bits": 4, "group_size": 32} | sections.pop("quant", {})
    base = {"model": {"path": str(model)}, "method": {"name": "rtn"}, "output": {"path": str(tmp_path / "out")}}
    return Recipe.model_validate(base | {"quant": quant} | sections)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "bfloat16"),
        ({"quant": {"scale_dtype": "float16"}}, "float16"),
        ({"quant": {"scale_dtype": "float32"}}, "float32"),
        ({"export": [{"format": "compressed-tensors", "path": "e"}]}, "bfloat16"),
        ({"export": [{"format": "mlx", "path": "e"}, {"format": "dense", "path": "f"}]}, "bfloat16"),
        ({"export": [{"format": "compressed-tensors", "path": "e"}, {"format": "gptq", "path": "f"}]}, "float16"),
        ({"target": "vllm"}, "bfloat16"),
        ({"target": "llama.cpp"}, "float16"),
    ],
)
def test_the_dtype_of_scales_fits_the_model_and_all_that_is_written(
    model: Path, tmp_path: Path, sections: dict[str, Any], expected: str
) -> None:
    chosen = scale_dtype.chosen(recipe(model, tmp_path, **sections))
    assert chosen.quant.scale_dtype == expected
    assert scale_dtype.chosen(chosen) is chosen


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_config_alone_says_it_too(model: Path, tmp_path: Path, dtype: str) -> None:
    folder = tmp_path / "config"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    chosen = scale_dtype.chosen(recipe(folder, tmp_path)).quant
    assert chosen.scale_dtype == ("bfloat16" if dtype == "bfloat16" else "float16")


def test_a_float32_model_keeps_float16_scales(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(model, folder)
    floats: Any = tiny.load(model).model
    floats.to(torch.float32).save_pretrained(folder)
    assert scale_dtype.chosen(recipe(folder, tmp_path)).quant.scale_dtype == "float16"


def test_an_export_to_compressed_tensors_is_no_larger_than_the_checkpoint_needs(model: Path, tmp_path: Path) -> None:
    sizes = {}
    for name in ("auto", "float16"):
        out, exported = tmp_path / name, tmp_path / f"{name}-ct"
        made = recipe(
            model,
            tmp_path,
            quant={
                "scale_dtype": name,
                "symmetric": False,
            },  # symmetric scales of rtn are eighths of weights, and so bfloat16
            output={"path": str(out)},
            export=[{"format": "compressed-tensors", "path": str(exported)}],
        )
        quantize(made)
        sizes[name] = (NativeCheckpoint(out).num_bytes(), sum(f.stat().st_size for f in exported.glob("*.safetensors")))
    assert NativeCheckpoint(tmp_path / "auto").specs["model.layers.0.mlp.up_proj"].scale_dtype == "bfloat16"
    assert abs(sizes["auto"][0] - sizes["float16"][0]) < 100  # names of dtypes in headers
    assert sizes["auto"][1] < 1.1 * sizes["auto"][0]
    assert sizes["float16"][1] > 1.2 * sizes["float16"][0]  # all tensors in float32, so that its scales are held
