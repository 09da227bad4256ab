"""Products of float32 matrices: the chosen library never costs precision, and sums of ``x^T x`` are right."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.methods import correlated_inputs
from hypothesis import given
from hypothesis import strategies as st

from qtool.blocks.task import Stage
from qtool.methods import gptq
from qtool.methods.gptq import collect
from qtool.quant.hessian import add_gram, mirror
from qtool.system import matmul

# Any: torch does not declare the settings of either
MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch puts an object in this place
CUDA_MATMUL: Any = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset the process to before any choice of a library, and restore its settings after the test."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "none"
    monkeypatch.setattr(matmul, "_left", "none")
    matmul.onednn_serves.cache_clear()
    yield
    matmul.onednn_serves.cache_clear()
    MATMUL.fp32_precision = before


def test_whatever_is_chosen_keeps_float32_and_goes_with_the_model() -> None:
    matmul.choose_library(torch.float32)
    assert matmul.keeps_float32()
    assert (MATMUL.fp32_precision == "bf16") == matmul.onednn_serves()
    matmul.choose_library(torch.bfloat16)
    assert MATMUL.fp32_precision == "none"


def test_where_the_permission_costs_precision_it_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "keeps_float32", lambda: False)
    matmul.choose_library(torch.float32)
    assert MATMUL.fp32_precision == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_setting_of_someone_else_stays(dtype: torch.dtype) -> None:
    MATMUL.fp32_precision = "ieee"
    matmul.choose_library(dtype)
    assert MATMUL.fp32_precision == "ieee"


def test_a_product_in_bfloat16_is_told_from_one_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matmul.keeps_float32()
    real = torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return real(left, right) if left.dtype == torch.float64 else real(left.bfloat16(), right.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not matmul.keeps_float32()


@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 99))
def test_gram_is_the_sum_of_outer_products_and_settings_stay(
    size: int, rows: int, dtype: torch.dtype, seed: int
) -> None:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = MATMUL.fp32_precision, CUDA_MATMUL.fp32_precision
    total = torch.zeros(size, size)
    with matmul.exact_products(dtype):
        add_gram(total, x.float())
    mirror(total)
    assert (MATMUL.fp32_precision, CUDA_MATMUL.fp32_precision) == before
    expected = x.double().T @ x.double()
    assert (total - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(total, total.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_are_products_of_what_the_inputs_are_and_settings_stay(dtype: torch.dtype) -> None:
    """``2/n sum x x^T`` has the precision of float32 sums on every machine, for bfloat16 inputs too."""
    x = correlated_inputs(2048, 256, seed=3).to(dtype)
    before = MATMUL.fp32_precision, CUDA_MATMUL.fp32_precision
    hessian = collect(Stage([], [x], None), gptq.Config()).hessian
    assert (MATMUL.fp32_precision, CUDA_MATMUL.fp32_precision) == before
    expected = x.double().T @ x.double() * (2 / 2048)
    assert (hessian - expected).abs().max() < 1e-5 * expected.abs().max()
