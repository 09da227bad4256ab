"""``target:`` refuses what the engine does not load before a weight is read, and adds the export that it reads best."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import tiny

from qtool.cli import main
from qtool.config import recipe as recipes
from qtool.config.recipe import Recipe
from qtool.pipelines import plan as planning
from qtool.pipelines import quantize, target
from qtool.system.errors import InputError


@pytest.fixture(scope="module")
def no_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with all files but the weights: who reads one stops."""
    floats = tiny.llama(tmp_path_factory.mktemp("models") / "llama")
    folder = tmp_path_factory.mktemp("no weights") / "llama"
    shutil.copytree(floats, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


def make(folder: Path, tmp_path: Path, engine: str, **sections: Any) -> Recipe:
    raw = {
        "model": {"path": str(folder), "device": "cpu"},
        "method": {"name": "rtn"},
        "quant": {"num_bits": 4, "group_size": 32},
        "target": engine,
        "output": {"path": str(tmp_path / "out")},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw | sections))
    return recipes.load(file)


@pytest.mark.parametrize(
    ("engine", "quant", "message"),
    [
        ("sglang", {"num_bits": 3}, r"w3g32: give quant\.num_bits: 4 or 8"),
        ("llama.cpp", {"num_bits": 8, "symmetric": False}, r"w8g32 asym: give .* quant\.symmetric: true"),
        ("vllm", {"group_size": 16}, r"w4g16: give .*quant\.group_size: -1, 32, 64 or 128"),
        ("mlx", {"group_size": 16}, r"w4g16: give .*quant\.group_size: a multiple of 32"),
        ("vllm", {"embedding": {"num_bits": 8}}, r"no quantized embedding: give quant\.embedding: float"),
        ("vllm", {"grid": "q4_1"}, r"no grid q4_1: give quant\.grid: affine"),
        ("vllm", {"overrides": {"*.k_proj": {"num_bits": 8}}}, r"q_proj, k_proj and v_proj become one matrix"),
        ("sglang", {"overrides": {"*.up_proj": {"skip": True}}}, r"gate_proj and up_proj become one matrix"),
        ("mlx", {"activations": {"num_bits": 8, "symmetric": True}}, r"leave out quant\.activations"),
    ],
)
def test_grids_are_refused_before_a_weight_is_read_with_the_key_to_change(
    no_weights: Path, tmp_path: Path, engine: str, quant: dict[str, Any], message: str
) -> None:
    recipe = make(no_weights, tmp_path, engine, quant={"num_bits": 4, "group_size": 32} | quant)
    if "grid" in quant:
        recipe = make(no_weights, tmp_path, engine, quant=quant)
    with pytest.raises(InputError, match=message) as refused:
        quantize.quantize(recipe)
    assert f"{engine} loads:" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_without_a_target_the_missing_weights_are_found(no_weights: Path, tmp_path: Path) -> None:
    recipe = make(no_weights, tmp_path, "vllm").model_copy(update={"target": None})
    with pytest.raises(InputError, match="safetensors"):
        quantize.quantize(recipe)


@pytest.mark.parametrize(
    ("engine", "quant", "format"),
    [
        ("vllm", {}, "compressed-tensors"),
        ("vllm", {"num_bits": 2, "symmetric": False}, "compressed-tensors"),
        ("sglang", {"num_bits": 8}, "compressed-tensors"),
        ("llama.cpp", {"num_bits": 2}, "gguf"),
        ("mlx", {"num_bits": 3, "embedding": {"num_bits": 8}}, "mlx"),
        ("transformers", {"num_bits": 2}, "compressed-tensors"),
        ("transformers", {"symmetric": False}, "auto-round"),
    ],
)
def test_the_export_that_the_engine_reads_best_is_added(
    no_weights: Path, tmp_path: Path, engine: str, quant: dict[str, Any], format: str
) -> None:
    recipe = target.applied(make(no_weights, tmp_path, engine, quant={"num_bits": 4, "group_size": 32} | quant))
    assert [(each.format, each.path) for each in recipe.export] == [(format, tmp_path / f"out-{format}")]
    assert target.applied(recipe) == recipe


def test_what_only_native_checkpoints_hold_needs_no_export(no_weights: Path, tmp_path: Path) -> None:
    quant = {"num_bits": 4, "group_size": 32, "kv_cache": 8}
    assert target.applied(make(no_weights, tmp_path, "transformers", quant=quant)).export == ()


def test_exports_that_the_engine_does_not_load_are_refused_and_one_that_it_does_is_enough(
    no_weights: Path, tmp_path: Path
) -> None:
    exports = [{"format": name, "path": str(tmp_path / name)} for name in ("mlx", "dense", "gptq")]
    recipe = make(no_weights, tmp_path, "vllm", export=exports)
    assert target.applied(recipe) == recipe
    with pytest.raises(InputError, match=r"llama\.cpp reads none of mlx, dense, gptq; it reads gguf"):
        target.applied(make(no_weights, tmp_path, "llama.cpp", export=exports))


def test_a_budget_chooses_among_the_widths_that_the_engine_loads(no_weights: Path, tmp_path: Path) -> None:
    def chosen(**budget: Any) -> tuple[int, ...]:
        quant = {"group_size": 32, "budget": {"average_bits": 5, **budget}}
        found = target.applied(make(no_weights, tmp_path, "sglang", quant=quant)).quant.budget
        assert found is not None
        return found.choices

    assert chosen() == (4, 8)
    assert chosen(choices=[4]) == (4,)
    with pytest.raises(InputError, match=r"quant\.budget, 3 bits: target: sglang does not load"):
        chosen(choices=[3, 4])
    with pytest.raises(InputError, match=r"quant\.budget, 2 bits: target: sglang does not load"):
        chosen(pins={"*.o_proj": 2})


def test_a_plan_keeps_to_the_widths_of_the_target(llama_folder: Path, tmp_path: Path) -> None:
    text = str(tiny.text(tmp_path))
    recipe = make(
        llama_folder,
        tmp_path,
        "sglang",
        quant={"group_size": 32, "budget": {"average_bits": 6, "estimator": "variance"}},
        data={"source": text, "num_samples": 4, "seq_len": 32},
    )
    assert {each.num_bits for each in planning.plan(recipe).allotments} == {4, 8}


def test_a_run_writes_the_export_beside_the_checkpoint_and_goes_on_with_the_same_command(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(llama_folder, tmp_path, "mlx")
    for _ in range(2):
        assert main.main(["ptq", str(tmp_path / "recipe.yaml")]) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-mlx", "recipe.yaml"]
    assert "complete already" in capsys.readouterr().err


def test_another_version_is_said(no_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(no_weights, tmp_path, "vllm", target={"engine": "sglang", "version": "0.4"}, quant={"num_bits": 3})
    assert main.main(["ptq", str(tmp_path / "recipe.yaml")]) == 2
    assert (
        "sglang loads is known of version 0.5.23, and target.version is 0.4, which is older" in capsys.readouterr().err
    )


def test_model_free_needs_an_export_that_the_target_reads(no_weights: Path, tmp_path: Path) -> None:
    free = {"path": str(no_weights), "free": True}
    with pytest.raises(InputError, match="needs an export in the recipe; for example compressed-tensors"):
        target.applied(make(no_weights, tmp_path, "vllm", model=free))
    export = [{"format": "compressed-tensors", "path": str(tmp_path / "ct")}]
    recipe = make(no_weights, tmp_path, "vllm", model=free, export=export)
    assert target.applied(recipe) == recipe
    with pytest.raises(InputError, match=r"quant\.num_bits: 4 or 8"):
        target.applied(make(no_weights, tmp_path, "sglang", model=free, export=export, quant={"num_bits": 3}))
