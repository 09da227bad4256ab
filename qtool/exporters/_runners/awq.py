"""GPTQModel's own function for AWQ's gemm layout, which unpacks the tensors of the files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file


def weights(folder: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the weight float32 ``[out, in]`` of every packed linear by its published name."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    stored = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    for name in [each.removesuffix(".qweight") for each in stored if each.endswith(".qweight")]:
        codes, zeros, scales = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        group = len(codes) // len(scales)
        weight = dequantize_gemm(codes, zeros, scales.float(), config["bits"], group)
        yield name, weight.T.contiguous().float().numpy()
