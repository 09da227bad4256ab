"""Rounding and clamping as papers define them, term by term, and grids to try them on."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.quant import BITS, SCALE_BITS, QuantSpec
from qtool.quant import rounding

GATES = sorted(rounding.GATES)


def assert_equal(found: Tensor | None, expected: Tensor) -> None:
    """Assert that two float64 tensors are equal to 1e-10."""
    assert found is not None
    assert found.dtype == torch.float64
    assert float((found - expected).detach().abs().max()) < 1e-10


def periodic(x: Tensor, temperature: float) -> Tensor:
    """``floor(x) + sum_k [sig(T (f - k - 1/2)) - 1[k < 0]]``, term by term."""
    low = x.detach().floor()
    reach = math.ceil(40 / temperature) + 1
    terms = [((x - low - k - 0.5) * temperature).sigmoid() - float(k < 0) for k in range(-reach, reach + 1)]
    return low + torch.stack(terms).sum(0)


def local(x: Tensor, temperature: float) -> Tensor:
    """``(floor(x) + sig(T (f - 1/2)))`` with the step stretched by ``1 / tanh(T / 4)`` about its middle."""
    low = x.detach().floor()
    return low + 0.5 + (((x - low - 0.5) * temperature).sigmoid() - 0.5) / math.tanh(temperature / 4)


def dsq(x: Tensor, temperature: float) -> Tensor:
    """arXiv 1908.05033: ``i + (s tanh(k (x - m_i)) + 1) / 2`` with ``s = 1 / tanh(k / 2)``, steps of size one."""
    low = x.detach().floor()
    return low + ((temperature * (x - low - 0.5)).tanh() / math.tanh(temperature / 2) + 1) / 2


STAIRCASES = {"sigmoid": periodic, "sigmoid-local": local, "dsq": dsq}


def gate_of(t: Tensor, gate: str) -> Tensor:
    return t.sigmoid() if gate == "logistic" else (1 + torch.special.erf(t / math.sqrt(2))) / 2


def softclamp(x: Tensor, low: float, high: float, sharpness: float, gate: str) -> Tensor:
    k = sharpness
    return low + (x - low) * gate_of(k * (x - low), gate) - (x - high) * gate_of(k * (x - high), gate)


specs = st.builds(
    lambda bits, group, symmetric, scale_dtype, float_zero: QuantSpec(
        num_bits=bits,
        group_size=group,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        float_zero=float_zero and not symmetric,
    ),
    st.sampled_from(BITS),
    st.sampled_from([-1, 1, 4, 8]),
    st.booleans(),
    st.sampled_from(sorted(SCALE_BITS)),
    st.booleans(),
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers, the same for each ``seed``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
