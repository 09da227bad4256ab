"""Expanding a packed weight: the same bits in parts of any size, and gradients to its scale."""

import pytest
import torch
from helpers.weights import gradient, random_weight, w

from qtool.config.quant import BITS, QuantSpec
from qtool.quant import affine, packed_weight
from qtool.quant.packed_linear import PackedLinear


@pytest.mark.parametrize("numbers", [1, 200, 512, 10**6])
@pytest.mark.parametrize(
    "spec", [w(b, g, s) for b in BITS for g in (-1, 16) for s in (True, False)], ids=QuantSpec.label
)
def test_a_weight_is_the_same_however_many_rows_are_expanded_at_once(
    spec: QuantSpec, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_weight, "CHUNK_NUMBERS", {"cpu": numbers})
    weight = random_weight(spec, 23, 80)
    layer, dense = PackedLinear.from_quantized(weight, None), affine.dequantize(*weight)
    assert torch.equal(layer.dequantized(), dense)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(layer.dequantized(dtype), dense.to(dtype))


def test_an_expanded_weight_passes_gradients_to_its_scale() -> None:
    layer = PackedLinear.from_quantized(random_weight(w(3, 16), 8, 32), None)
    layer.weight_scale = layer.weight_scale.float().requires_grad_()
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    layer(x).sum().backward()
    steps = layer.quantized.codes.float() - 4
    expected = (steps * x.sum(0)).view(8, 2, 16).sum(-1)
    assert torch.allclose(gradient(layer.weight_scale), expected, atol=1e-4)
