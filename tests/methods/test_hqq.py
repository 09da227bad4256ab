"""HQQ: its two steps in closed form, never worse than round-to-nearest, and zero points between codes on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.notes import Notes
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.blocks.job import Job
from qtool.checkpoints import native, output_folder
from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.quantization_config import section_of, specs_of
from qtool.config import catalog, recipe
from qtool.config.quant import BITS, QuantConfig, QuantSpec
from qtool.config.sections import ExportConfig
from qtool.exporters import _base
from qtool.methods import hqq, rtn
from qtool.methods.hqq import Grid, improve, objective, optimise, shrink
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.pipelines import export
from qtool.pipelines import quantize as pipeline
from qtool.quant.affine import dequantize, minmax_qparams, quantize, round_to_codes, to_grid
from qtool.quant.packed_linear import PackedLinear
from qtool.system import progress
from qtool.system.errors import InputError

FLOAT_ZERO = QuantConfig(num_bits=3, group_size=16, symmetric=False, float_zero=True)
specs = st.builds(
    lambda bits, group_size, kind, scale_dtype: QuantSpec(
        num_bits=bits,
        group_size=group_size,
        symmetric=kind == "symmetric",
        float_zero=kind == "float zero",
        scale_dtype=scale_dtype,
    ),
    st.sampled_from(BITS),
    st.sampled_from([-1, 8, 16]),
    st.sampled_from(["symmetric", "asymmetric", "float zero"]),
    st.sampled_from(["float32", "float16", "bfloat16"]),
)


def heavy_tailed(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        0.02 * torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).exp()
    )


def checkpoint_of(loaded: LoadedModel, path: Path) -> Path:
    with output_folder.atomic_folder(path, overwrite=False) as partial:
        native.save(partial, loaded, tiny.specs(loaded))
    return path


# ------------------------------------------------------------------------------------------------------ the algorithm


@given(specs, st.integers(0, 999))
def test_no_group_is_worse_than_round_to_nearest_under_the_norm(spec: QuantSpec, seed: int) -> None:
    weight, config = heavy_tailed(5, 48, seed), hqq.Config()
    found, _ = optimise(weight, spec, config)
    ours = objective(weight, Grid(found.scale, found.zero_point), spec, config.norm)
    assert bool((ours <= objective(weight, Grid(*minmax_qparams(weight, spec)), spec, config.norm)).all())


# with negative scales the min-max grid has the largest weight on its lowest level, so that less is left to gain
@pytest.mark.parametrize(
    ("kind", "most"), [("symmetric", 0.99), ("positive", 0.97), ("asymmetric", 0.97), ("float zero", 0.97)]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_better_than_round_to_nearest_where_there_is_something_to_gain(bits: int, kind: str, most: float) -> None:
    values = {"symmetric": kind in ("symmetric", "positive"), "float_zero": kind == "float zero"}
    values |= {"negative_scales": False} if kind == "positive" else {}
    spec = QuantSpec.model_validate({"num_bits": bits, "group_size": 32} | values)
    weight, config = heavy_tailed(64, 128, 0), hqq.Config()
    found, _ = optimise(weight, spec, config)
    ours = objective(weight, Grid(found.scale, found.zero_point), spec, config.norm).sum()
    assert float(ours) < most * float(objective(weight, Grid(*minmax_qparams(weight, spec)), spec, config.norm).sum())


@given(specs, st.integers(0, 99))
def test_no_iterations_are_round_to_nearest(spec: QuantSpec, seed: int) -> None:
    if not spec.symmetric and not spec.float_zero:  # a half-precision zero point made an integer is rounded twice
        spec = spec.model_copy(update={"scale_dtype": "float32"})
    weight = heavy_tailed(5, 48, seed)
    found, _ = optimise(weight, spec, hqq.Config(iterations=0))
    nearest = rtn.round_to_nearest(weight, spec, rtn.Config())
    assert all(torch.equal(a, b) for a, b in zip(found[:3], nearest[:3], strict=True))


def test_shrinkage_is_the_formula() -> None:
    error = torch.tensor([-0.5, -0.1, 0.0, 0.2, 0.4])
    expected = [-(0.5 - 0.5**-0.3 / 10), 0.0, 0.0, 0.2 - 0.2**-0.3 / 10, 0.4 - 0.4**-0.3 / 10]
    assert shrink(error, 0.7, 10).tolist() == pytest.approx(expected)
    assert torch.equal(shrink(error, 0.7, 1e9).sign(), error.sign())
    assert shrink(error, 0.7, 1e-3).count_nonzero() == 0


@pytest.mark.parametrize("beta", [1e-3, 5.0])
@pytest.mark.parametrize("kind", ["symmetric", "float zero"])
def test_the_second_step_is_least_squares(kind: str, beta: float) -> None:
    """``sum (w - u - (q - z) s)**2`` with codes and shrunk errors fixed grows whichever way the result is moved."""
    spec = QuantSpec(num_bits=3, group_size=16, symmetric=kind == "symmetric", float_zero=kind == "float zero")
    weight = heavy_tailed(5, 48, 1)
    grid = Grid(*minmax_qparams(weight, spec))
    on_grid = to_grid(weight, *grid, spec)
    codes = round_to_codes(on_grid, spec)
    rest = weight.view(5, 3, 16) - shrink(on_grid - codes, 0.7, beta) * grid.scale.unsqueeze(-1)

    def left(candidate: Grid) -> Tensor:
        rounded = (codes - candidate.zero_point.unsqueeze(-1)) * candidate.scale.unsqueeze(-1)
        return (rest - rounded).square().sum(-1)

    found = improve(weight, grid, spec, 0.7, beta)
    assert bool((left(found) < left(grid)).all())
    for step in (-1e-2, 1e-2):
        moved = (
            Grid(found.scale * (1 + step), found.zero_point)
            if spec.symmetric
            else Grid(found.scale, found.zero_point + step)
        )
        assert bool((left(found) < left(moved)).all())


def test_integer_zero_points_are_said_to_cost_what_they_cost(make_llama: Callable[[], LoadedModel]) -> None:
    notes = Notes()
    quant = FLOAT_ZERO.model_copy(update={"float_zero": False})
    with progress.use(notes):
        snapped = hqq.run(Job.select(make_llama(), quant), hqq.Config())
        free = hqq.run(Job.select(make_llama(), FLOAT_ZERO), hqq.Config())
    assert snapped.values("float_zero_error") == pytest.approx(free.values("weight_error"))
    assert {each.name for each in free.series} == {"weight_error"}
    change = 100 * (sum(snapped.values("weight_error")) / sum(free.values("weight_error")) - 1)
    assert change > 1
    assert len(notes.texts) == 1
    assert f"{change:+.1f} %" in notes.texts[0]
    assert "quant.float_zero" in notes.texts[0]


# ------------------------------------------------------------------------------------------ zero points between codes


@given(st.sampled_from(BITS), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 99))
def test_a_packed_layer_keeps_zero_points_between_codes(bits: int, scale_dtype: Any, seed: int) -> None:
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=False, float_zero=True, scale_dtype=scale_dtype)
    found, _ = optimise(heavy_tailed(6, 48, seed), spec, hqq.Config(iterations=3))
    layer = PackedLinear.from_quantized(found, None)
    layer.half()
    layer.check("layer")
    assert all(torch.equal(a, b) for a, b in zip(layer.quantized[:3], found[:3], strict=True))
    assert bool((found.zero_point != found.zero_point.round()).any())
    stored = sum(8 * x.numel() * x.element_size() for name, x in layer.named_buffers() if "weight_" in name)
    shape = 8 * layer.weight_shape.numel() * layer.weight_shape.element_size()
    padding = 6 * (-48 * bits % 32)
    assert stored - shape - padding == pytest.approx(spec.bits_per_weight(48) * 6 * 48)


def test_zero_points_between_codes_come_back_from_disk_bit_for_bit(llama: LoadedModel, tmp_path: Path) -> None:
    hqq.run(Job.select(llama, FLOAT_ZERO), hqq.Config())
    folder = checkpoint_of(llama, tmp_path / "packed")
    layers, source = packed_linears(llama.model), NativeCheckpoint(folder)
    for dtype in (torch.float32, torch.bfloat16):
        restored = packed_linears(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
        for name, layer in layers.items():
            for other in (restored[name].quantized, source.quantized(name)):
                assert all(torch.equal(a, b) for a, b in zip(other[:3], layer.quantized[:3], strict=True)), name
                assert other.spec == layer.spec
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(tiny.logits(loaded), tiny.logits(llama.model))


@pytest.mark.parametrize("name", catalog.export_formats())
def test_an_export_holds_them_or_is_refused_with_the_reason(
    name: str, make_llama: Callable[[], LoadedModel], tmp_path: Path
) -> None:
    llama = make_llama()
    hqq.run(Job.select(llama, FLOAT_ZERO), hqq.Config(iterations=2))
    folder = checkpoint_of(llama, tmp_path / "packed")
    config = ExportConfig(format=name, path=tmp_path / "out")
    if name != "dense":
        with pytest.raises(InputError, match=r"float_zero.* does not hold those exactly; export dense instead"):
            export.export(folder, config, False)
        return
    opened = _base.get("dense").open(export.export(folder, config, False))
    for linear, layer in packed_linears(llama.model).items():
        assert torch.equal(_base.get("dense").read(opened, linear), layer.dequantized())


def test_an_export_that_cannot_hold_them_is_refused_before_the_run(llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    wanted = {
        "model": {"path": str(llama_folder)},
        "method": {"name": "hqq"},
        "quant": FLOAT_ZERO.model_dump(exclude={"overrides"}),
        "export": [{"format": "gptq", "path": str(tmp_path / "gptq")}],
        "output": {"path": str(tmp_path / "out")},
    }
    file.write_text(json.dumps(wanted))
    with pytest.raises(InputError, match=r"cannot be exported as gptq: .* has zero points between codes"):
        pipeline.quantize(recipe.load(file))
    assert not (tmp_path / "out").exists()


def test_they_need_an_asymmetric_grid() -> None:
    with pytest.raises(ValidationError, match="float_zero: true needs symmetric: false"):
        QuantConfig(float_zero=True)
    quant = QuantConfig.model_validate({"symmetric": False, "overrides": {"*.v_proj": {"float_zero": True}}})
    spec = quant.spec_for("a.v_proj")
    assert spec is not None
    assert spec.float_zero
    assert spec.label() == "w4g128 float zero"
    quant = QuantConfig.model_validate(
        {"symmetric": False, "float_zero": True, "overrides": {"*.v_proj": {"symmetric": True}}}
    )
    with pytest.raises(InputError, match=r"overrides that match a\.v_proj: .*float_zero: true needs"):
        quant.spec_for("a.v_proj")


def test_folders_from_before_there_were_any_are_still_read() -> None:
    spec = QuantSpec(symmetric=False)
    section = section_of({"a": spec})
    del section["float_zero"]
    assert specs_of(section) == {"a": spec}


def test_a_minimum_and_a_maximum_are_held_exactly_but_for_rounding() -> None:
    spec = QuantSpec(num_bits=2, group_size=-1, symmetric=False, float_zero=True, scale_dtype="float32")
    weight = torch.tensor([[-0.31, 0.0, 0.11, 0.52]])
    grid = minmax_qparams(weight, spec)
    assert float(grid[1]) == pytest.approx(0.31 * 3 / 0.83)
    assert dequantize(quantize(weight, *grid, spec), *grid, spec)[0, [0, 3]].tolist() == pytest.approx([-0.31, 0.52])
