"""``auto-round``: the GPTQ layout with a grid of its own for each linear, which transformers reads with auto-round.

Tensors are those of ``gptq`` without ``g_idx``. The config states the most common grid of the folder, and in
``extra_config``, by full name, each linear that differs from it; a linear in floating point has 16 bits there.

One ``packing_format`` holds for the folder. ``auto_round:auto_gptq`` stores ``zero_point - 1`` and is read by most
software, but for symmetric grids only: with others auto-round stops on a CPU, and a zero point of 0 would carry into
its neighbour. So if one linear is asymmetric, the folder is written as ``auto_round:gptqmodel``, which stores zero
points as they are.
"""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import BITS
from qtool.config.sections import ExportConfig
from qtool.exporters._base import Exporter
from qtool.exporters._float16 import layout_floats
from qtool.exporters._folder import (
    WrittenFolder,
    block_prefixes,
    float_in_blocks,
    float_tensors,
    float_zeros,
    grids,
    names_method,
    packed_places,
    published_names,
    reader,
    stored_dtype,
    unfit,
    write_folder,
)
from qtool.exporters._outside import Runner
from qtool.exporters._published import gathered
from qtool.exporters._tables import in_blocks, names_of, outside_blocks, refused_embedding
from qtool.exporters.gptq import LAYOUT, grid, layout_refuses, packed, packed_bits, unpacked
from qtool.system.errors import InputError
from qtool.system.version import __version__

# number that readers add to a stored zero point, by packing_format
OFFSETS = {"auto_round:auto_gptq": 1, "auto_round:gptqmodel": 0, "auto_round": 0}


def refuses(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Refuse float zero points, packed embeddings, ``Conv1D``, odd shapes, and scales or biases that float16 lacks."""
    return (
        float_zeros(source, "auto-round")
        or refused_embedding(source, "auto-round 0.16 reads no packed embedding")
        or layout_refuses(source, "auto-round")
        or _experts_refuse(source)
        or unfit(source, config)
    )


def _experts_refuse(source: NativeCheckpoint) -> str | None:
    """Return the reason why auto-round would not find experts: it looks for them under the names that most models have.

    Where it finds none, transformers fills them with random numbers, with no error.
    """
    names = published_names(source)
    for name, place in packed_places(source).items():
        leaf = name.rpartition(".")[2]
        linear = next(iter(place.linears))
        if linear in names.experts and leaf not in ("gate_proj", "up_proj", "down_proj"):
            return (
                f"{linear} is {name} in published checkpoints, and auto-round looks for experts named gate_proj, "
                "up_proj and down_proj; export compressed-tensors or gptq instead"
            )
    return None


def section(source: NativeCheckpoint) -> dict[str, Any]:
    """Return the ``quantization_config``: the most common grid, and by full name each linear that differs.

    A packed head is named whatever its grid: auto-round looks for it only then.
    """
    common = Counter(in_blocks(source).values()).most_common(1)[0][0]
    prefixes = dict.fromkeys(prefix.removesuffix(".") for prefix in block_prefixes(source))
    left = float_in_blocks(source, routers=True)
    named = grids(source, packed_places(source))
    named |= {name: spec for name, spec in source.specs.items() if name not in published_names(source).experts}
    outside = names_of(source, *outside_blocks(source))
    listed = {name: grid(spec) for name, spec in named.items() if grid(spec) != grid(common) or name in outside}
    symmetric = all(spec.symmetric for spec in source.specs.values())
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq" if symmetric else "auto_round:gptqmodel",
        **grid(common),
        "data_type": "int",
        "block_name_to_quantize": ",".join(prefixes),
        "extra_config": listed | {name: {"bits": 16} for name in left},
        "quantizer": f"qtool:{__version__}",
    }


def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
    """Write the folder; see ``Exporter.write``."""
    floats, dtype = float_tensors(source, config, stored_dtype(source))
    described = section(source)
    version = 1 if OFFSETS[described["packing_format"]] else 2
    tensors, read = layout_floats(source, floats), reader(source)
    for name, place in packed_places(source).items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed(gathered(place, read), version).items()}
    write_folder(source.folder, out, tensors, described, dtype)
    notes = [f"written as {described['packing_format']}"]
    if version == 2:
        notes.append("asymmetric grids: auto-round reads this folder; other engines may read auto_round:auto_gptq only")
    notes.append("on a CPU, auto-round rounds weights to float16 or bfloat16 before it multiplies")
    return notes


def _settings_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the grid of a linear as auto-round finds it: by name, or else by the first pattern that matches."""
    extra = config.get("extra_config") or {}
    found = name if name in extra else next((key for key in extra if re.search(key, name)), "")
    return {**config, **extra.get(found, {})}


def read(opened: WrittenFolder, name: str) -> Tensor:
    """Return the weight float32 ``[out, in]`` of the linear ``name``, unpacked bit by bit."""
    config = opened.config["quantization_config"]
    settings = _settings_of(config, name)
    kind, bits = config.get("packing_format"), settings.get("bits")
    if (inputs := settings.get("act_bits")) not in (None, 16, 32):
        raise InputError(f"{opened.folder}: {name} rounds activations to {inputs} bits, which qtool does not compute")
    if kind not in OFFSETS or bits not in BITS:
        raise InputError(
            f"{opened.folder}: {name} is in auto-round's format {kind!r} with {bits} bits, which qtool cannot read"
        )
    parts = {part: opened.tensor(f"{name}.{part}") for part in LAYOUT}
    return unpacked(parts, bits, OFFSETS[kind])


EXPORTER = Exporter(
    "auto-round: GPTQ's layout with mixed bits, for transformers",
    refuses,
    write,
    lambda source, out, dtype: write_folder(source.folder, out, {}, section(source), dtype),
    read,
    "Load it with `transformers` and `auto-round` installed.",
    partial(WrittenFolder, marker="scales"),
    recognises=partial(names_method, "auto-round"),
    bits=lambda spec, shape, table: packed_bits(spec, shape[1]),
    reader=Runner("auto_round", ("auto-round", "transformers")),
)
