"""auto-round unpacks weights: the outputs of its linears for the unit vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import auto_round
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

VERSION = auto_round.__version__  # the import registers its linears with transformers


@torch.inference_mode()
def weights(folder: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the weight float32 ``[out, in]`` of every packed linear by its name in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu", trust_remote_code=False)
    nn.Module.float(model.eval())  # model.float() refuses quantized models
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            yield name, _dense(layer).numpy()


def _dense(layer: Any) -> Tensor:
    bias = layer.bias
    layer.bias = None
    weight: Tensor = layer(torch.eye(layer.infeatures)).T.contiguous()
    layer.bias = bias
    return weight
