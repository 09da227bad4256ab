"""Quick runs of every method, and random weights and inputs to quantize."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.blocks.job import Job, Method
from qtool.config.quant import QuantConfig
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight
from qtool.reports.records import Series

W4 = QuantConfig(num_bits=4, group_size=16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


QUICK: dict[str, dict[str, Any]] = {  # the contract does not ask for the best result
    "efficientqat": {
        "epochs": 0.1,
        "min_steps": 16,
        "batch_size": 2,
        "e2e": {"steps": 4, "min_steps": 0, "batch_size": 2, "scale_share": 0.01},
    },
    "signround": {"iterations": 20},
    "gsq": {"epochs": 0.1, "min_steps": 20, "batch_size": 2, "travel": 0.5},
    "lrqat": {"min_steps": 0, "batch_size": 2, "rank": 4, "travel": 0.1, "scale_travel": 0.02},
    "lsq": {"min_steps": 0, "batch_size": 2, "travel": 0.1, "scale_travel": 0.02},
    "paretoq": {"min_steps": 0, "batch_size": 2, "travel": 0.1, "scale_travel": 0.02},
    "qat": {"min_steps": 0, "batch_size": 2, "travel": 0.1},
    "llmqat": {"min_steps": 0, "batch_size": 2, "travel": 0.1},
}

TRAINED = {"min_steps": 0, "batch_size": 2, "travel": 0.3}  # keys of methods that train the whole model


def by_name(series: Iterable[Series]) -> dict[str, list[float]]:
    """The values of each series; ``validation`` and ``e2e_validation`` are those of ``loss`` and ``e2e_loss``."""
    names = {"validation": "validation", "step": "loss", "block": "loss"}
    return {each.name.replace("loss", names[each.per]): list(each.values) for each in series}


def recorded(manifest: Path) -> dict[str, list[float]]:
    """The series of a ``qtool.json`` or ``report.json``."""
    return by_name(Series.model_validate(each) for each in json.loads(manifest.read_text())["series"])


def run(
    method: Method[Any], loaded: LoadedModel, tokens: Tensor, quant: QuantConfig, **settings: Any
) -> dict[str, QuantizedWeight]:
    """Quantize ``loaded`` and return what became of each linear."""
    config = method.config(**QUICK.get(method.config.model_fields["name"].default, {}) | settings)
    result = method.run(Job.select(loaded, quant, tokens if method.needs_data(config) else None), config)
    if not method.end_to_end(config):
        assert all(len(each.values) == len(loaded.blocks()) for each in result.series)
    return {name: layer.quantized for name, layer in packed_linears(loaded.model).items()}


def train(
    method: Method[Any], loaded: LoadedModel, tokens: Tensor, quant: QuantConfig = W4, **settings: Any
) -> tuple[dict[str, QuantizedWeight], dict[str, list[float]]]:
    result = method.run(Job.select(loaded, quant, tokens), method.config(**TRAINED | settings))
    quantized = {name: layer.quantized for name, layer in packed_linears(loaded.model).items()}
    return quantized, by_name(result.series)


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


def with_outliers(loaded: LoadedModel, strength: float = 30.0) -> LoadedModel:
    """A few channels of what each block's linears read are loud, as in real models."""
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                parameter[torch.tensor([3, 17, 40])] *= strength
            elif name.endswith("up_proj.weight"):
                parameter[torch.tensor([5, 50])] *= strength
    return loaded
