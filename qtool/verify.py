"""Every export is read back, by code that shares nothing with the writer, before it gets its name."""

from pathlib import Path

import torch
from torch import Tensor, nn

from qtool.checkpoint import Source
from qtool.config import ModelConfig
from qtool.errors import RunError
from qtool.export import Exporter
from qtool.export._folder import read_tensor
from qtool.models import load_model, packed_linears, replace_linear
from qtool.quant.affine import dequantize

TOLERANCE = 1e-5  # of the largest logit, float32 on CPU: the weights are equal, the order of sums may not be


@torch.no_grad()
def verify(source: Source, out: Path, exporter: Exporter, *, rounded: bool) -> dict[str, float]:
    """Compare every weight and the logits of a fixed probe; returns the largest differences.

    With ``rounded`` (a dtype that was asked for does not hold the weights) differences are returned, not refused.

    Raises:
        RunError: naming the first tensor that differs, or the logits' difference.
    """
    loaded = load_model(ModelConfig(path=str(source.folder), dtype="float32", device="cpu"), quantized=True)
    probe = torch.randint(loaded.model.config.get_text_config().vocab_size, (1, 32), generator=_seeded())
    ours = loaded.model(probe).logits
    worst = 0.0
    for name, layer in packed_linears(loaded.model).items():
        weight = exporter.read(out, name)
        expected = dequantize(*source.quantized(name))
        if weight.shape != expected.shape:
            raise RunError(f"{name} was exported as {list(weight.shape)}; {list(expected.shape)} was expected")
        worst = max(worst, float((weight - expected).abs().max()))
        if not rounded and not torch.equal(weight, expected):
            raise RunError(f"{name} differs after export by up to {worst:.3g}; the export was not kept")
        replace_linear(loaded.model, name, _linear(weight, layer.bias))
    for name in source.float_names():
        stored, read = source.tensor(name), read_tensor(out, name)
        if not rounded and not torch.equal(stored.float(), read.float()):
            raise RunError(f"{name} differs after export; the export was not kept")
    logits = float((loaded.model(probe).logits - ours).abs().max() / ours.abs().max())
    if not rounded and not logits <= TOLERANCE:
        raise RunError(f"logits differ after export by {logits:.3g} of the largest (allowed: {TOLERANCE:g})")
    return {"weight_difference": worst, "logit_difference": logits}


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return linear


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
