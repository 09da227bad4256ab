"""Rounding to nearest: the factor of the range."""

import pytest
import torch
from helpers.methods import generator
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.methods.rtn import Config, round_to_nearest
from qtool.quant.affine import dequantize


def weights(seed: int) -> Tensor:
    return torch.randn(6, 32, generator=generator(seed))


@given(st.integers(0, 99), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.floats(0.3, 1))
def test_the_range_is_the_extremes_times_the_factor(seed: int, bits: int, symmetric: bool, factor: float) -> None:
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=symmetric, scale_dtype="float32")
    whole = round_to_nearest(weights(seed), spec, Config())
    found = round_to_nearest(weights(seed), spec, Config(range_factor=factor))
    assert torch.allclose(found.scale, factor * whole.scale, rtol=1e-5)
    assert (found.zero_point - whole.zero_point).abs().max() <= 1  # rounded from the same quotient
    assert found.codes.max() <= spec.qmax


def test_a_smaller_range_rounds_small_weights_better_and_large_ones_worse() -> None:
    spec, weight = QuantSpec(num_bits=4, group_size=16, symmetric=False), weights(0)
    errors = [
        (dequantize(*round_to_nearest(weight, spec, Config(range_factor=factor))) - weight).abs()
        for factor in (1.0, 0.7)
    ]
    small, large = weight.abs() < 0.5, weight.abs() > 2
    assert errors[1][small].mean() < 0.8 * errors[0][small].mean()
    assert errors[1][large].mean() > 2 * errors[0][large].mean()


def test_the_factor_is_refused_where_the_range_is_searched() -> None:
    with pytest.raises(ValidationError, match="range_factor acts only with range: minmax"):
        Config(range="search", range_factor=0.9)
