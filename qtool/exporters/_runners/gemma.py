"""transformers' own ``gemma`` quantizer, whose layers unpack their weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM


def weights(folder: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the weight float32 ``[out, in]`` of every packed linear and embedding by its name in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    for name, module in model.named_modules():
        if type(module).__name__ == "QuantizedLinear":
            yield name, module._dequantize_weights().float().numpy()
        elif type(module).__name__ == "QuantizedEmbedding":
            yield name, module.weight.float().numpy()
