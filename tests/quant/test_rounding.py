"""Laws of rounding and clamping: exact forwards, and gradients against closed forms in float64."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from helpers.rounding_reference import GATES, STAIRCASES, assert_equal, randn, softclamp, specs
from helpers.weights import gradient
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.config.quant import BITS, QuantSpec
from qtool.config.training import RoundingConfig
from qtool.methods.paretoq import SeqLinear
from qtool.quant import affine, rounding
from qtool.quant.trained_linear import QuantLinear
from qtool.system.errors import InputError

ESTIMATORS = sorted(rounding.ESTIMATORS)


def configs(**changes: Any) -> list[RoundingConfig]:
    """Return every estimator with every clamp and gate."""
    found = []
    for estimator, gate in product(ESTIMATORS, [None, *GATES]):
        keys: dict[str, Any] = {"estimator": estimator, **changes}
        if estimator != "ste":
            keys["temperature"] = 5.0
        if gate is not None:
            keys |= {"clamp": "softclamp", "gate": gate, "sharpness": 3.0}
        found.append(RoundingConfig(**keys))
    return found


def soft_configs() -> list[RoundingConfig]:
    return [
        RoundingConfig(**(config.model_dump() | {"forward": "soft"}))
        for config in configs()
        if config.estimator != "ste"
    ]


def name_of(config: RoundingConfig) -> str:
    return "-".join(str(getattr(config, key)) for key in ("estimator", "clamp", "gate", "scale_gradient", "forward"))


every_config = pytest.mark.parametrize("config", configs(), ids=name_of)


def make_layer(
    spec: QuantSpec, config: RoundingConfig = rounding.PLAIN, seed: int = 0, kind: type[QuantLinear] = QuantLinear
) -> QuantLinear:
    """Return a layer with weights beyond both ends of the range, and zero points between codes."""
    layer = kind(0.1 * randn(3, 32, seed=seed), torch.zeros(3), spec, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.scale.mul_(0.4 + 0.3 * torch.rand(layer.scale.shape, generator=generator))
        if layer.zero_point.requires_grad:
            layer.zero_point.add_(torch.rand(layer.scale.shape, generator=generator) - 0.5)
    return layer


def per_weight(values: Tensor, columns: int = 32) -> Tensor:
    """Expand ``[out, groups]`` to ``[out, in]``."""
    return values.repeat_interleave(columns // values.shape[1], dim=1)


# ---------------------------------------------------------------------------------- definitions to compare with


def expected_slope(u: Tensor, low: int, high: int, config: RoundingConfig) -> Tensor:
    """Compute ``R'(C(u)) C'(u)`` by autograd of the definitions."""
    x = u.detach().clone().requires_grad_()
    if config.clamp == "hard":
        clamped, inside = x, (x.round() >= low) & (x.round() <= high)
    else:
        clamped, inside = softclamp(x, low, high, config.sharpness, config.gate), torch.ones_like(x)
    value = clamped if config.estimator == "ste" else STAIRCASES[config.estimator](clamped, config.temperature)
    return torch.autograd.grad(value.sum(), x)[0] * inside


# -------------------------------------------------------------------------------------------------------- forward


@given(specs, st.sampled_from(configs(scale_gradient="lsq") + configs()), st.integers(0, 999))
def test_the_forward_rounds_and_clamps_exactly_whatever_the_gradient(
    spec: QuantSpec, config: RoundingConfig, seed: int
) -> None:
    layer = make_layer(spec, config, seed)
    scale, zero_point = layer.qparams()
    s, z = per_weight(scale), per_weight(zero_point)
    codes = (layer.weight / s + z).round().clamp(0, spec.qmax)
    for weight in (layer.quantized_weight(), layer.freeze().dequantized()):
        assert torch.equal(weight, (codes - z) * s)


@pytest.mark.parametrize("config", configs() + soft_configs(), ids=name_of)
def test_codes_and_what_is_frozen_know_nothing_of_the_rounding_of_the_training(config: RoundingConfig) -> None:
    spec = QuantSpec(num_bits=2, group_size=8, symmetric=False)
    plain, layer = make_layer(spec), make_layer(spec, config)
    assert torch.equal(layer.quantized.codes, plain.quantized.codes)
    assert torch.equal(layer.freeze().dequantized(), plain.quantized_weight())
    with torch.no_grad():  # without gradients, as in validation, a soft forward is the hard one
        assert torch.equal(layer.quantized_weight(), plain.quantized_weight())
    assert torch.equal(layer.quantized_weight(), plain.quantized_weight()) == (config.forward == "hard")


@given(st.integers(0, 999))
def test_the_default_is_straight_through_bit_for_bit(seed: int) -> None:
    """Against torch's own clamp of a rounded value; some gradients are not finite."""
    grid, upstream = 3 * randn(4, 5, 8, seed=seed), randn(4, 5, 8, seed=seed + 1)
    upstream[0, 0, :3] = torch.tensor([float("inf"), float("nan"), -0.0])
    grid[0, 1] = torch.tensor([-0.5, 0.5, 1.5, 2.5, 3.5, -0.50001, 3.49999, 100.0])
    rounded, x = grid.round().requires_grad_(), grid.clone().requires_grad_()
    expected = rounded.clamp(0, 3)
    expected.backward(upstream)
    found = rounding.round_and_clamp(x, 0, 3)
    found.backward(upstream)
    assert torch.equal(found, expected)
    assert torch.equal(gradient(x).view(torch.int32), gradient(rounded).view(torch.int32))  # the signs of zeros too


@every_config
def test_what_is_kept_for_the_backward_is_a_mask_or_one_tensor(config: RoundingConfig) -> None:
    kept: list[int] = []
    x = randn(2, 4, 8).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rounding.round_and_clamp(x, 0, 3, config)
    assert kept == [1 if config == RoundingConfig() else 4]


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("config", configs() + configs(scale_gradient="lsq"), ids=name_of)
def test_gradients_are_the_closed_forms(bits: int, symmetric: bool, config: RoundingConfig) -> None:
    """``dw = G R'C'``, ``ds = sum G (q - z - w/s R'C')``, ``dz = sum G s (R'C' - 1)``; LSQ's factor for the scale."""
    spec = QuantSpec(num_bits=bits, group_size=8, symmetric=symmetric, scale_dtype="float32")
    layer = make_layer(spec, config).double()
    upstream = randn(3, 32, seed=2).double()
    layer.quantized_weight().backward(upstream)
    scale, zero_point = layer.qparams()
    s, z, w = per_weight(scale.detach()), per_weight(zero_point.detach()), layer.weight.detach()
    u = w / s + z
    slope = expected_slope(u, 0, spec.qmax, config)
    q = u.round().clamp(0, spec.qmax)
    assert bool((u.round() < q).any())
    assert bool((u.round() > q).any())

    def summed(values: Tensor) -> Tensor:
        return affine.grouped(values, spec).sum(-1)

    factor = 1 / math.sqrt(8 * (2 ** (bits - 1) - 1 if symmetric else 2**bits - 1))
    assert_equal(layer.weight.grad, upstream * slope)
    by_scale = summed(upstream * (q - z - w / s * slope))
    assert_equal(layer.scale.grad, by_scale * (factor if config.scale_gradient == "lsq" else 1))
    if symmetric:
        assert layer.zero_point.grad is None
    else:
        assert_equal(layer.zero_point.grad, summed(upstream * s * (slope - 1)))


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_efficientqat(bits: int) -> None:
    """arXiv 2407.11062, appendix B, misprints corrected: group sums of the three branches."""
    spec = QuantSpec(num_bits=bits, group_size=16, symmetric=False)
    layer = make_layer(spec).double()
    upstream = randn(3, 32, seed=2).double()
    layer.quantized_weight().backward(upstream)
    scale, zero_point = layer.qparams()
    s, z = per_weight(scale.detach()), per_weight(zero_point.detach())
    ratio = layer.weight.detach() / s
    low, high = ratio.round() + z < 0, ratio.round() + z > 2**bits - 1
    inside = ~(low | high)
    by_scale = inside * (ratio.round() - ratio) + low * -z + high * (2**bits - 1 - z)

    def summed(values: Tensor) -> Tensor:
        return affine.grouped(values, spec).sum(-1)

    assert_equal(layer.weight.grad, upstream * inside)
    assert_equal(layer.scale.grad, summed(upstream * by_scale))
    assert_equal(layer.zero_point.grad, summed(upstream * ~inside * -s))


class LowRank(QuantLinear):
    """LR-QAT's layer (arXiv 2406.06385): a frozen weight on a frozen grid, plus a low-rank product."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight.requires_grad_(False)
        self.zero_point.requires_grad_(False)
        self.frozen_scale = self.qparams()[0].detach().double() * 0.7
        self.a, self.b = nn.Parameter(randn(3, 4, seed=5)), nn.Parameter(randn(4, 32, seed=6))
        self.factor = 0.25

    def grid_weight(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        low_rank = affine.grouped(self.factor * self.a @ self.b, self.spec)
        return super().grid_weight(self.frozen_scale, zero_point) + low_rank


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_lrqat(symmetric: bool) -> None:
    """``GZ = G s M``: ``dA = alpha/r GZ B^T``, ``dB = alpha/r A^T GZ``, ``ds = sum G (q - z)``: no term ``-w/s``."""
    spec = QuantSpec(num_bits=3, group_size=8, symmetric=symmetric)
    layer = make_layer(spec, kind=LowRank).double()
    assert isinstance(layer, LowRank)
    upstream = randn(3, 32, seed=2).double()
    layer.quantized_weight().backward(upstream)
    scale, zero_point = layer.qparams()
    s, z = per_weight(scale.detach()), per_weight(zero_point.detach())
    a, b = layer.a.detach(), layer.b.detach()
    u = layer.weight.detach() / per_weight(layer.frozen_scale) + z + layer.factor * a @ b
    mask = (u.round() >= 0) & (u.round() <= spec.qmax)
    assert bool(mask.any())
    assert not bool(mask.all())
    gz = upstream * s * mask
    assert_equal(layer.a.grad, layer.factor * gz @ b.T)
    assert_equal(layer.b.grad, layer.factor * a.T @ gz)
    assert_equal(layer.scale.grad, affine.grouped(upstream * (u.round().clamp(0, spec.qmax) - z), spec).sum(-1))


@pytest.mark.parametrize("config", soft_configs(), ids=name_of)
def test_a_soft_forward_is_differentiated_exactly(config: RoundingConfig) -> None:
    u = torch.linspace(-2, 5.3, 997, dtype=torch.float64).requires_grad_()
    if config.clamp == "hard":
        value = STAIRCASES[config.estimator](u, config.temperature).clamp(0, 3)
    else:
        value = STAIRCASES[config.estimator](softclamp(u, 0, 3, config.sharpness, config.gate), config.temperature)
    (expected,) = torch.autograd.grad(value.sum(), u)
    found = rounding.round_and_clamp(u, 0, 3, config)
    assert_equal(found, value)
    assert_equal(torch.autograd.grad(found.sum(), u)[0], expected)


def test_a_gradient_longer_than_a_chunk_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "CHUNK_NUMBERS", {"cpu": 7})
    u = randn(3, 4, 8).double().requires_grad_()
    config = RoundingConfig(estimator="sigmoid")
    rounding.round_and_clamp(u, 0, 3, config).sum().backward()  # the gradient of a sum is an expanded tensor
    assert_equal(u.grad, expected_slope(u, 0, 3, config))


@every_config
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_trainable_parameter_moves(config: RoundingConfig, symmetric: bool) -> None:
    layer = make_layer(QuantSpec(num_bits=2, group_size=8, symmetric=symmetric), config)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    trainable = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trainable == ["weight", "scale"] + ([] if symmetric else ["zero_point"])
    layer(randn(5, 32, seed=1)).square().mean().backward()
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
    for name, p in layer.named_parameters():
        share = float((p.detach() != before[name]).float().mean())
        assert (share > 0.5) if name in trainable else (share == 0), (name, share)


# ------------------------------------------------------------------------------------------------------------ SEQ


def seq_spec(bits: int, group_size: int = -1) -> QuantSpec:
    return QuantSpec(num_bits=bits, group_size=group_size, symmetric=False, float_zero=True, scale_dtype="float32")


def seq(w: Tensor, alpha: Tensor, n: int) -> Tensor:
    """Compute ParetoQ's ``alpha (round(clip(w / alpha, +-0.99) n - 1/2) + 1/2) / n``, straight through."""
    steps = (w / alpha).clamp(-0.99, 0.99) * n - 0.5
    return alpha * (steps + (steps.round() - steps).detach() + 0.5) / n


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_seq_is_the_grid_with_a_zero_point_between_two_codes(bits: int) -> None:
    """Forward and gradients equal the paper's, by autograd and in closed form."""
    layer = make_layer(seq_spec(bits), RoundingConfig(scale_gradient="lsq"), kind=SeqLinear).double()
    upstream = randn(3, 32, seed=2).double()
    found = layer.quantized_weight()
    found.backward(upstream)
    n = 2 ** (bits - 1)
    w, alpha = layer.weight.detach().clone().requires_grad_(), layer.qparams()[0].detach() * n
    alpha.requires_grad_()
    expected = seq(w, alpha, n)
    assert_equal(found, expected)
    by_w, by_alpha = torch.autograd.grad(expected, (w, alpha), upstream)
    factor = 1 / math.sqrt(w.numel() * (2 ** (bits - 1) - 1))
    assert_equal(layer.weight.grad, by_w)
    assert_equal(layer.scale.grad, n * factor * by_alpha)  # alpha is n scales

    ratio = (w / alpha).detach()
    inside = ratio.abs() <= 0.99
    assert not bool(inside.all())
    outer = (n - 0.5) / n * ratio.sign()
    closed = (upstream * torch.where(inside, expected / alpha - ratio, outer)).sum(-1, keepdim=True).detach()
    assert_equal(layer.weight.grad, upstream * inside)
    assert_equal(layer.scale.grad, n * factor * closed)


def test_seq_has_the_levels_of_the_paper_and_starts_at_the_largest_weight() -> None:
    weight = torch.tensor([[0.8, -0.1, 0.3, -0.5], [0.0, 0.0, 0.0, 0.0]])
    layer = SeqLinear(weight, None, seq_spec(2))
    assert layer.scale.tolist() == [[pytest.approx(0.4)], [0.5]]
    assert layer.quantized_weight().flatten().tolist() == pytest.approx([0.6, -0.2, 0.2, -0.6, *[0.25] * 4])
    assert layer.quantized.codes.tolist() == [[3, 1, 2, 0], [2] * 4]
    assert layer.freeze().qparams()[1].tolist() == [[1.5], [1.5]]


def test_seq_trains_its_scale_and_holds_its_zero_point() -> None:
    layer = make_layer(seq_spec(2, 8), kind=SeqLinear)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["weight", "scale"]
    assert torch.equal(layer.freeze().dequantized(), layer.quantized_weight())


def test_seq_starts_from_its_own_grid_only() -> None:
    layer = SeqLinear(randn(3, 32), None, seq_spec(2))
    other = SeqLinear(randn(3, 32, seed=1), None, seq_spec(2)).quantized
    layer.start_from(other)
    assert torch.equal(layer.quantized.codes, other.codes)
    with pytest.raises(InputError, match=r"zero points other than 1\.5, the value that this method fixes; start from"):
        layer.start_from(other._replace(zero_point=other.zero_point + 0.25))


# ------------------------------------------------------------------------------------------------ -------- ramp


def test_the_temperature_moves_linearly_to_its_end() -> None:
    config = RoundingConfig(estimator="sigmoid", temperature=2, temperature_end=10)
    assert [config.at(share).temperature for share in (0.0, 0.25, 1.0)] == [2, 4, 10]
    layer = make_layer(QuantSpec(num_bits=2, group_size=8), config).double()
    upstream = randn(3, 32, seed=2).double()
    for share, temperature in ((0.0, 2.0), (0.5, 6.0), (1.0, 10.0), (0.0, 2.0)):
        layer.set_progress(share)
        layer.weight.grad = None
        layer.quantized_weight().backward(upstream)
        u = layer.weight.detach() / per_weight(layer.qparams()[0].detach()) + 2
        fixed = RoundingConfig(estimator="sigmoid", temperature=temperature)
        assert_equal(layer.weight.grad, upstream * expected_slope(u, 0, 3, fixed))


def test_without_an_end_the_temperature_stays() -> None:
    config = RoundingConfig(estimator="dsq", temperature=3)
    assert config.at(0.7) == config
