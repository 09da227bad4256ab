"""Quick runs of EfficientQAT, and what its trainings were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.methods import by_name
from qtool.blocks.job import Job
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.methods import efficientqat
from qtool.methods.efficientqat.block_ap import LowRankBlockLinear
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight
from qtool.quant.rounding import PLAIN
from qtool.training.block_training import BlockLinear, BlockTraining

Make = Callable[[], LoadedModel]
W3 = QuantConfig(num_bits=3, group_size=16)
W2A = QuantConfig(num_bits=2, group_size=16, symmetric=False)
STILL: dict[str, Any] = {"travel": 0, "scale_share": 0, "zero_travel": 0, "norm_travel": 0}
ONE_PHASE: dict[str, Any] = {"e2e": {"steps": 0}}


def config(**settings: Any) -> efficientqat.Config:
    """Quick, from the extremes of each group, and Block-AP alone unless ``e2e`` is given."""
    if "e2e" in settings:
        settings["e2e"] = {"min_steps": 0} | settings["e2e"]
    return efficientqat.Config(
        **{"init": "minmax", "min_steps": 24, "batch_size": 2}
        | {"travel": 1.0, "scale_share": 0.3, "zero_travel": 1.0, "norm_travel": 0.05}
        | ONE_PHASE
        | settings
    )


def run(
    loaded: LoadedModel, tokens: Tensor, quant: QuantConfig, seed: int = 0, **settings: Any
) -> dict[str, list[float]]:
    return by_name(efficientqat.run(Job.select(loaded, quant, tokens, seed=seed), config(**settings)).series)


def weights(loaded: LoadedModel) -> dict[str, QuantizedWeight]:
    return {name: layer.quantized for name, layer in packed_linears(loaded.model).items()}


def same(one: LoadedModel, other: LoadedModel) -> bool:
    """Every tensor of both models is the same."""
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def captured(monkeypatch: pytest.MonkeyPatch) -> list[BlockTraining]:
    """Every training of a block that follows, with its layers as they ended."""
    found: list[BlockTraining] = []
    original = BlockTraining.__init__

    def keep(self: BlockTraining, *args: Any) -> None:
        found.append(self)
        original(self, *args)

    monkeypatch.setattr(BlockTraining, "__init__", keep)
    return found


def random_layer(spec: QuantSpec, rank: int = 0, seed: int = 0) -> BlockLinear:
    """A layer in the middle of its training, zero points beyond the grid among it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 32, generator=generator) * 0.05
    layer = LowRankBlockLinear(weight, None, spec, PLAIN, rank) if rank else BlockLinear(weight, None, spec)
    layer.scale.data *= 0.5 + torch.rand(layer.scale.shape, generator=generator)
    if not spec.symmetric:
        layer.zero_point.data += 4 * torch.randn(layer.zero_point.shape, generator=generator)
    if isinstance(layer, LowRankBlockLinear):
        layer.up.data = torch.randn(layer.up.shape, generator=generator)
    return layer
