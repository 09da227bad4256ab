"""Sums of x^T x: right for every dtype and size, and without a trace in torch's settings."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.methods import correlated_inputs
from hypothesis import given
from hypothesis import strategies as st

from qtool.blocks.moments import collect
from qtool.blocks.stages import Stage
from qtool.blocks.task import Rows
from qtool.quant import hessian as hessian_module
from qtool.quant.hessian import add_gram, even_scale, gram, mirror
from qtool.system import matmul

# Any: torch does not declare the settings of either
MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch puts an object in this place
CUDA_MATMUL: Any = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """Restore the setting of products after the test."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "none"
    yield
    MATMUL.fp32_precision = before


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
    hessian = collect(Stage([], [Rows(x)], None)).hessian
    assert (MATMUL.fp32_precision, CUDA_MATMUL.fp32_precision) == before
    expected = x.double().T @ x.double() * (2 / 2048)
    assert (hessian - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_has_the_bits_of_gptqs_hessian_and_is_the_scaled_sum_of_outer_products(dtype: torch.dtype) -> None:
    x = correlated_inputs(1300, 96, seed=7).to(dtype)
    batches = list(x.split([1, 700, 599]))  # more rows than are cast at once, and fewer
    found = gram(batches)
    assert torch.equal(found, collect(Stage([], each := [Rows(x) for x in batches], each)).hessian)
    assert torch.equal(found, found.T)
    expected = x.double().T @ x.double() * (2 / len(x))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@given(st.integers(1, 9), st.integers(1, 5))
def test_gram_does_not_depend_on_how_many_rows_are_cast_at_once(rows: int, at_once: int) -> None:
    x = torch.randint(-8, 9, (rows, 6), generator=torch.Generator().manual_seed(rows)).float()  # so that sums are exact
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hessian_module, "MIN_ROWS", at_once)
        patch.setattr(hessian_module, "MAX_ELEMENTS", 1)
        assert torch.equal(gram(iter([x])), x.T @ x * (2 / rows))


@given(st.integers(0, 99), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.integers(-12, 12))
def test_a_token_is_scaled_by_a_power_of_two_to_a_mean_square_near_one(seed: int, dtype: torch.dtype, by: int) -> None:
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(seed)).mul(2.0**by).to(dtype)
    x[3] = 0
    scale = even_scale(x)
    assert scale.dtype == dtype
    assert torch.equal(torch.frexp(scale.float()).mantissa, torch.full((5, 1), 0.5))
    found = (x * scale).float()
    sizes = found.square().mean(1)
    assert sizes[3] == 0
    others = sizes[[0, 1, 2, 4]]
    assert (others >= 0.49).all()
    assert (others < 2.01).all()
    if dtype != torch.float16:  # whose smallest numbers are rounded
        assert torch.equal(found, x.float() * scale.float())


def test_tokens_at_the_ends_of_float16_stay_finite() -> None:
    x = torch.tensor([[60000.0] * 8, [2.0**-20] * 8, [0.0] * 8]).half()
    sizes = (x * even_scale(x)).float().square().mean(1)
    assert 0.5 <= float(sizes[0]) < 2
    assert 0 < float(sizes[1]) < 2
    assert float(sizes[2]) == 0
    assert even_scale(x[:0]).shape == (0, 1), "an expert that no token chose"
