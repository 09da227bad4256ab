"""Products of float32 matrices: the library that is chosen never costs precision, and sums of x^T x are right."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool import products

MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture
def untouched() -> Iterator[None]:
    """The process as it was before anything was chosen, and afterwards as this test found it."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "none"
    products.choose_library.cache_clear()
    yield
    products.choose_library.cache_clear()
    MATMUL.fp32_precision = before


@pytest.mark.usefixtures("untouched")
def test_whatever_is_chosen_keeps_float32() -> None:
    name = products.choose_library()
    assert products.keeps_float32()
    assert (name == "oneDNN") == (MATMUL.fp32_precision == "bf16")


@pytest.mark.usefixtures("untouched")
def test_where_the_permission_costs_precision_it_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "keeps_float32", lambda: False)
    assert products.choose_library() != "oneDNN"
    assert MATMUL.fp32_precision == "none"


@pytest.mark.usefixtures("untouched")
def test_a_setting_of_someone_else_stays() -> None:
    MATMUL.fp32_precision = "ieee"
    assert products.choose_library() == "as torch chooses"
    assert MATMUL.fp32_precision == "ieee"


def test_a_product_in_bfloat16_is_told_from_one_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products.keeps_float32()
    real = torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return real(left, right) if left.dtype == torch.float64 else real(left.bfloat16(), right.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products.keeps_float32()


@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 99))
def test_gram_is_the_sum_of_outer_products_and_settings_stay(
    size: int, rows: int, dtype: torch.dtype, seed: int
) -> None:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    cuda: Any = torch.backends.cuda.matmul
    before = MATMUL.fp32_precision, cuda.fp32_precision
    total = torch.zeros(size, size)
    with products.exact_products(dtype):
        products.add_gram(total, x.float())
    products.mirror(total)
    assert (MATMUL.fp32_precision, cuda.fp32_precision) == before
    expected = x.double().T @ x.double()
    assert (total - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(total, total.T)
