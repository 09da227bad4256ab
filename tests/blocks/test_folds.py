"""Folds never change what is computed, also where the stored dtype of a norm cannot hold a scale."""

import pytest
import torch
from helpers.methods import generator, random_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.blocks.folds import Fold
from qtool.config.quant import QuantSpec
from qtool.models.linears import Target, weight_of

CHANNELS = 8
X = torch.randn(5, CHANNELS, generator=generator(0))
S = torch.tensor([1.0, 3.0, 0.3, 40.0, 0.02, 1.0, 7.0, 0.9])


class Norm(nn.Module):
    """Multiplies by ``offset + weight``, and adds a bias."""

    def __init__(self, weight: Tensor, offset: float, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(weight), offset
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x * (self.offset + self.weight)
        return y if self.bias is None else y + self.bias


def reader(kind: type[nn.Module] = nn.Linear) -> nn.Module:
    linear = nn.Linear(CHANNELS, 6) if kind is nn.Linear else Conv1D(6, CHANNELS)
    weight = random_weight(6, CHANNELS, 1)
    weight_of(linear).data.copy_(weight if kind is nn.Linear else weight.T)
    return linear


def fold(source: nn.Module, offset: float, linear: nn.Module, exact: bool = True) -> Fold:
    return Fold(source, offset, (Target.of("block.reader", linear, QuantSpec(group_size=-1), 0),), exact)


@torch.no_grad()
def both(source: nn.Module, linear: nn.Module) -> Tensor:
    result: Tensor = linear(source(X))
    return result


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_takes_the_scale_that_its_dtype_holds(
    kind: type[nn.Module], offset: float, storage: torch.dtype
) -> None:
    weight = (torch.rand(CHANNELS, generator=generator(2)) + 0.5 - offset).to(storage).float()
    norm, linear = Norm(weight.clone(), offset), reader(kind)
    before = both(norm, linear)
    fold(norm, offset, linear).apply(S, storage)
    assert torch.equal(norm.weight.to(storage).float(), norm.weight)
    assert torch.allclose((weight + offset) / (norm.weight + offset), S, rtol=0.3)
    assert not torch.equal(norm.weight, weight)
    assert torch.allclose(both(norm, linear), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("offset", "storage", "scale"),
    [
        (0.0, torch.float16, 1e9),  # the weight becomes zero
        (0.0, torch.float16, 1e-9),  # it becomes infinite
        (1.0, torch.bfloat16, 2000.0),  # -1 is the nearest bfloat16, which stands for zero
        (1.0, torch.float16, 1e-9),
    ],
)
def test_a_channel_that_the_stored_dtype_cannot_hold_is_left(offset: float, storage: torch.dtype, scale: float) -> None:
    norm, linear = Norm(torch.full((CHANNELS,), 1.0 - offset), offset), reader()
    before, columns = both(norm, linear), weight_of(linear).detach().clone()
    s = torch.full((CHANNELS,), 2.0)
    s[3] = scale
    fold(norm, offset, linear).apply(s, storage)
    assert float(norm.weight.detach()[3]) == 1 - offset
    assert torch.equal(weight_of(linear)[:, 3], columns[:, 3])
    assert torch.equal(weight_of(linear)[:, :3], columns[:, :3] * 2)
    assert torch.allclose(both(norm, linear), before, rtol=1e-5, atol=1e-6)


def test_a_norm_that_is_zero_stays_zero() -> None:
    norm, linear = Norm(torch.tensor([0.0] + [1.0] * (CHANNELS - 1)), 0.0), reader()
    before, columns = both(norm, linear), weight_of(linear).detach().clone()
    s = torch.cat([torch.tensor([5.0]), S[1:]])
    fold(norm, 0.0, linear).apply(s, torch.bfloat16)
    assert float(norm.weight.detach()[0]) == 0
    assert torch.equal(weight_of(linear)[:, 0], columns[:, 0] * 5)
    assert torch.allclose(both(norm, linear), before, rtol=1e-5, atol=1e-6)


def test_a_bias_that_the_stored_dtype_cannot_hold_leaves_its_channel() -> None:
    norm, linear = Norm(torch.full((CHANNELS,), 1e-4), 0.0, torch.full((CHANNELS,), 100.0)), reader()
    before = both(norm, linear)
    s = torch.ones(CHANNELS)
    s[3] = 1e-4  # 100 / s is above the largest float16
    fold(norm, 0.0, linear).apply(s, torch.float16)
    assert bool(torch.isfinite(norm.get_parameter("bias")).all())
    assert torch.allclose(both(norm, linear), before, rtol=1e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_a_linear_in_floating_point_leaves_the_range_of_its_dtype_in_no_row(exact: bool) -> None:
    source, linear = nn.Linear(CHANNELS, CHANNELS, bias=False), reader()
    before = both(source, linear)
    s = torch.ones(CHANNELS)
    s[3] = 1e-9
    fold(source, 0.0, linear, exact).apply(s, torch.float16)
    assert bool(torch.isfinite(weight_of(source)).all())
    assert torch.allclose(both(source, linear), before, rtol=1e-2, atol=1e-3)
