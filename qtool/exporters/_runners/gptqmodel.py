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

from .in_torch import in_float32, logits

__all__ = ["load", "logits", "weights"]


def load(folder: Path) -> Any:
    """Return the model, in float32: the kernel loads in float16 only, which holds codes and scales exactly."""
    loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    return in_float32(loaded.model.eval(), folder)


def weights(folder: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the weight float32 ``[out, in]`` of every packed linear by its name in memory."""
    for name, module in load(folder).named_modules():
        if isinstance(module, BaseQuantLinear):
            yield name, module.dequantize_weight().T.contiguous().float().numpy()
