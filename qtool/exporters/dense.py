"""``dense``: a plain Hugging Face model whose linears hold the dequantized weights.

A weight is ``(code - zero_point) * scale``: up to 8 significant bits times the 11 of a float16 scale, which no 16-bit
dtype holds. So ``dtype: auto`` writes the checkpoint's own dtype only if it holds every weight exactly, else float32. A
dtype that the user names is used, and a note says by how much it rounds; one that some value exceeds is refused.
"""

from functools import lru_cache
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
    is_known,
    overflows,
    published_names,
    skeleton,
    stored_dtype,
    write_folder,
)
from qtool.exporters._published import published
from qtool.quant.affine import dequantize


def refuses(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Refuse a dtype that makes a value infinite."""
    return overflows(source, config, [*source.float_names(), *source.specs])


def _weights(source: NativeCheckpoint) -> dict[str, Tensor]:
    """Return the published tensors that hold a row of a quantized linear, in float32."""

    @lru_cache(maxsize=4)
    def weight(linear: str) -> Tensor:
        if linear in source.specs:
            return dequantize(*source.quantized(linear))
        return source.tensor(f"{linear}.weight").float()

    places = published_names(source).places
    return {
        key: place.shaped(place.gather(weight))
        for key, place in places.items()
        if not source.specs.keys().isdisjoint(place.linears)
    }


def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
    """Write the folder; see ``Exporter.write``."""
    weights = _weights(source)
    own = stored_dtype(source)
    default = own if inexact(weights.values(), own) == 0 else "float32"
    tensors, dtype = float_tensors(source, config, default)
    error = inexact([*weights.values(), *(source.tensor(key) for key in source.float_names())], dtype)
    tensors = published_names(source).floats(tensors)
    tensors |= {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    write_folder(source.folder, out, tensors, None, dtype)
    if error:
        return [f"{dtype} was asked for: tensors are rounded by up to {error:.1e} of their largest value"]
    return [] if dtype == own else [f"written in {dtype}, because {own} does not hold the dequantized weights exactly"]


def read(opened: WrittenFolder, name: str) -> Tensor:
    """Return the float32 rows ``[rows, in]`` of a published tensor; ``name`` lacks ``.weight``."""
    places = published(skeleton(opened.folder)).places if is_known(opened.folder) else {}
    key = next((key for key in (f"{name}.weight", name) if key in places), None)
    if key is None:
        return opened.tensor(f"{name}.weight").float()
    return places[key].flat(opened.tensor(key).float())


EXPORTER = Exporter(
    "plain float weights, for any software",
    refuses,
    write,
    lambda source, out, dtype: write_folder(source.folder, out, {}, None, dtype),
    read,
    "Any software that reads Hugging Face folders loads it; nothing of qtool is needed.",
    needs_class=False,
    bits=lambda spec, shape, table: 32.0,
    dtype_may_round=True,
)
