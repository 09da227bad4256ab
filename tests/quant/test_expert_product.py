"""Products of the stacked weights of experts: laws, gradients, and rows of packed weights."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.methods.efficientqat.e2e_qp import ScaleLinear
from qtool.quant.affine import QuantizedWeight, minmax_qparams, quantize
from qtool.quant.expert_product import block_product, product
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.trained_linear import QuantLinear

OUT, IN = 6, 16
COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(weight: Tensor, spec: QuantSpec) -> PackedLinear:
    grid = minmax_qparams(weight, spec)
    return PackedLinear.from_quantized(QuantizedWeight(quantize(weight, *grid, spec), *grid, spec), None)


def by_hand(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """The product of each row with the weight of the expert that the row belongs to."""
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = [weight[owner * OUT : (owner + 1) * OUT] @ row for row, owner in zip(x, owners, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, OUT)


@given(COUNTS)
def test_each_row_meets_the_weight_of_its_expert(counts: list[int]) -> None:
    x, weight = randn(sum(counts), IN), randn(len(counts) * OUT, IN, seed=1)
    found = product(x, weight, None, counts)
    assert found.shape == (sum(counts), OUT)
    assert torch.allclose(found, by_hand(x, weight, counts), atol=1e-5)


def test_one_expert_is_a_plain_linear() -> None:
    x, weight = randn(7, IN), randn(OUT, IN, seed=1)
    assert torch.equal(product(x, weight, None, [7]), F.linear(x, weight))


@given(COUNTS, st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_a_packed_layer_expands_the_rows_of_one_expert_only(counts: list[int], num_bits: int, symmetric: bool) -> None:
    """Six rows of 3 bits do not fill a word of packed zero points, so experts begin inside words."""
    spec = QuantSpec(num_bits=num_bits, group_size=8, symmetric=symmetric)
    layer = packed(randn(len(counts) * OUT, IN), spec)
    whole = layer.dequantized()
    for expert in range(len(counts)):
        rows = slice(expert * OUT, (expert + 1) * OUT)
        assert torch.equal(layer.dequantized(rows=rows), whole[rows])
    x = randn(sum(counts), IN, seed=2)
    assert torch.equal(layer(x, counts), product(x, whole, None, counts))


def test_only_experts_with_rows_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed(randn(4 * OUT, IN), QuantSpec(group_size=8))
    seen: list[slice] = []
    plain = PackedLinear.dequantized

    def watched(self: PackedLinear, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        seen.append(rows)
        return plain(self, dtype, rows)

    monkeypatch.setattr(PackedLinear, "dequantized", watched)
    layer(randn(3, IN), [0, 1, 0, 2])
    assert seen == [slice(OUT, 2 * OUT), slice(3 * OUT, 4 * OUT)]


@given(COUNTS)
def test_the_trained_layer_and_the_packed_one_agree_bit_for_bit(counts: list[int]) -> None:
    layer = QuantLinear(randn(len(counts) * OUT, IN), None, QuantSpec(num_bits=3, group_size=8))
    x = randn(sum(counts), IN, seed=2)
    assert torch.equal(layer(x, counts), layer.freeze()(x, counts))


@given(COUNTS.filter(any))
def test_gradients_of_scales_are_those_of_autograd(counts: list[int]) -> None:
    spec = QuantSpec(num_bits=3, group_size=8, symmetric=False, scale_dtype="float32")
    layer = packed(randn(len(counts) * OUT, IN), spec)
    ours, x = ScaleLinear.of(layer, True, True), randn(sum(counts), IN, seed=2).requires_grad_()
    upstream = randn(sum(counts), OUT, seed=3)
    ours(x, counts).backward(upstream)
    codes, scale, zero_point, _ = layer.quantized
    scale.requires_grad_()
    zero_point.requires_grad_()
    grid = codes.unflatten(1, (-1, 8)).float() - zero_point.unsqueeze(-1)
    other = x.detach().clone().requires_grad_()
    product(other, (grid * scale.unsqueeze(-1)).flatten(1), None, counts).backward(upstream)
    for mine, theirs in ((x.grad, other.grad), (ours.scale.grad, scale.grad), (ours.zero_point.grad, zero_point.grad)):
        assert mine is not None
        assert theirs is not None
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_a_low_rank_term_of_each_expert_is_its_own() -> None:
    left, right = randn(3 * OUT, 2), randn(3 * 2, IN, seed=1)
    whole = block_product(left, right, 3)
    for expert in range(3):
        own = left[expert * OUT : (expert + 1) * OUT] @ right[expert * 2 : (expert + 1) * 2]
        assert torch.allclose(whole[expert * OUT : (expert + 1) * OUT], own, atol=1e-6)
