"""``auto-round``: the GPTQ layout with a grid of its own for each linear, which transformers reads with auto-round.

Tensors are those of ``gptq`` without ``g_idx``. The config names the grid of the folder and, in ``extra_config``, by
full name, each linear that differs from it; what stays in floating point there has 16 bits.

One ``packing_format`` holds for the folder. ``auto_round:auto_gptq`` stores ``zero_point - 1`` and is what most
software reads, but its readers take symmetric grids only (with others auto-round stops on a processor, and a zero point
of 0 would carry into its neighbour). So as soon as one linear is asymmetric the folder is written as
``auto_round:gptqmodel``, which stores zero points as they are.
"""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.checkpoints.native import Source
from qtool.config.quant import BITS, QuantSpec
from qtool.config.sections import ExportConfig
from qtool.exporters._base import Exporter
from qtool.exporters._folder import (
    WrittenFolder,
    float_linears,
    float_tensors,
    float_zeros,
    names_method,
    shared_block_prefix,
    stored_dtype,
    unfit,
    write_folder,
)
from qtool.exporters.gptq import LAYOUT, layout, layout_refuses, unpacked
from qtool.system.errors import InputError
from qtool.system.version import __version__

OFFSETS = {"auto_round:auto_gptq": 1, "auto_round:gptqmodel": 0, "auto_round": 0}  # what readers add to a zero point


def refuses(source: Source, config: ExportConfig) -> str | None:
    """Float zero points, ``Conv1D`` layers, odd shapes, and scales or biases beyond float16."""
    return float_zeros(source, "auto-round") or layout_refuses(source, "auto-round") or unfit(source, config)


def settings(spec: QuantSpec) -> dict[str, Any]:
    """A grid in auto-round's words."""
    return {"bits": spec.num_bits, "group_size": spec.group_size, "sym": spec.symmetric}


def section(source: Source) -> dict[str, Any]:
    """The ``quantization_config``: the most common grid, and by full name whatever differs."""
    common = Counter(source.specs.values()).most_common(1)[0][0]
    prefix = shared_block_prefix(source)
    left = [name for name in float_linears(source) if name.startswith(prefix)]
    differ = {name: settings(spec) for name, spec in source.specs.items() if settings(spec) != settings(common)}
    symmetric = all(spec.symmetric for spec in source.specs.values())
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq" if symmetric else "auto_round:gptqmodel",
        **settings(common),
        "data_type": "int",
        "block_name_to_quantize": prefix.removesuffix("."),
        "extra_config": differ | {name: {"bits": 16} for name in left},
        "quantizer": f"qtool:{__version__}",
    }


def write(source: Source, out: Path, config: ExportConfig) -> list[str]:
    """Write the folder."""
    tensors, dtype = float_tensors(source, config, stored_dtype(source))
    described = section(source)
    version = 1 if OFFSETS[described["packing_format"]] else 2
    for name in source.specs:
        tensors |= layout(source, name, version)
    write_folder(source.folder, out, tensors, described, dtype)
    notes = [f"written as {described['packing_format']}"]
    if version == 2:
        notes.append("asymmetric: read by auto-round itself; other engines may know auto_round:auto_gptq only")
    notes.append("on a processor auto-round multiplies by weights rounded to float16 or bfloat16")
    return notes


def _settings_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The grid of a linear as auto-round finds it: by its name, else by the first pattern that it matches."""
    extra = config.get("extra_config") or {}
    found = name if name in extra else next((key for key in extra if re.search(key, name)), "")
    return {**config, **extra.get(found, {})}


def read(opened: WrittenFolder, name: str) -> Tensor:
    """The weight ``[out, in]``, bit by bit."""
    config = opened.config["quantization_config"]
    kind, bits = config.get("packing_format"), _settings_of(config, name).get("bits")
    if kind not in OFFSETS or bits not in BITS:
        raise InputError(f"{opened.folder}: {name}: auto-round variant {kind!r} with {bits} bits cannot be read here")
    parts = {part: opened.tensor(f"{name}.{part}") for part in LAYOUT}
    return unpacked(parts, bits, OFFSETS[kind])


EXPORTER = Exporter(
    "auto-round: GPTQ's layout with mixed bits, for transformers",
    refuses,
    write,
    read,
    "Load it with `transformers` and `auto-round` installed.",
    partial(WrittenFolder, marker="scales"),
    partial(names_method, "auto-round"),
)
