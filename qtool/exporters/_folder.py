"""The parts that export formats share: writing and reading folders, float tensors, and reasons to refuse."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from qtool.checkpoints import side_files, written_config
from qtool.checkpoints.files import SafetensorsFolder, write_json, write_shards
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantSpec
from qtool.config.sections import ExportConfig
from qtool.exporters._published import Place, Published, linears_only, published
from qtool.models import described
from qtool.models.experts import fused_parameters
from qtool.models.folders import check_files, check_readable, read_config
from qtool.models.loaded import most_common
from qtool.quant.affine import QuantizedWeight

CHUNK_NUMBERS = 1 << 22  # number of weights unpacked or compared at once
NONE: Mapping[str, Tensor] = {}  # no tensors: a folder is written without its weights


class WrittenFolder:
    """A written folder of safetensors files, opened once; a format with other files has a subclass.

    Tensors and linears have the names of the files, which are those of published checkpoints.
    """

    def __init__(self, folder: Path, marker: str = "") -> None:
        """Open ``folder``. Each packed linear ``p`` has a tensor ``p.<marker>``; ``""``: the format packs no linear."""
        self.folder, self._marker = folder, marker
        check_readable(folder)
        self._files = SafetensorsFolder(folder)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._files.names)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor outside quantized weights, with the values of the float model."""
        return self._files.tensor(name)

    def same(self, name: str, tensor: Tensor) -> bool:
        """Return whether the files hold the values of ``tensor``, which is outside quantized weights."""
        return torch.equal(tensor.float(), self.tensor(name).float())

    def packed(self) -> set[str]:
        """Return the names of the quantized linears."""
        return {name.rpartition(".")[0] for name in self.names() if self._marker and name.endswith(f".{self._marker}")}

    def dtype(self) -> torch.dtype:
        """Return the most common dtype of the float tensors, in which the model computes by default."""
        return most_common(check_files(self.folder))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config: the content of ``config.json``; a format with metadata of its own adds that."""
        return read_config(self.folder)


def quantization_section(folder: Path) -> dict[str, Any]:
    """Return the ``quantization_config`` section of a folder's ``config.json``; empty if it has none."""
    section: dict[str, Any] = read_config(folder).get("quantization_config") or {}
    return section


def names_method(method: str, folder: Path) -> bool:
    """Return whether the ``quant_method`` of a folder's quantization config is ``method``."""
    return quantization_section(folder).get("quant_method") == method


def write_folder(
    folder: Path,
    out: Path,
    tensors: Mapping[str, Tensor],
    section: dict[str, Any] | None,
    dtype: str,
    *,
    any_link: bool = False,
) -> None:
    """Write shards of ``tensors``, the config of ``folder`` with ``section`` and ``dtype``, and its other files.

    ``tensors`` have published names; without them, only what is beside them is written. ``section`` becomes the
    ``quantization_config``. ``any_link`` is as in ``side_files.copy``.
    """
    side_files.copy(folder, out, any_link=any_link)
    config = {key: value for key, value in read_config(folder).items() if key != "quantization_config"}
    own_head = not head_names(folder).isdisjoint(tensors)
    config = written_config.written(config, None, dtype, False if own_head else None)
    write_json(out / "config.json", config | ({"quantization_config": section} if section else {}))
    if tensors:
        write_shards(dict(tensors), out)


def published_names(source: NativeCheckpoint) -> Published:
    """Return the published names of the tensors of a checkpoint; one without a class has the names of its files."""
    if has_class(source):
        return published(skeleton(source.folder))
    return published(linears_only(tuple(source.shapes.items())))


def head_names(folder: Path) -> set[str]:
    """Return the names of the weight of the output head, in memory and published; none if it is the embedding's."""
    if not is_known(folder):
        return set()
    model: Any = skeleton(folder)
    head = model.get_output_embeddings()
    found = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    return {*found[:1], *map(published(model).name, found[:1])}


def float_tensors(source: NativeCheckpoint, config: ExportConfig, default: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors outside quantized weights in ``config.dtype``, by name in memory, and the name of that dtype.

    ``auto`` is ``default``; then a tensor that ``default`` does not hold exactly keeps its dtype: for example a norm
    that a method changed.
    """
    name = default if config.dtype == "auto" else config.dtype
    tensors = {key: source.tensor(key) for key in source.float_names()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not (config.dtype == "auto" and inexact([tensor], name)):
            tensors[key] = tensor.to(getattr(torch, name))
    return tensors, name


def unfit(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Return the reason why ``config.dtype`` cannot be used, a tensor that it does not hold exactly, or ``None``."""
    if config.dtype == "auto":
        return None
    if refusal := overflows(source, config, source.float_names()):
        return refusal
    for name in source.float_names():
        tensor = source.tensor(name)
        if tensor.is_floating_point() and inexact([tensor], config.dtype):
            return f"{config.dtype} does not hold {name} exactly; use dtype: auto"
    return None


def overflows(source: NativeCheckpoint, config: ExportConfig, names: Iterable[str]) -> str | None:
    """Return the reason why ``config.dtype`` cannot be used, a tensor or linear that it makes infinite, or ``None``."""
    if config.dtype == "auto":
        return None
    dtype: torch.dtype = getattr(torch, config.dtype)
    for name in names:
        largest = source.largest(name)
        if torch.tensor(largest, dtype=torch.float64).to(dtype).isinf():
            return (
                f"{name} has values of up to {largest:.6g}, and {config.dtype} holds none above "
                f"{torch.finfo(dtype).max:g}; use dtype: auto"
            )
    return None


def float_zeros(source: NativeCheckpoint, format: str) -> str | None:
    """Return the reason why ``format`` cannot hold ``source``, zero points between codes, or ``None``."""
    name = next((name for name, spec in source.specs.items() if spec.float_zero), None)
    if name is None:
        return None
    return (
        f"{name} has zero points between codes (float_zero), and {format} does not hold those exactly; "
        "export dense instead, or quantize with float_zero: false"
    )


def stored_dtype(source: NativeCheckpoint) -> str:
    """Return the dtype that the checkpoint's config names."""
    return str(source.config.get("dtype", "float32"))


def inexact(tensors: Iterable[Tensor], dtype: str) -> float:
    """Return the largest change by rounding to ``dtype``, relative to the largest value of its tensor; 0 if exact."""
    worst = 0.0
    for tensor in tensors:
        change = largest = 0.0
        for some in tensor.flatten().split(CHUNK_NUMBERS) if tensor.numel() else ():
            part = some if some.dtype == torch.float64 else some.float()
            change = max(change, float((part.to(getattr(torch, dtype)).to(part) - part).abs().amax()))
            largest = max(largest, float(part.abs().amax()))
        if change:
            worst = max(worst, change / largest)
    return worst


def row_parts(tensor: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of ``tensor``, a few at a time: a table of embeddings may have 2**28 numbers."""
    size = max(1, CHUNK_NUMBERS // max(1, tensor[:1].numel()))
    for start in range(0, len(tensor), size):
        yield slice(start, start + size)


def skeleton(folder: Path) -> nn.Module:
    """Return the float model of a folder's ``config.json`` on the meta device. It is cached: do not change it."""
    return _skeleton(folder, (folder / "config.json").read_bytes())


@lru_cache(maxsize=2)  # called once per linear; with the text as key, a folder that was written anew is read anew
def _skeleton(folder: Path, config_text: bytes) -> nn.Module:
    model: nn.Module = described.skeleton(folder)
    return model


def is_known(folder: Path) -> bool:
    """Return whether transformers has a class for the model type of a folder."""
    return read_config(folder).get("model_type") in CONFIG_MAPPING


def has_class(source: NativeCheckpoint) -> bool:
    """Return whether transformers has a class with the linears of ``source``; one made without ``model.free`` has."""
    if not source.free:
        return True
    if not is_known(source.folder):
        return False
    model = skeleton(source.folder)
    return source.specs.keys() <= {*dict(model.named_modules()), *fused_parameters(model)}


def transposed(source: NativeCheckpoint) -> set[str]:
    """Return the names of linears whose weight the float model stores as ``[in, out]`` (GPT-2's ``Conv1D``)."""
    if not has_class(source):
        return set()
    return {name for name, module in skeleton(source.folder).named_modules() if isinstance(module, Conv1D)}


def packed_tables(source: NativeCheckpoint) -> dict[str, str]:
    """Return the quantized tables: the name of each embedding and of an untied head -> the key of its grid."""
    # in a checkpoint of model.free, the head is a linear that an override has named
    heads = [] if source.free else [name for name in source.specs if f"{name}.weight" in head_names(source.folder)]
    return {**dict.fromkeys(source.tables.embeddings, "quant.embedding"), **dict.fromkeys(heads, "quant.head")}


def regroup(source: NativeCheckpoint, name: str) -> str:
    """Return what to do about groups of ``name`` that are no multiple of 32."""
    if (key := packed_tables(source).get(name)) is not None:
        return f"give it a multiple of 32 as group_size, or leave it in floating point ({key})"
    return "quantize with a multiple of 32 as group_size, for all linears or for this one in quant.overrides"


def conv1d(source: NativeCheckpoint, why: str) -> str | None:
    """Return the reason to refuse ``source`` if a linear is a ``Conv1D``, or ``None``; ``why`` completes the reason."""
    flipped = transposed(source)
    return f"{min(flipped)} is a Conv1D, {why}; export dense instead" if flipped else None


def float_linears(source: NativeCheckpoint, *, routers: bool = False) -> dict[str, list[str]]:
    """Return the linears that stay in floating point, among them the output head: name in memory -> published names.

    With ``routers``, also other modules with a matrix as ``weight`` that is no embedding: they choose experts.
    """
    if not has_class(source):  # every matrix: a reader that meets the name of another module passes over it
        matrices = [
            name for name in source.float_names() if name.endswith(".weight") and source.tensor(name).dim() == 2
        ]
        return {name.removesuffix(".weight"): [name.removesuffix(".weight")] for name in matrices}
    names = published_names(source)
    read = {*source.specs, *names.embeddings, *source.tables.tied}
    found = [name for name in names.rows if name not in read]
    found += [
        name
        for name, module in skeleton(source.folder).named_modules()
        if routers
        and not isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.dim() == 2
    ]
    return {linear: names.modules(linear) for linear in found}


def both_names(names: Mapping[str, list[str]]) -> list[str]:
    """Return the published names and those in memory: engines compare the first, and transformers the second."""
    return list(dict.fromkeys(each for linear, published in names.items() for each in (*published, linear)))


def packed_places(source: NativeCheckpoint, places: Mapping[str, Place] | None = None) -> dict[str, Place]:
    """Return where the files of an export hold quantized linears, by published name, without ``.weight``.

    ``places`` are those of all linears, by default the published ones.
    """
    found: dict[str, list[tuple[str, Place]]] = {}
    for key, place in (published_names(source).places if places is None else places).items():
        found.setdefault(next(iter(place.linears)), []).append((key.removesuffix(".weight"), place))
    return {name: place for linear in source.specs for name, place in found.get(linear, [])}


def grids(source: NativeCheckpoint, places: Mapping[str, Place]) -> dict[str, QuantSpec]:
    """Return the grid of each of ``places``, by name."""
    return {name: source.specs[next(iter(place.linears))] for name, place in places.items()}


def reader(source: NativeCheckpoint) -> Callable[[str], QuantizedWeight]:
    """Return ``source.quantized`` with a memory of the last linears, whose rows may lie in many published tensors."""
    return lru_cache(maxsize=4)(source.quantized)


def split_rows(source: NativeCheckpoint, format: str) -> str | None:
    """Return the reason why ``format`` cannot pack each published linear by itself, or ``None``."""
    names = published_names(source)
    model: Any = names.model
    for linear, spec in source.specs.items():
        for key in names.keys(linear):
            place = names.places.get(key)
            if place is None or not (place.plain and key.endswith(".weight")):
                return (
                    f"{linear} is one tensor, {key}, in published checkpoints of {model.config.model_type}, and "
                    f"readers of {format} look for a linear of each expert; export dense instead"
                )
            other = next((other for other in place.linears if source.specs.get(other) != spec), None)
            if other is not None:
                return (
                    f"{linear} and {other} are one tensor, {key}, in published checkpoints, and have different grids; "
                    "export dense instead, or give both the same grid (quant.overrides)"
                )
    return None


def block_prefixes(source: NativeCheckpoint) -> tuple[str, str]:
    """Return the prefixes of the names of all decoder blocks, such as ``model.layers.``: in memory, and published."""
    first = next(name for name in source.specs if any(part.isdigit() for part in name.split(".")))
    found = []
    for name in (first, published_names(source).modules(first)[0]):
        parts = name.split(".")
        found.append(".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())]) + ".")
    return found[0], found[1]


def float_in_blocks(source: NativeCheckpoint, *, routers: bool = False) -> list[str]:
    """Return ``both_names`` of ``float_linears`` of the decoder blocks."""
    own, _ = block_prefixes(source)
    found = float_linears(source, routers=routers)
    return both_names({name: published for name, published in found.items() if name.startswith(own)})


def unpack_bits(words: Tensor, num_bits: int, count: int) -> Tensor:
    """Unpack ``count`` codes of each row of ``words`` int32 ``[rows, w]`` bit by bit, with no code of the packer.

    The result is float32 ``[rows, count]``. Few rows are unpacked at once, as a bit takes a byte meanwhile.
    """
    found = torch.empty(len(words), count)
    stream = words.numpy().astype("<i4").view(np.uint8)
    for rows in row_parts(found):
        bits = np.unpackbits(stream[rows], axis=1, bitorder="little")[:, : count * num_bits]
        codes = sum(bits[:, i::num_bits] << i for i in range(num_bits))
        found[rows] = torch.from_numpy(codes)
    return found
