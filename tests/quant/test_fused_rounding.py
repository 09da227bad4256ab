"""Rounding a few rows at a time: the same bits, and the same gradients, as operations on whole tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.config.quant import QuantSpec
from qtool.quant import affine, fused_rounding


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    bits=st.sampled_from((2, 3, 4, 8)),
    symmetric=st.booleans(),
    chunk=st.sampled_from((1, 50, 1 << 16)),
    trains=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    seed=st.integers(0, 99),
)
def test_rounding_by_rows_has_the_bits_of_rounding_at_once(
    rows: int, groups: int, bits: int, symmetric: bool, chunk: int, trains: tuple[bool, bool, bool], seed: int
) -> None:
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=symmetric)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * 16, generator=generator)
    scale, zero_point = affine.minmax_qparams(weight, spec)
    scale = scale * 0.7  # some weights are beyond the ends
    upstream = torch.randn(rows, groups * 16, generator=generator)

    def found(fused: bool) -> list[torch.Tensor | None]:
        given = zip((weight, scale, zero_point), trains, strict=True)
        w, step, zero = leaves = [each.clone().requires_grad_(on) for each, on in given]
        if fused:
            grid = fused_rounding.to_grid(affine.grouped(w, spec), step, zero)
            result = fused_rounding.rounded(grid, step, zero, spec.qmin, spec.qmax).flatten(1)
        else:
            result = affine.fake_quantize(w, step, zero, spec)
        result.backward(upstream)
        return [result.detach(), *(leaf.grad for leaf in leaves)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(fused_rounding.CHUNK_NUMBERS, "cpu", chunk)
        ours = found(True)
    for mine, other in zip(ours, found(False), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)
    assert torch.equal(ours[0], found(False)[0])  # type: ignore[arg-type]
