"""``compressed-tensors``, read by vLLM, and by transformers with that package.

In its format ``pack-quantized`` tensors have the names and layout of a native checkpoint. Only the marker ``weight`` is
left out, and the config has another section. Weights of 8 bits in one symmetric group per row whose inputs are rounded
too (W8A8) are written as ``int-quantized``, which int8 kernels read: ``weight`` int8 and ``weight_scale`` ``[out, 1]``.
Each config group names its format.

Embeddings are ``int-quantized`` too, a byte for each code whatever their grid: transformers reads them, and stops at
packed ones. A head that computes with the same table has a copy of its scales, ``lm_head.weight_scale``, and no codes.
(vLLM reads embeddings as ``pack-quantized``, which is another folder.)

A scale is written in the dtype that it was rounded to. Engines cast scales to the model's dtype, so the model is
written in one that holds them. Known faults of readers are returned as notes.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import BITS, ActivationGrid, QuantSpec
from qtool.config.sections import ExportConfig
from qtool.exporters._activations import ARGUMENTS, grid_of
from qtool.exporters._base import Exporter
from qtool.exporters._folder import (
    WrittenFolder,
    both_names,
    conv1d,
    float_linears,
    float_tensors,
    float_zeros,
    inexact,
    names_method,
    packed_places,
    published_names,
    reader,
    split_rows,
    stored_dtype,
    unfit,
    unpack_bits,
    write_folder,
)
from qtool.exporters._outside import Runner
from qtool.exporters._published import Place, gathered
from qtool.exporters._tables import (
    ScaledFolder,
    embedding_at,
    float_embeddings,
    in_blocks,
    names_of,
    outside_blocks,
    signed,
)
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packed_linear import PackedLinear
from qtool.system.errors import InputError

PACK_QUANTIZED, INT_QUANTIZED = "pack-quantized", "int-quantized"
COPIED = ("weight_packed", "weight_scale", "weight_shape")  # tensors that both formats hold in the same form
MIXED = "mixed-precision"  # the format of a folder whose groups have several
ONE_GRID = (
    "inputs are rounded for each token by its largest absolute value / 127, as in vLLM's int8 kernels; transformers "
    "with compressed-tensors 0.20 divides by 127.5, in the dtype of the model, so that its logits differ a little"
)
NOTES = {  # what users are told of linears that round their inputs, by the format of the linears' group
    INT_QUANTIZED: f"{ONE_GRID}; vLLM computes it on NVIDIA GPUs from Turing to Hopper (not Blackwell) and x86 CPUs",
    PACK_QUANTIZED: f"{ONE_GRID}; vLLM multiplies packed weights by int8 inputs on NVIDIA GPUs from Turing, since its "
    "pull request 46390 of June 2026, but on Hopper it takes inputs of 4-bit groups for FP8, and its kernels for Arm "
    "CPUs read 4-bit weights as int-quantized only",
}


def refuses(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Refuse float zero points, ``Conv1D`` layers, and scales that the engine would change when it casts them."""
    only_linear = "and compressed-tensors replaces nn.Linear only"
    if refusal := float_zeros(source, "compressed-tensors") or conv1d(source, only_linear):
        return refusal
    if refusal := split_rows(source, "compressed-tensors") or _experts_refuse(source) or _embedding_refuses(source):
        return refusal
    scales = (source.tensor(f"{name}.weight_scale") for name in source.specs)
    if config.dtype != "auto" and inexact(scales, config.dtype):
        return (
            f"{config.dtype} does not hold the scales exactly; use dtype: auto, or quantize with "
            f"scale_dtype: {config.dtype}"
        )
    return unfit(source, config)


def _experts_refuse(source: NativeCheckpoint) -> str | None:
    """Return the reason why transformers' reader would compute other experts, or ``None``.

    It expands the experts of all layers by one config group, without zero points, and stops at those that are not
    packed.
    """
    found = {linear: source.specs.get(linear) for linear in published_names(source).experts}
    if not found:
        return None
    first, grid = next(iter(found.items()))
    for linear, spec in found.items():
        if spec is None:
            return (
                f"{linear} is left in floating point, and transformers reads experts from compressed-tensors only if "
                "all are packed; quantize all experts, or export auto-round or dense"
            )
        if not spec.symmetric:
            return (
                f"{linear} has an asymmetric grid, and transformers reads experts from compressed-tensors without zero "
                "points; quantize experts with symmetric: true (quant.overrides), or export gptq-v2 or dense"
            )
        if spec != grid:
            return (
                f"{first} and {linear} have different grids, and transformers reads all experts by one; quantize all "
                "experts alike, or export auto-round or dense"
            )
        if spec.activations is not None:
            return (
                f"{linear} rounds activations, and transformers reads experts from compressed-tensors without doing "
                "that; use the native checkpoint, or leave the experts' inputs in floating point (quant.overrides: "
                "{'*.experts.*': {activations: null}})"
            )
    return None


def _embedding_refuses(source: NativeCheckpoint) -> str | None:
    """Return the reason why transformers, for which packed embeddings are written, would not load them, or ``None``."""
    tables = source.tables.embeddings
    linear = next((name for name, spec in in_blocks(source).items() if not spec.symmetric), None) if tables else None
    if linear is not None:
        return (
            f"{linear} has an asymmetric grid, which transformers with compressed-tensors 0.18 to 0.20 loads only with "
            f"dequantize=True, and that cannot read {tables[0]} (quant.embedding) beside it; quantize with "
            "symmetric: true or quant.embedding: float, or export another format, for example dense"
        )
    for name in tables:
        module = published_names(source).model.get_submodule(name)
        if len(inspect.signature(module.forward).parameters) > 1:
            return (
                f"{name} is quantized (quant.embedding), and compressed-tensors 0.20 calls an embedding with one "
                f"argument, where {type(module).__name__} needs more; quantize with quant.embedding: float, or export "
                "dense"
            )
    return None


def model_dtype(source: NativeCheckpoint) -> str:
    """Return the smallest dtype that holds scales and every other tensor; the checkpoint's own is preferred."""
    names = [*(f"{name}.weight_scale" for name in source.specs), *source.float_names()]
    own = stored_dtype(source)
    candidates = [own, *(d for d in ("float16", "bfloat16") if d != own)]
    return next((d for d in candidates if not inexact((source.tensor(name) for name in names), d)), "float32")


def layout(source: NativeCheckpoint, name: str) -> str:
    """Return the format of the config group of a linear or embedding, by its name in memory."""
    spec, tables = source.specs[name], source.tables.embeddings
    if spec.num_bits == 8 and spec.group_size == -1 and spec.symmetric and spec.activations is not None:
        return INT_QUANTIZED
    # transformers reads packed zero points of nothing, and embeddings are for transformers
    head = bool(tables) and not spec.symmetric and name in outside_blocks(source)
    return INT_QUANTIZED if name in tables or head else PACK_QUANTIZED


def scheme(spec: QuantSpec) -> dict[str, Any]:
    """Return ``spec`` as the ``weights`` of a config group."""
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


def section(source: NativeCheckpoint) -> dict[str, Any]:
    """Return the ``quantization_config``; if there are several grids, each lists its linears by full name.

    The experts of a layer are listed by one pattern: so transformers finds their group. Embeddings are selected by
    class, and come first: readers warn of a head that an earlier group has taken.
    """
    linears: dict[tuple[QuantSpec, str], list[str]] = {}
    names, embeddings = published_names(source), source.tables.embeddings
    for name, place in packed_places(source).items():
        if place.linears.keys().isdisjoint(embeddings):
            first = next(iter(place.linears))
            linears.setdefault((source.specs[first], layout(source, first)), []).append(name)
    for name, spec in source.specs.items():  # as transformers calls it
        if name not in (*embeddings, *names.experts) and name not in (group := linears[spec, layout(source, name)]):
            group.append(name)
    by_class = len(linears) == 1 and not (embeddings and names.experts)
    groups = [(spec, form, ["Linear"] if by_class else _patterns(each)) for (spec, form), each in linears.items()]
    ignored = both_names(float_linears(source, routers=True))
    if embeddings:
        heads = names_of(source, *source.tables.tied)
        groups.insert(0, (source.specs[embeddings[0]], layout(source, embeddings[0]), ["Embedding", *heads]))
        ignored += float_embeddings(source)
    formats = {form for _, form, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": targets,
                "format": form,
                "input_activations": None if spec.activations is None else ARGUMENTS,
                "output_activations": None,
                "weights": scheme(spec),
            }
            for i, (spec, form, targets) in enumerate(groups)
        },
        "ignore": _patterns(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _patterns(names: Iterable[str]) -> list[str]:
    """Return ``names``, those of the experts of a layer as one pattern."""
    found: dict[str, None] = {}
    for name in names:
        before, experts, after = name.partition(".experts.")
        number, _, leaf = after.partition(".")
        if number.isdigit() and leaf:
            name = f"re:{re.escape(before + experts)}\\d+{re.escape('.' + leaf)}$"
        found[name] = None
    return list(found)


def _parts(source: NativeCheckpoint, place: Place, read: Callable[[str], QuantizedWeight]) -> dict[str, Tensor]:
    """Return the tensors of a published linear or embedding by their names there."""
    first, whole = next(iter(place.linears)), place.whole
    if layout(source, first) == INT_QUANTIZED:
        return signed(gathered(place, read))
    if whole is not None:
        zeros = [] if source.specs[whole].symmetric else ["weight_zero_point"]
        return {part: source.tensor(f"{whole}.{part}") for part in (*COPIED, *zeros)}
    layer = PackedLinear.from_quantized(gathered(place, read), None)
    return {part: tensor.contiguous() for part, tensor in layer.named_buffers() if part != "weight"}


def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
    """Write the folder; see ``Exporter.write``."""
    floats, dtype = float_tensors(source, config, model_dtype(source))
    names, read = published_names(source), reader(source)
    tensors, tables = names.floats(floats), dict[str, Tensor]()
    for name, place in packed_places(source).items():
        parts = {f"{name}.{part}": tensor for part, tensor in _parts(source, place, read).items()}
        tensors |= parts
        if source.tables.embeddings and place.linears.keys() <= set(source.tables.embeddings):
            tables |= parts
    for head, table in source.tables.tied.items():
        for there, here in zip(names.modules(head), names.modules(table), strict=True):
            copied = {
                key.replace(here, there): each for key, each in tables.items() if key.startswith(f"{here}.weight_")
            }
            tensors |= {key: each.clone() for key, each in copied.items()}
    write_folder(source.folder, out, tensors, section(source), dtype)
    return _notes(source, config, dtype, tables)


def _notes(source: NativeCheckpoint, config: ExportConfig, dtype: str, tables: Mapping[str, Tensor]) -> list[str]:
    """Return the notes of a written folder; ``tables`` are the tensors of its packed embeddings."""
    own, notes = stored_dtype(source), []
    if dtype != own and config.dtype == "auto":
        notes.append(
            f"the model is written in {dtype}, because {own} does not hold its scales; "
            f"for a smaller file, quantize with scale_dtype: {own}"
        )
    linears = {name: spec for name, spec in source.specs.items() if name not in source.tables.embeddings}
    forms = {(spec, layout(source, name)) for name, spec in linears.items()}
    specs = {spec for spec, _ in forms}
    if not published_names(source).experts.keys().isdisjoint(source.specs):
        notes.append("transformers expands experts while it loads them, and rounds them to the dtype of their scales")
    if any(spec.num_bits == 3 for spec in specs):
        notes.append(
            "3-bit codes are packed without gaps: readers need compressed-tensors 0.18 or later; check that vLLM reads "
            "them on your GPU"
        )
    several = len(forms) + bool(tables) > 1
    if any(form == PACK_QUANTIZED and not spec.symmetric for spec, form in forms):
        alone = "only with CompressedTensorsConfig(dequantize=True), which multiplies in the dtype of the scales"
        way = "does not load this folder, which is for vLLM" if several else f"loads this folder {alone}"
        notes.append(f"asymmetric grids: transformers with compressed-tensors 0.18 to 0.20 {way}")
    rounding = sorted({form for spec, form in forms if spec.activations is not None})
    notes += [ONE_GRID] * bool(rounding) if tables else [NOTES[form] for form in rounding]
    if tables:
        count = sum(each.numel() for key, each in tables.items() if key.endswith(".weight"))
        bits = 8 * sum(each.nbytes for each in tables.values()) / count
        notes.append(
            f"embeddings take {bits:.2f} bits per weight: they are written as int-quantized, a byte for each code, for "
            "transformers with compressed-tensors, which stops at packed ones; vLLM reads packed ones only, and so not "
            "this folder: for vLLM, quantize with quant.embedding: float"
        )
    if several:
        notes.append("several grids: never load this with dequantize=True, which applies the first grid to all linears")
    return notes


def _matches(target: str, name: str) -> bool:
    """Return whether a target of a config group selects a module by its name or by a pattern."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _group(opened: WrittenFolder, name: str) -> dict[str, Any]:
    """Return the config group of the linear or embedding ``name``, by name or else by class, with its format.

    Raises:
        InputError: there is none, or it is one that qtool cannot read.
    """
    config = opened.config["quantization_config"]
    groups = list(config.get("config_groups", {}).values())
    kind = "Linear" if embedding_at(opened.folder, name) is None else "Embedding"
    selected = [g for g in groups if any(_matches(target, name) for target in g["targets"])]
    selected += [g for g in groups if kind in g["targets"]]
    group: dict[str, Any] = next(iter(selected), {})
    weights, form = group.get("weights") or {}, group.get("format") or config.get("format")
    known = config.get("format") in (PACK_QUANTIZED, INT_QUANTIZED, MIXED) and weights.get("num_bits") in BITS
    held = form in (PACK_QUANTIZED, INT_QUANTIZED)
    if not known or not held or weights.get("type", "int") != "int":
        raise InputError(f"{opened.folder}: {name} is in a format of compressed-tensors that qtool cannot read")
    return {**group, "format": form}


def rounds(opened: WrittenFolder, name: str) -> ActivationGrid | None:
    """Return the grid to which readers round the input of the linear ``name``."""
    group = _group(opened, name)
    try:
        if group.get("output_activations") is not None or opened.config["quantization_config"].get("kv_cache_scheme"):
            raise ValueError("it rounds outputs, or keys and values")
        return grid_of(group.get("input_activations"))
    except ValueError as error:
        raise InputError(f"{opened.folder}: {name}: {error}, which qtool does not compute") from None


def read(opened: WrittenFolder, name: str) -> Tensor:
    """Return the weight float32 ``[out, in]`` of the linear ``name``; packed codes are unpacked bit by bit."""
    group = _group(opened, name)
    weights = group["weights"]
    if group["format"] == INT_QUANTIZED:
        parts = ["weight_scale"] if weights.get("symmetric", True) else ["weight_scale", "weight_zero_point"]
        grid = {part: opened.tensor(f"{name}.{part}") for part in parts}
        assert isinstance(opened, ScaledFolder)
        opened.check_copies(name, grid, group["targets"])
        scale = grid["weight_scale"].float().unsqueeze(-1)
        codes: Tensor = opened.tensor(f"{name}.weight").float().unflatten(1, (scale.shape[1], -1))
        if "weight_zero_point" in grid:
            codes.sub_(grid["weight_zero_point"].unsqueeze(-1))
        return codes.mul_(scale).flatten(1)
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


def bits(spec: QuantSpec, shape: tuple[int, int], table: bool) -> float:
    """Return the bits per weight of a linear as in the checkpoint; a code and a zero point of an embedding have 8."""
    as_bytes = spec.model_copy(update={"num_bits": 8}) if table else spec
    return as_bytes.bits_per_weight(shape[1])


def float_dtype(specs: Iterable[QuantSpec], own: str) -> str:
    """Return ``own`` if it holds the scales, else float32: the other dtype of 16 bits seldom holds a model's values."""
    return own if {spec.scale_dtype for spec in specs} <= {own} else "float32"


EXPORTER = Exporter(
    "compressed-tensors pack-quantized and int-quantized, for vLLM and transformers",
    refuses,
    write,
    lambda source, out, dtype: write_folder(source.folder, out, {}, section(source), dtype),
    read,
    "Load it with vLLM, or with `transformers` and `compressed-tensors` installed.",
    ScaledFolder,
    recognises=partial(names_method, "compressed-tensors"),
    rounds=rounds,
    needs_class=False,
    bits=bits,
    float_dtype=float_dtype,
    reader=Runner("compressed_tensors", ("compressed-tensors",)),
)
