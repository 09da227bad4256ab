"""Quick runs of every method, and random weights and inputs to quantize."""

from typing import Any

import torch
from torch import Tensor

from qtool.config import plugins
from qtool.config.quant import QuantConfig
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight

W4 = QuantConfig(num_bits=4, group_size=16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


QUICK: dict[str, dict[str, Any]] = {  # the contract does not ask for the best result
    "efficientqat": {
        "epochs": 0.1,
        "min_steps": 16,
        "batch_size": 2,
        "e2e": {"steps": 4, "batch_size": 2, "scale_travel": 0.01},
    },
    "signround": {"iterations": 20},
    "lrqat": {"batch_size": 2, "rank": 4, "travel": 0.1, "scale_travel": 0.02},
    "lsq": {"batch_size": 2, "travel": 0.1, "scale_travel": 0.02},
    "paretoq": {"batch_size": 2, "travel": 0.1, "scale_travel": 0.02},
    "qat": {"batch_size": 2, "travel": 0.1},
    "llmqat": {"batch_size": 2, "travel": 0.1},
}

TRAINED = {"batch_size": 2, "travel": 0.3}  # of methods that train the whole model


def run(
    method: plugins.Method, loaded: LoadedModel, tokens: Tensor, quant: QuantConfig, **settings: Any
) -> dict[str, QuantizedWeight]:
    """Quantize ``loaded`` and return what became of each linear."""
    config = method.config(**QUICK.get(method.config.model_fields["name"].default, {}) | settings)
    series = method.run(loaded, tokens if method.needs_data(config) else None, quant, config, 0)
    if not method.end_to_end(config):
        assert all(len(values) == len(loaded.blocks()) for values in series.values())
    return {name: layer.quantized for name, layer in packed_linears(loaded.model).items()}


def train(
    method: plugins.Method, loaded: LoadedModel, tokens: Tensor, quant: QuantConfig = W4, **settings: Any
) -> tuple[dict[str, QuantizedWeight], dict[str, list[float]]]:
    series = method.run(loaded, tokens, quant, method.config(**TRAINED | settings), 0)
    return {name: layer.quantized for name, layer in packed_linears(loaded.model).items()}, series


def same(ours: dict[str, QuantizedWeight], theirs: dict[str, QuantizedWeight]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)
        for a, b in ((ours[name], theirs[name]) for name in ours)
    )


def correlated_inputs(tokens: int, channels: int, seed: int = 0, rank: int = 12) -> Tensor:
    """Inputs as layers have them: few directions carry most, and some channels are loud."""
    mixing = torch.randn(rank, channels, generator=generator(seed))
    x = torch.randn(tokens, rank, generator=generator(seed + 1)) @ mixing
    x += 0.3 * torch.randn(tokens, channels, generator=generator(seed + 2))
    return x * torch.exp(torch.randn(channels, generator=generator(seed + 3)) * 0.5)


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed)) * 0.05
