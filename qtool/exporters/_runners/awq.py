"""GPTQModel unpacks the weights of AWQ's gemm layout, in the linears that transformers puts into the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute and may fuse roundings

import numpy.typing as npt
import torch
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from transformers import AutoModelForCausalLM, AwqConfig


@torch.inference_mode()
def weights(folder: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the weight float32 ``[out, in]`` of every packed linear by its name in memory."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float16,
        device_map="cpu",
        trust_remote_code=False,
        quantization_config=AwqConfig(backend="torch_awq"),
    )
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            parts = layer.qweight, layer.qzeros, layer.scales.float()
            yield name, dequantize_gemm(*parts, layer.bits, layer.group_size).T.contiguous().numpy()
