"""The search for the range of a group: which candidates it leaves out."""

import pytest
import torch
from helpers.weights import w
from hypothesis import given
from hypothesis import strategies as st

from qtool.config.quant import SCALE_BITS, QuantSpec
from qtool.quant import ranges
from qtool.quant.ranges import SHRINKS, search_qparams, worthwhile


@given(
    seed=st.integers(0, 2**32 - 1),
    num_bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([1, 16, 64, -1]),
    symmetric=st.booleans(),
    norm=st.sampled_from([1.0, 2.0, 2.4, 4.0]),
    power=st.sampled_from([1, 3]),
    spread=st.floats(-7, 4),
    scale_dtype=st.sampled_from(sorted(SCALE_BITS)),
)
def test_candidates_that_are_left_out_would_not_win(
    seed: int, num_bits: int, group_size: int, symmetric: bool, norm: float, power: int, spread: float, scale_dtype: str
) -> None:
    """The grid is that of a search over all candidates, bit for bit."""
    spec = w(num_bits, group_size, symmetric, scale_dtype)
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)) ** power * 10**spread
    found = search_qparams(weight, spec, norm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "worthwhile", lambda *_: SHRINKS)
        every = search_qparams(weight, spec, norm)
    assert all(torch.equal(a, b) for a, b in zip(found, every, strict=True))


def test_few_candidates_are_left_at_eight_bits() -> None:
    """A range of 255 steps gains nothing by a large cut; one of 3 steps may."""
    assert len(worthwhile(QuantSpec(num_bits=8, group_size=-1), 576, 2.4)) < 5
    assert worthwhile(QuantSpec(num_bits=2), 64, 2.4) == SHRINKS
