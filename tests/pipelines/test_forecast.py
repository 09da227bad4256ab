"""``qtool plan`` without a budget: its sizes are those of the files, its laws of time and memory are exact on a law."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st

from qtool.checkpoints.files import folder_bytes
from qtool.cli import main
from qtool.config import recipe as recipes
from qtool.config.recipe import Recipe
from qtool.config.sections import ModelConfig
from qtool.exporters import _base
from qtool.exporters._folder import inexact
from qtool.methods import efficientqat, gsq
from qtool.pipelines import forecast, kept_forecast, probe, quantize
from qtool.pipelines.probe import Measured
from qtool.reports.forecast import Cost, Forecast
from qtool.system.errors import InputError
from qtool.training.block_training import split_windows, steps_of

FORMATS = ("compressed-tensors", "gptq", "auto-round", "mlx", "gguf")


def written(tmp_path: Path, **sections: Any) -> str:
    """A recipe of the built-in model."""
    raw = {
        "model": {"path": "builtin:wiki-llama-3m", "device": "cpu"},
        "method": {"name": "rtn"},
        "quant": {"num_bits": 4, "group_size": 64},
        "output": {"path": str(tmp_path / "out")},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw | sections))
    return str(file)


def planned(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """The exit code of ``qtool plan`` and its JSON."""
    code = main.main(["plan", *arguments, "-q", "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("quant", "formats"),
    [
        # positive scales need float32 in compressed-tensors, as is planned; an eighth of a weight does not
        ({"num_bits": 4, "group_size": 64, "negative_scales": False}, FORMATS),
        (
            {"num_bits": 2, "group_size": 64, "embedding": {"num_bits": 4, "group_size": 64}},
            ("compressed-tensors", "mlx", "gguf"),
        ),
        ({"grid": "q4_k"}, ("gguf",)),
    ],
)
def test_the_planned_sizes_are_those_of_the_files(
    tmp_path: Path, quant: dict[str, Any], formats: tuple[str, ...]
) -> None:
    exports = [{"format": name, "path": str(tmp_path / name)} for name in formats]
    recipe = recipes.load(written(tmp_path, quant=quant, export=exports))
    found = forecast.of_recipe(recipe, probed=False)
    report = quantize.quantize(recipe)
    assert report is not None
    sizes = {each.name: each.num_bytes for each in found.sizes}
    assert sizes["checkpoint"] == pytest.approx(folder_bytes(tmp_path / "out"), rel=0.02)
    for name in formats:
        own = folder_bytes(tmp_path / name, _base.get(name).weight_files)
        # of a GGUF file a sixth is the vocabulary of the built-in model
        assert sizes[name] == pytest.approx(own, rel=0.2 if name == "gguf" else 0.03), name
    assert found.bits_per_weight == pytest.approx(report.report.bits_per_weight)
    assert found.file_bits_per_weight == pytest.approx(report.report.file_bits_per_weight, rel=0.02)
    assert found.label == report.report.label
    parts = sum(part.num_bytes for part in found.parts)
    assert parts == pytest.approx(sizes["checkpoint"], rel=0.02)
    assert sum(part.num_weights for part in found.parts) == found.num_weights


def test_the_target_decides_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path, quant={"num_bits": 3, "group_size": 64})
    assert planned(recipe, "--no-probe", capsys=capsys)[0] == 0
    code, found = planned(recipe, "--no-probe", "--target", "sglang", capsys=capsys)
    assert (code, found["usable"]) == (2, False)
    assert "quant.num_bits: 4 or 8" in found["refused"]
    loads = {(each["engine"], each["format"]): each["loads"] for each in found["engines"]}
    assert loads["vllm", "compressed-tensors"]
    assert not loads["sglang", "compressed-tensors"]
    code, found = planned(recipe, "--no-probe", "--target", "mlx", capsys=capsys)
    assert (code, [each["name"] for each in found["sizes"]]) == (0, ["checkpoint", "mlx"])
    assert main.main(["plan", recipe, "--target", "vlm", "-q"]) == 2
    assert "the nearest is vllm" in capsys.readouterr().err


def test_scales_of_bfloat16_are_loaded_where_float16_holds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path)
    _, found = planned(recipe, "--no-probe", capsys=capsys)
    rows = {(each["engine"], each["format"]): each for each in found["engines"]}
    assert (rows["llama.cpp", "gguf"]["loads"], rows["llama.cpp", "gguf"]["reasons"]) == (True, [])
    assert "bfloat16 exactly from 7.63e-6 to 65280" in rows["llama.cpp", "gguf"]["condition"]
    assert not rows["vllm", "compressed-tensors"]["condition"]
    quantize.quantize(recipes.load(recipe))
    assert main.main(["export", str(tmp_path / "out"), "--format", "gguf", "-o", str(tmp_path / "gguf"), "-q"]) == 0
    ends = torch.tensor([2.0**-17 * 127.5 / 128, 2.0**-17, 65280.0, 65536.0]).bfloat16()
    assert [bool(inexact([end], "float16")) for end in ends] == [True, False, False, True]


def test_text_that_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(tmp_path / "text.txt")
    recipe = written(tmp_path, method={"name": "gptq"}, data={"source": text})
    _, found = planned(recipe, "--no-probe", capsys=capsys)
    assert [each["there"] for each in found["data"]] == [False]
    assert text in found["data"][0]["said"]
    assert found["cost"] is None


def test_a_folder_without_a_tokenizer_is_planned_and_not_for_gguf(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "m", ignore=shutil.ignore_patterns("token*", "special*"))
    quant = {"num_bits": 4, "group_size": 32}
    recipe = written(tmp_path, model={"path": str(folder), "device": "cpu"}, quant=quant)
    code, found = planned(recipe, "--no-probe", capsys=capsys)
    assert code == 0
    reasons = {each["format"]: each["reasons"] for each in found["engines"]}
    assert any("its tokenizer cannot be loaded" in reason for reason in reasons["gguf"])
    assert any(each["loads"] for each in found["engines"] if each["format"] == "compressed-tensors")


def test_a_model_is_planned_from_its_config_alone(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    shutil.copy(llama_folder / "config.json", tmp_path / "m")
    code, found = planned(str(tmp_path / "m"), "--memory", "110kB", "--context", "32", capsys=capsys)
    assert code == 0
    assert found["num_weights"] == sum(p.numel() for p in tiny.load(llama_folder).model.parameters())
    assert found["cache_bytes"] == 2 * 2 * 2 * 16 * 32 * 2  # keys and values, blocks, heads, channels, tokens, bytes
    for each in found["grids"]:
        assert each["fits"] == (each["num_bytes"] + found["cache_bytes"] <= 110_000)
        assert each["fits_with_tables"] == (each["with_tables"] + found["cache_bytes"] <= 110_000)
    assert {each["fits_with_tables"] for each in found["grids"]} == {True, False}
    assert "w4g128" not in {each["grid"] for each in found["grids"]}  # rows of 64 channels
    sizes = [each["num_bytes"] for each in found["grids"]]
    assert sizes == sorted(sizes, reverse=True)


def test_tables_of_8_bits_are_shown_where_the_target_loads_them(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = planned("builtin:wiki-llama-3m", "--target", "vllm", "--memory", "9MB", capsys=capsys)
    assert code == 0
    assert {(each["with_tables"], each["fits_with_tables"]) for each in found["grids"]} == {(None, None)}
    _, found = planned("builtin:wiki-llama-3m", "--target", "mlx", capsys=capsys)
    assert all(each["with_tables"] < each["num_bytes"] for each in found["grids"] if each["format"])
    assert main.main(["plan", "builtin:wiki-llama-3m", "--target", "vllm", "-q"]) == 0
    assert capsys.readouterr().out.count("not loaded") == len(found["grids"])


def test_the_size_of_a_grid_is_that_of_a_checkpoint(tmp_path: Path) -> None:
    found = {each.grid: each for each in forecast.of_model(ModelConfig(path="builtin:wiki-llama-3m")).grids}
    quantize.quantize(recipes.load(written(tmp_path)))
    assert found["w4g64"].num_bytes == pytest.approx(folder_bytes(tmp_path / "out"), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["builtin:wiki-llama-3m", "--memory", "much"], "'much' is no size; write for example 24GB"),
        (["builtin:wiki-llama-3m", "--set", "seed=1"], "is a model, and --set and --output are for recipes"),
        (["builtin:wiki"], "there is no model builtin:wiki"),
        (["quickstart", "-o", "plan.yaml"], "the recipe has no quant.budget"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["plan", *arguments, "-q"]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_is_read_at_80_columns(tmp_path: Path) -> None:
    from rich.console import Console

    found = forecast.of_recipe(recipes.load(written(tmp_path)), probed=False, memory=10**7, context=100)
    console = Console(width=80, record=True, file=(tmp_path / "shown.txt").open("w"))
    found.render(console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("mlp.down_proj x 4", "llama.cpp 0.3.36", "cache of 100 tokens", "fits"):
        assert words in text
    assert Forecast.model_validate(found.model_dump()) == found


def test_what_was_kept_is_shown_beside_what_was_measured(tmp_path: Path) -> None:
    recipe = recipes.load(written(tmp_path))
    found = forecast.of_recipe(recipe, probed=False)
    with pytest.raises(InputError, match="--keep needs the time and memory of a probe"):
        kept_forecast.keep(recipe, found)
    cost = Cost(seconds={"load": 1.0, "quantize": 61.0}, peak_bytes=5 * 10**8, disk_bytes=10**7, probe_seconds=3)
    kept_forecast.keep(recipe, found.model_copy(update={"cost": cost}))
    other = recipe.model_copy(update={"seed": 1})
    assert kept_forecast.kept(other) is None
    made = quantize.quantize(recipe)
    assert made is not None
    report = made.report
    assert report.planned is not None
    row = dict(report.facts())["planned (and measured)"]
    size, peak, time = row.split(", ")
    assert size.startswith("3.37 MB on disk (3.3")
    assert peak.startswith("500 MB (")
    assert time.startswith("1:02 (")


costs = st.floats(0.01, 10)


def law(sizes: list[int], values: tuple[float, ...], blocks: int, windows: int, steps: int) -> Measured:
    """Seconds that follow the law exactly, and memory that does not matter."""
    c, a, b, d, e = values
    weights = sum(sizes[:blocks])
    return Measured({"quantize": c + weights * (a + b * windows) + steps * (d + e * weights)}, 0)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.tuples(costs, costs, costs, costs, costs))
def test_time_that_follows_the_law_is_predicted_exactly(
    sizes: list[int], values: tuple[float, float, float, float, float]
) -> None:
    recipe = Recipe.model_validate(
        {
            "model": {"path": "x"},
            "method": {"name": "lsq", "steps": 100, "validation_samples": 0},
            "output": {"path": "y"},
        }
    )
    sizes[0] = sizes[1]  # the first two blocks are probed as if they were alike
    one, two, wide, wider = (law(sizes, values, *point) for point in ((1, 4, 2), (2, 4, 2), (1, 16, 2), (2, 16, 2)))
    long = law(sizes, values, 1, 4, 8), law(sizes, values, 2, 4, 8)
    took = probe._time(one, two, wide, wider, sizes, (64 - 4) / (16 - 4))
    took += probe._trained(recipe, one, two, long, sizes, (2, 8))
    assert took == pytest.approx(law(sizes, values, len(sizes), 64, 100).seconds["quantize"])


@given(
    st.sampled_from(["light", "default", "best"]), st.integers(1, 600), st.integers(1, 9), st.sampled_from([None, 0.0])
)
def test_the_probe_of_a_block_makes_the_passes_of_the_whole_run(
    preset: str, num: int, size: int, epochs: float | None
) -> None:
    given_keys = {"batch_size": size} | ({} if epochs is None else {"epochs": epochs})
    config = efficientqat.Config.model_validate({"preset": preset, **given_keys, "gsq": {"epochs": 1, **given_keys}})
    alone = gsq.Config.model_validate({"preset": preset, **given_keys})
    shorter, shorter_alone = probe._shorter(config, 2, num), probe._shorter(alone, 2, num)
    assert isinstance(shorter, efficientqat.Config)
    assert isinstance(shorter_alone, gsq.Config)
    trained = len(split_windows(num, config.validation_samples)[0])
    for whole, short in ((config, shorter), (config.gsq, shorter.gsq), (alone, shorter_alone)):
        assert short.min_steps == 0
        assert round(short.epochs * trained / size) == steps_of(whole, trained)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "signround", "gsq", "efficientqat", "lsq"])
def test_a_probe_of_a_run_says_its_phases(method: str, tmp_path: Path) -> None:
    text = str(tiny.text(tmp_path))
    data = {"source": text, "num_samples": 8, "seq_len": 32}
    recipe = recipes.load(written(tmp_path, method={"name": method}, data=data))
    seconds, peak, _ = probe.probe(recipe)
    assert list(seconds) == ["load", "data", "quantize", "save"]
    assert all(value >= 0 for value in seconds.values())
    assert peak > 10**8
    with pytest.raises(InputError, match="missing"):
        probe.probe(recipes.load(written(tmp_path, method={"name": method}, data={"source": text + "/missing.txt"})))
