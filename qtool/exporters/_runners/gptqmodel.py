"""GPTQModel, with its plain torch kernel, which unpacks 2, 3, 4 and 8 bits of both versions of GPTQ."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute and may fuse roundings

import numpy.typing as npt
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import load_file
from torch import Tensor


def load(folder: Path) -> Any:
    """Return the model, in float32: the kernel loads in float16 only, which holds codes and scales exactly."""
    loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    model = loaded.model.eval().float()
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored.update(load_file(file))
    for name, parameter in model.named_parameters():
        if name in stored:  # embeddings and norms: float16 has rounded their smallest values
            parameter.data = stored[name].float()
    return model


def weights(folder: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the weight float32 ``[out, in]`` of every packed linear by its name in memory."""
    for name, module in load(folder).named_modules():
        if isinstance(module, BaseQuantLinear):
            yield name, module.dequantize_weight().T.contiguous().float().numpy()


def logits(model: Any, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the logits ``[t, vocabulary]`` of ``tokens`` ``[t]``."""
    with torch.inference_mode():
        found: npt.NDArray[Any] = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].float().numpy()
    return found
