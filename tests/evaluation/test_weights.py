"""The error of each quantized weight: by its definition, of the saved weights, and unchanged after a kill."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from qtool.blocks.job import Job
from qtool.checkpoints.files import file_hashes
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.config.recipe import Recipe, check
from qtool.config.yaml_loader import parse
from qtool.evaluation import weights
from qtool.models.loaded import LoadedModel
from qtool.pipelines import quantize as pipeline
from qtool.pipelines import workspace
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight, dequantize, minmax_qparams, quantize, relative_error
from qtool.reports.report import Report

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"name": "rtn"},
    "gptq": {"name": "gptq"},
    "signround": {"name": "signround", "iterations": 4},
    "hqq": {"name": "hqq"},
    "lsq": {"name": "lsq", "steps": 2},
    "lrqat": {"name": "lrqat", "steps": 2},
    "efficientqat": {"name": "efficientqat", "min_steps": 2, "epochs": 0.1, "e2e": {"steps": 2}},
    "awq": {"name": "awq", "num_ratios": 3, "clip_steps": 2, "search_samples": 4},
    "smoothquant": {"name": "smoothquant"},
}
FOLDING = ("awq", "smoothquant")  # methods that scale weights before they round them


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("models")
    tiny.llama(at / "llama", blocks=3)
    tiny.gpt2(at / "gpt2")
    tiny.text(at)
    return at


def make(models: Path, output: Path, method: str, family: str = "llama", **quant: Any) -> Recipe:
    raw = {
        "model": {"path": str(models / family), "dtype": "float32"},
        "method": METHODS[method],
        "quant": {"num_bits": 3, "group_size": 32, "scale_dtype": "float16"} | quant,
        "data": {"source": str(models / "prose.txt"), "num_samples": 6, "seq_len": 24},
        "output": {"path": str(output)},
    }
    return Recipe.model_validate(raw)


def quantized(recipe: Recipe) -> Report:
    pipeline.quantize(recipe)
    return Report.model_validate_json((recipe.output.path / "report.json").read_text())


def errors(report: Report) -> dict[str, float | None]:
    return {linear.name: linear.weight_error for linear in report.linears}


@given(st.integers(1, 9), st.sampled_from([1, 40, 1 << 22]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_the_squared_distance_as_a_share_whatever_the_chunks(rows: int, chunk: int, dtype: torch.dtype) -> None:
    spec = QuantSpec(num_bits=3, group_size=16)
    weight = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)).to(dtype)
    grid = minmax_qparams(weight, spec)
    made = QuantizedWeight(quantize(weight, *grid, spec), *grid, spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "CHUNK_NUMBERS", chunk)
        found = relative_error(weight, made)
        of_view = relative_error(weight.T.contiguous().T, made)
    exact = weight.double()
    expected = (dequantize(*made).double() - exact).square().sum() / exact.square().sum()
    assert (found, of_view) == pytest.approx((float(expected),) * 2, rel=1e-5)


def test_a_weight_of_zeros_has_no_error_or_an_infinite_one() -> None:
    spec = QuantSpec(num_bits=4, group_size=-1)
    zeros, ones = torch.zeros(2, 8), torch.ones(2, 8)
    grid = minmax_qparams(zeros, spec)
    assert relative_error(zeros, QuantizedWeight(quantize(zeros, *grid, spec), *grid, spec)) == 0
    assert relative_error(zeros, QuantizedWeight(quantize(ones, *grid, spec), *grid, spec)) == math.inf


@pytest.mark.parametrize("method", [name for name in METHODS if name not in FOLDING])
def test_the_report_has_the_error_of_what_is_on_the_disk(models: Path, tmp_path: Path, method: str) -> None:
    recipe = make(models, tmp_path / "out", method)
    found = errors(quantized(recipe))
    floats, source = load_file(models / "llama" / "model.safetensors"), NativeCheckpoint(recipe.output.path)
    assert list(found) == list(source.specs)
    for name, error in found.items():
        assert error == pytest.approx(relative_error(floats[f"{name}.weight"], source.quantized(name)), rel=1e-6)
        assert error is not None
        assert 0 < error < 0.5
    assert json.loads((recipe.output.path / "qtool.json").read_text())["weight_errors"] == found


@pytest.mark.parametrize("method", FOLDING)
def test_scales_that_were_folded_are_part_of_the_weight_that_was_rounded(
    models: Path, tmp_path: Path, method: str
) -> None:
    recipe = make(models, tmp_path / "out", method)
    found = errors(quantized(recipe))
    floats, source = load_file(models / "llama" / "model.safetensors"), NativeCheckpoint(recipe.output.path)
    against_files = {name: relative_error(floats[f"{name}.weight"], source.quantized(name)) for name in found}
    folded = {name: error for name, error in found.items() if error != pytest.approx(against_files[name], rel=1e-3)}
    assert {name.rpartition(".")[2] for name in folded} >= {"q_proj", "up_proj"}
    assert all(error is not None and 0 < error < against_files[name] for name, error in folded.items())


def test_transposed_weights_and_linears_that_stay_float(models: Path, tmp_path: Path) -> None:
    skipped = {"overrides": {"*.0.mlp.c_fc": {"skip": True}, "*.mlp.c_proj": {"num_bits": 8}}}
    recipe = make(models, tmp_path / "out", "rtn", "gpt2", **skipped)
    report = quantized(recipe)
    source = NativeCheckpoint(recipe.output.path)
    by_name = {linear.name: linear for linear in report.linears}
    left = by_name.pop("transformer.h.0.mlp.c_fc")
    assert (left.num_bits, left.weight_error, left.shape) == (None, None, (256, 64))
    assert set(by_name) == set(source.specs)
    for name, linear in by_name.items():
        assert list(linear.shape) == source.tensor(f"{name}.weight_shape").tolist()
        assert linear.num_bits == (8 if "mlp.c_proj" in name else 3)
        assert linear.weight_error is not None
        assert (linear.weight_error < 1e-3) == (linear.num_bits == 8)


class Stopped(Exception):
    """Raised by a test to stop a run half-way."""


@pytest.mark.parametrize("method", ["gptq", "efficientqat"])
def test_a_run_that_was_stopped_has_the_same_errors_and_the_same_bytes(
    models: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(models, tmp_path / "whole", method)
    expected = quantized(whole)
    write = workspace.RunWorkspace.write

    def stopping(self: workspace.RunWorkspace, index: int, *rest: Any) -> None:
        write(self, index, *rest)
        if index == 1:
            raise Stopped

    recipe = make(models, tmp_path / "out", method)
    with monkeypatch.context() as patch:
        patch.setattr(workspace.RunWorkspace, "write", stopping)
        with pytest.raises(Stopped):
            quantized(recipe)
    found = quantized(recipe)
    assert errors(found) == errors(expected)
    assert found.series == expected.series
    assert file_hashes(recipe.output.path, "*.safetensors") == file_hashes(whole.output.path, "*.safetensors")


def test_a_whole_model_and_a_streamed_one_have_the_same_errors(models: Path, tmp_path: Path) -> None:
    from qtool.methods import gptq

    recipe = make(models, tmp_path / "out", "gptq")
    streamed = errors(quantized(recipe))
    loaded: LoadedModel = tiny.load(models / "llama")
    tokens = load_tokens(models, recipe, loaded)
    result = gptq.run(Job.select(loaded, recipe.quant, tokens), gptq.Config())
    assert result.weight_errors == pytest.approx(streamed, rel=1e-4)


def load_tokens(models: Path, recipe: Recipe, loaded: LoadedModel) -> torch.Tensor:
    from qtool.data.windows import calibration

    return calibration(recipe.data, loaded, 0).tokens


def test_every_linear_of_the_blocks_is_listed_packed_or_not(models: Path) -> None:
    loaded = tiny.load(models / "llama")
    before = weights.block_linears(loaded)
    assert len(before) == 3 * 7
    assert before["model.layers.2.mlp.up_proj"] == (96, 64)
    packed = tiny.packed(models / "llama", QuantConfig(group_size=32))
    assert weights.block_linears(packed) == before


def test_time_and_memory_are_there_for_each_phase(models: Path, tmp_path: Path) -> None:
    report = quantized(make(models, tmp_path / "out", "gptq"))
    assert list(report.seconds) == ["load", "data", "quantize", "save"]
    assert list(report.peak_bytes) == list(report.seconds)
    peaks = list(report.peak_bytes.values())
    assert peaks == sorted(peaks), "a peak so far never goes down"
    assert peaks[0] > 10 << 20


def test_linears_that_stay_float_have_their_size_and_the_report_its_recipe(models: Path, tmp_path: Path) -> None:
    recipe = make(models, tmp_path / "out", "rtn", overrides={"*.0.mlp.*": {"skip": True}})
    outcome = pipeline.quantize(recipe)
    assert outcome is not None
    report = outcome.report
    left = {each.name: each.float_bytes for each in report.linears if each.num_bits is None}
    stored = {
        name: tensor.nbytes
        for file in (tmp_path / "out").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    assert len(left) == 3
    assert left == {name: stored[f"{name}.weight"] for name in left}
    assert all(each.float_bytes is None for each in report.linears if each.num_bits is not None)
    assert report.command == "ptq"
    assert report.recipe is not None
    assert check(Recipe, parse(report.recipe), "the report") == recipe
