"""``dense``: a plain Hugging Face model whose linears hold the dequantized weights.

A weight is ``(code - zero_point) * scale``: up to 8 significant bits times the 11 of a float16 scale, which no 16-bit
dtype holds. So ``dtype: auto`` writes the checkpoint's own dtype only if it holds every weight exactly, else float32. A
dtype that the user names is used, and a note says by how much it rounds; one that some value exceeds is refused.
"""

from pathlib import Path

import torch
from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.sections import ExportConfig
from qtool.exporters._base import Exporter
from qtool.exporters._folder import (
    WrittenFolder,
    float_tensors,
    inexact,
    is_conv1d,
    overflows,
    stored_dtype,
    transposed,
    write_folder,
)
from qtool.quant.affine import dequantize


def refuses(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Refuse a dtype that makes a value infinite."""
    return overflows(source, config, [*source.float_names(), *source.specs])


def _weights(source: NativeCheckpoint) -> dict[str, Tensor]:
    flipped = transposed(source)
    dense = {name: dequantize(*source.quantized(name)) for name in source.specs}
    return {f"{name}.weight": (w.T.contiguous() if name in flipped else w) for name, w in dense.items()}


def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
    """Write the folder; see ``Exporter.write``."""
    weights = _weights(source)
    own = stored_dtype(source)
    default = own if inexact(weights.values(), own) == 0 else "float32"
    tensors, dtype = float_tensors(source, config, default)
    error = inexact([*weights.values(), *(source.tensor(key) for key in source.float_names())], dtype)
    tensors |= {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    write_folder(source.folder, out, tensors, None, dtype)
    if error:
        return [f"{dtype} was asked for: tensors are rounded by up to {error:.1e} of their largest value"]
    return [] if dtype == own else [f"written in {dtype}, because {own} does not hold the dequantized weights exactly"]


def read(opened: WrittenFolder, name: str) -> Tensor:
    """Return the weight float32 ``[out, in]`` of the linear ``name``."""
    weight = opened.tensor(f"{name}.weight").float()
    return weight.T if is_conv1d(opened.folder, name) else weight


EXPORTER = Exporter(
    "plain float weights, for any software",
    refuses,
    write,
    lambda source, out, dtype: write_folder(source.folder, out, {}, None, dtype),
    read,
    "Any software that reads Hugging Face folders loads it; nothing of qtool is needed.",
    needs_class=False,
    dtype_may_round=True,
)
