"""``compressed-tensors`` (``pack-quantized``): what vLLM reads at 2, 3, 4 and 8 bits, and transformers with the
``compressed-tensors`` package.

Our tensors already have its names and layout; only the marker goes and the config section is another. Hazards that a
reader may meet are returned as notes. The scale is written in the dtype it was rounded to.
"""

import re
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
    conv1d,
    float_linears,
    float_tensors,
    float_zeros,
    inexact,
    names_method,
    stored_dtype,
    unfit,
    unpack_bits,
    write_folder,
)
from qtool.quant.packed_linear import PARTS
from qtool.system.errors import InputError


def refuses(source: Source, config: ExportConfig) -> str | None:
    """Float zero points, ``Conv1D`` layers, and scales that the engine would change when it casts them."""
    only_linear = "and compressed-tensors replaces nn.Linear only"
    if refusal := float_zeros(source, "compressed-tensors") or conv1d(source, only_linear):
        return refusal
    scales = (source.tensor(f"{name}.weight_scale") for name in source.specs)
    if config.dtype != "auto" and inexact(scales, config.dtype):
        return (
            f"scales are not held exactly by {config.dtype}; use dtype: auto, or quantize with "
            f"scale_dtype: {config.dtype}"
        )
    return unfit(source, config)


def model_dtype(source: Source) -> str:
    """The smallest dtype that holds scales and every other tensor: engines cast scales to the model's dtype."""
    names = [*(f"{name}.weight_scale" for name in source.specs), *source.float_names()]
    own = stored_dtype(source)
    candidates = [own, *(d for d in ("float16", "bfloat16") if d != own)]
    return next((d for d in candidates if not inexact((source.tensor(name) for name in names), d)), "float32")


def scheme(spec: QuantSpec) -> dict[str, Any]:
    """The arguments of one group of weights."""
    strategy: dict[str, Any] = {"strategy": "channel", "group_size": None}
    if spec.group_size != -1:
        strategy = {"strategy": "group", "group_size": spec.group_size}
    return {
        "num_bits": spec.num_bits,
        "type": "int",
        "symmetric": spec.symmetric,
        **strategy,
        "dynamic": False,
        "actorder": None,
    }


def section(source: Source) -> dict[str, Any]:
    """The ``quantization_config``; with several grids, each lists its linears by full name."""
    by_spec: dict[QuantSpec, list[str]] = {}
    for name, spec in source.specs.items():
        by_spec.setdefault(spec, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(by_spec) == 1 else names,
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "weights": scheme(spec),
        }
        for i, (spec, names) in enumerate(by_spec.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": float_linears(source),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def write(source: Source, out: Path, config: ExportConfig) -> list[str]:
    """Write the folder."""
    own = stored_dtype(source)
    tensors, dtype = float_tensors(source, config, model_dtype(source))
    for name, spec in source.specs.items():
        for part in PARTS[1:]:
            if part != "weight_zero_point" or not spec.symmetric:
                tensors[f"{name}.{part}"] = source.tensor(f"{name}.{part}")
    write_folder(source.folder, out, tensors, section(source), dtype)
    notes = []
    if dtype != own and config.dtype == "auto":
        notes.append(
            f"the model is written in {dtype}, because {own} does not hold its scales; "
            f"quantize with scale_dtype: {own} for a smaller file"
        )
    specs = set(source.specs.values())
    if any(spec.num_bits == 3 for spec in specs):
        notes.append("3-bit codes are dense: readers need compressed-tensors 0.18 or later; verify vLLM on your GPU")
    if not all(spec.symmetric for spec in specs):
        notes.append(
            "asymmetric: transformers with compressed-tensors 0.18 to 0.20 loads this only with "
            "CompressedTensorsConfig(dequantize=True), which multiplies in the dtype of the scales"
        )
    if len(specs) > 1:
        notes.append("several grids: never load this with dequantize=True, which applies the first grid to all")
    return notes


def _matches(target: str, name: str) -> bool:
    """Whether a target of a config group means the linear ``name``: by class, by pattern or by name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in ("Linear", name)


def read(opened: WrittenFolder, name: str) -> Tensor:
    """The weight ``[out, in]``, bit by bit."""
    config = opened.config["quantization_config"]
    groups = list(config.get("config_groups", {}).values())
    weights = next((g["weights"] for g in groups if any(_matches(t, name) for t in g["targets"])), None)
    if config.get("format") != "pack-quantized" or weights is None or weights["num_bits"] not in BITS:
        raise InputError(f"{opened.folder}: {name} is in a compressed-tensors format that cannot be read here")
    rows, columns = opened.tensor(f"{name}.weight_shape").tolist()
    scale = opened.tensor(f"{name}.weight_scale").float()
    codes = unpack_bits(opened.tensor(f"{name}.weight_packed"), weights["num_bits"], columns)
    if weights["symmetric"]:
        zeros = scale.new_full(scale.shape, 2 ** (weights["num_bits"] - 1))
    else:
        words = opened.tensor(f"{name}.weight_zero_point").T.contiguous()
        zeros = unpack_bits(words, weights["num_bits"], rows).T
    repeat = columns // scale.shape[1]
    return (codes - zeros.repeat_interleave(repeat, 1)) * scale.repeat_interleave(repeat, 1)


EXPORTER = Exporter(
    "compressed-tensors pack-quantized, for vLLM and transformers",
    refuses,
    write,
    read,
    "Load it with vLLM, or with `transformers` and `compressed-tensors` installed.",
    partial(WrittenFolder, marker="weight_packed"),
    partial(names_method, "compressed-tensors"),
)
