"""Functions of the runners whose models are torch modules of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def in_float32(model: Any, folder: Path) -> Any:
    """Cast ``model``, which was loaded in float16 from ``folder``, to float32, with the stored float tensors."""
    nn.Module.float(model)  # model.float() refuses quantized models
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored.update(load_file(file))
    for name, parameter in model.named_parameters():
        if name in stored:  # embeddings and norms: float16 has rounded their smallest values
            parameter.data = stored[name].float()
    return model


def logits(model: Any, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the logits ``[t, vocabulary]`` of ``tokens`` ``[t]``."""
    with torch.inference_mode():
        found: npt.NDArray[Any] = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].float().numpy()
    return found
