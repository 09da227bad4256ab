"""``use_backend(model, "fast")`` takes the fastest way for each shape, says which and why, and holds to the memory."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.packed_tables import written
from helpers.timings import told
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import qtool
from qtool.config.quant import QuantConfig
from qtool.models import backend
from qtool.models.linears import packed_linears
from qtool.quant.kernel_timing import EXACT
from qtool.quant.packed_linear import PackedLinear
from qtool.system import memory

SHAPES = {(64, 64), (32, 64), (96, 64), (64, 96)}  # of the model's linears


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("native")
    tiny.quantize(tiny.llama(at / "float"), at / "native", QuantConfig(num_bits=4, group_size=32))
    return at / "native"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.eval()
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(tiny.probe()[:, :9]).logits  # 18 rows
    return found.float()


def test_each_shape_is_asked_for_and_the_fastest_way_is_taken_and_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = told(monkeypatch, {"ort": 0.1, "int4": 0.2, "dense float32": 0.4})
    model = load(folder)
    found = qtool.use_backend(model)
    assert set(asked) == SHAPES
    assert dict(found.kernels) == {"ort (cpu)": 14}
    assert str(found).startswith(
        "14 linears by ort (cpu) (4.0 x dense); ort: not exact: input rounded to 8 bits, about 0.7 % of a layer's "
        "output; "
    )
    assert {(choice.timing.out_features, choice.timing.in_features) for choice in found.choices} == SHAPES
    lines = set(map(str, found.choices))
    way = "ort 4.00 x, int4 2.00 x, exact 0.40 x the speed of the dense product; chosen: ort"
    assert lines == {f"{out} x {in_} w4g32: {way}" for out, in_ in SHAPES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_weight_is_held_where_every_kernel_is_slower(
    folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a processor without instructions for bfloat16, where torch's int4 product loses."""
    told(monkeypatch, {"dense float32": 0.1, "dense bfloat16": 0.1 if dtype is torch.bfloat16 else 1, "int4": 0.3})
    monkeypatch.setattr(memory, "free_bytes", lambda: 1 << 30)
    model = load(folder, dtype)
    before = logits(model)
    found = qtool.use_backend(model)
    assert set(found.kernels) <= {"dense float32 (cpu)", "dense bfloat16 (cpu)"}
    assert found.exact == {}
    numbers = sum(layer.in_features * layer.out_features for layer in packed_linears(model).values())
    assert found.num_bytes == numbers * 4
    if dtype is torch.float32:
        assert torch.equal(logits(model), before)
    else:
        assert (logits(model) - before).norm() < 0.02 * before.norm()


def test_without_memory_for_dense_weights_the_fastest_kernel_serves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, {"dense float32": 0.1, "int4": 0.2, "ort": 0.3})
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    found = qtool.use_backend(load(folder))
    assert dict(found.kernels) == {"int4 (cpu)": 14}
    assert "14 linears by int4 (cpu) (0.5 x dense)" in str(found)


def test_dense_weights_together_take_a_part_of_the_free_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, {"dense float32": 0.1, "int4": 0.2})
    room = 2 * 64 * 64 * 4 + 3 * 32 * 64 * 4  # q_proj and o_proj of 2 layers would need more
    monkeypatch.setattr(memory, "free_bytes", lambda: backend.DENSE_SHARE * room)
    found = qtool.use_backend(model := load(folder))
    kernels = [layer.kernel for layer in packed_linears(model).values() if layer.kernel is not None]
    dense = [kernel for kernel in kernels if kernel.backend.library == "dense"]
    assert 0 < len(dense) < 14
    assert sum(kernel.num_bytes for kernel in dense) <= room
    assert found.kernels["int4 (cpu)"] == 14 - len(dense)


def test_where_the_exact_path_is_the_fastest_it_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, {EXACT: 0.1, "dense float32": 0.2})
    model = load(folder)
    with pytest.warns(UserWarning, match=r"14 by the exact path \(.*no way that was tried is faster"):
        found = qtool.use_backend(model)
    assert not any(layer.kernel for layer in packed_linears(model).values())
    assert {choice.name for choice in found.choices} == {EXACT}


def test_a_way_that_fails_on_the_weight_itself_gives_way_to_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, {"ort": 0.1, "int4": 0.2, "dense float32": 0.4})
    monkeypatch.setattr("qtool.quant.kernels._found", {})
    monkeypatch.setattr("qtool.quant.kernels.wrong", lambda kernel, _: "off" if kernel.backend.name == "ort" else "")
    found = qtool.use_backend(load(folder))
    assert dict(found.kernels) == {"int4 (cpu)": 14}


def test_ort_serves_linears_and_head_and_the_checkpoint_stays_the_same(tmp_path: Path) -> None:
    folder = written(tmp_path, "tied", {"embedding": {"num_bits": 8}})
    model = load(folder)
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = qtool.use_backend(model, "ort")
    assert found.head == "ort (cpu)"
    assert "14 linears and the head by ort (cpu); ort: not exact" in str(found)
    assert 0 < (logits(model) - before).norm() < 0.05 * before.norm()
    model.save_pretrained(tmp_path / "again")
    first, second = tiny.stored(folder), tiny.stored(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    qtool.use_backend(model, "exact")
    assert torch.equal(logits(model), before)


def test_dense_holds_the_weights_and_gives_the_exact_numbers(folder: Path) -> None:
    model = load(folder)
    before = logits(model)
    found = qtool.use_backend(model, "dense")
    assert dict(found.kernels) == {"dense float32 (cpu)": 14}
    assert torch.equal(logits(model), before)
    layer = next(iter(packed_linears(model).values()))
    assert isinstance(layer, PackedLinear)
    x = torch.ones(200, layer.in_features)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantized(), layer.bias)), "of many rows too"


def test_a_library_without_a_kernel_for_this_device_says_so(folder: Path) -> None:
    with pytest.warns(UserWarning, match="gemlite has no kernel for devices of type cpu"):
        qtool.use_backend(load(folder), "gemlite")


def test_free_memory_is_that_of_the_system_or_of_the_control_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "max").write_text("max")
    (tmp_path / "limit").write_text("1000000")
    (tmp_path / "used").write_text("400000")
    monkeypatch.setattr(memory, "GROUP_LIMITS", ((str(tmp_path / "max"), str(tmp_path / "used")),))
    whole = memory.free_bytes()
    assert whole > 1 << 20
    monkeypatch.setattr(memory, "GROUP_LIMITS", ((str(tmp_path / "limit"), str(tmp_path / "used")),))
    assert memory.free_bytes() == 600_000
