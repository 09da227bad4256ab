"""The start of a training from given codes: exactly these codes, with no weight at the edge of its code's cell."""

import pytest
import torch
from helpers.rounding_reference import randn, specs
from helpers.weights import per_weight
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight
from qtool.quant.trained_linear import QuantLinear
from qtool.system.errors import InputError


@given(specs, st.integers(0, 999), st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from([0.0, 0.02, 0.15, 0.5]))
def test_a_layer_starts_from_exactly_the_codes_given(
    spec: QuantSpec, seed: int, magnitude: float, margin: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, spec.qmax + 1, (3, 16), generator=generator, dtype=torch.uint8)
    groups = spec.num_groups(16)
    scale = affine.stored_scale(torch.rand(3, groups, generator=generator) * magnitude + 1e-5, spec)
    zero_point = torch.full((3, groups), float(spec.middle))
    if not spec.symmetric:
        zero_point = affine.stored_zero_point(torch.rand(3, groups, generator=generator) * spec.qmax, scale, spec)
    given_weight = QuantizedWeight(codes, scale, zero_point, spec)
    layer = QuantLinear(randn(3, 16, seed=seed) * magnitude, None, spec)
    before = layer.weight.detach().clone()
    layer.start_from(given_weight, margin)
    for found, expected in zip(layer.quantized[:3], given_weight[:3], strict=True):
        assert torch.equal(found, expected)

    def from_codes(weight: Tensor) -> Tensor:
        grid = affine.grouped(weight.detach(), spec) / scale.unsqueeze(-1) + zero_point.unsqueeze(-1)
        return (grid - affine.grouped(codes, spec)).flatten(1)

    away, found = from_codes(before), from_codes(layer.weight)
    beyond = torch.where(away > 0, codes == spec.qmax, codes == 0)  # no code follows on that side
    share, distance, tolerance = 1 - 2 * margin, away.abs(), 1e-5 * (spec.qmax + 1)
    in_cell, far = distance < 0.49, distance > 1.01
    mirrored = (distance > 0.51) & (distance < 0.99) & ~beyond
    assert bool(((found - share * away).abs() <= tolerance)[in_cell].all())
    assert bool(((found - share * (1 - distance) * away.sign()).abs() <= tolerance)[mirrored].all())
    assert bool((found.abs() <= tolerance)[far].all())
    assert bool((found.abs() <= 0.5 - margin + tolerance)[~beyond].all()), "none is nearer to an edge than the margin"
    assert bool((found.abs() < 0.5)[beyond].all())


def start_as_of_gptq(seed: int) -> tuple[QuantLinear, QuantizedWeight]:
    """Return a layer at its nearest codes, and a start of which a quarter of the codes are the second nearest."""
    spec = QuantSpec(num_bits=4, group_size=64, symmetric=False)
    layer = QuantLinear(randn(64, 256, seed=seed), None, spec)
    nearest = layer.quantized
    away = affine.to_grid(layer.weight.detach(), nearest.scale, nearest.zero_point, spec).flatten(1) - nearest.codes
    generator = torch.Generator().manual_seed(seed)
    moves = (torch.rand(away.shape, generator=generator) < away.abs()) * away.sign()
    return layer, nearest._replace(codes=(nearest.codes + moves).clamp(0, spec.qmax).to(torch.uint8))


def changed(layer: QuantLinear, start: QuantizedWeight) -> float:
    """Return the share of the weights whose codes are not those of ``start``."""
    return float((layer.quantized.codes != start.codes).float().mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("margin", [0.0, 0.02, 0.15])
def test_a_small_step_takes_back_few_of_the_codes_of_a_start(margin: float, seed: int) -> None:
    layer, start = start_as_of_gptq(seed)
    assert changed(layer, start) > 0.2, "many codes of the start are not the nearest"
    layer.start_from(start, margin)
    step = per_weight(start.scale, 256).float() * randn(*layer.weight.shape, seed=seed + 10).sign()
    layer.weight.data += 0.01 * step
    assert changed(layer, start) < 0.015, "of as many as lie within that of an edge, not of all that are not nearest"
    assert margin <= 0.01 or changed(layer, start) == 0
    layer.weight.data += 0.29 * step
    assert changed(layer, start) > 0.05, "and codes can still change"


def test_a_start_on_another_grid_is_refused_with_what_differs() -> None:
    given_weight = QuantLinear(randn(3, 16), None, QuantSpec(num_bits=2, group_size=8, symmetric=False)).quantized
    layer = QuantLinear(randn(3, 16), None, QuantSpec(num_bits=3, group_size=8, symmetric=True))
    expected = "have num_bits 2, symmetric False; this run asks for num_bits 3, symmetric True: make the two equal"
    with pytest.raises(InputError, match=expected):
        layer.start_from(given_weight)
