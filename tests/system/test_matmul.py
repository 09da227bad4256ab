"""Products of float32 matrices: the library that is chosen never costs precision."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qtool.system import matmul

MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch puts an object in this place


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore torch's defaults for the test, and the settings that the test found after it."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "none"
    monkeypatch.setattr(matmul, "_last_set", "none")
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
