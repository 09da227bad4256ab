"""Scales and biases in float16, in which readers of GPTQ's and AWQ's layouts take them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.exporters._folder import inexact, published_names


def unheld(source: NativeCheckpoint) -> str | None:
    """Return the reason why float16 cannot hold the scales and biases of quantized linears, or ``None``."""
    for name in source.specs:
        if inexact([source.tensor(f"{name}.weight_scale")], "float16"):
            return f"{name}.weight_scale has values that float16 does not hold; quantize with scale_dtype: float16"
        if f"{name}.bias" in source.float_names() and source.largest(f"{name}.bias") > torch.finfo(torch.float16).max:
            return f"{name}.bias has values that float16 does not hold; export compressed-tensors instead"
    return None


def layout_floats(source: NativeCheckpoint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the ``tensors`` outside quantized weights by published name.

    A bias of a quantized linear is in float16 if that holds it exactly.
    """
    biases = {f"{name}.bias" for name in source.specs}
    small = {name for name, tensor in tensors.items() if name in biases and not inexact([tensor], "float16")}
    held = {name: tensor.to(torch.float16) if name in small else tensor for name, tensor in tensors.items()}
    return published_names(source).floats(held)
