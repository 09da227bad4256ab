"""The native checkpoint: writing a model as one, and reading it tensor by tensor.

The folder is a Hugging Face model folder: ``config.json`` with ``quantization_config``, safetensors shards, tokenizer
files. ``qtool.json`` is written last, so its presence means that the folder is complete. A quantized linear ``p`` of
``b`` bits is ``p.weight_packed`` int32 ``[out, ceil(in b / 32)]``, ``p.weight_scale`` ``[out, groups]``,
``p.weight_shape`` int64 ``[2]``, and, if the grid is asymmetric, ``p.weight_zero_point`` int32
``[ceil(out b / 32), groups]`` (packed along rows): the names and layout of ``pack-quantized`` in compressed-tensors.
On a grid of GGUF scales are stored by blocks: ``p.weight_scale`` and ``p.weight_minimum``, float16 ``[out, blocks]``,
and the integers of groups, ``p.weight_scale_integers`` and ``p.weight_minimum_integers``, int32 (packed along rows).
``p.weight`` is one byte that makes other loaders stop.
"""

import json
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtool.checkpoints import side_files, written_config
from qtool.checkpoints.files import (
    SafetensorsFolder,
    folder_bytes,
    shard_name,
    write_index,
    write_json,
    write_shard,
    write_shards,
)
from qtool.checkpoints.quantization_config import FREE, PackedTables, section_of, specs_of, tables_of
from qtool.config.quant import SCALE_BITS, QuantSpec
from qtool.models.folders import check_readable, read_config
from qtool.models.loaded import LoadedModel
from qtool.models.tables import NO_TABLES, Tables
from qtool.quant.affine import QuantizedWeight, dequantize
from qtool.quant.packed_embedding import TiedLinear
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.packed_weight import PARTS
from qtool.system import memory
from qtool.system.errors import InputError, RunError
from qtool.system.tensors import dtype_name

MANIFEST = "qtool.json"  # name of the manifest's file


def as_stored(tensors: dict[str, Tensor], packed: Collection[str], loaded: LoadedModel) -> dict[str, Tensor]:
    """Return tensors of a model as its checkpoint stores them: on the CPU, float tensors in the dtype of their file.

    ``packed`` are the names of quantized linears, whose parts stay unchanged. Of tied tensors the first is kept:
    transformers ties them again when it loads the checkpoint.

    Raises:
        RunError: a file of the float model was removed since the model was loaded.
    """
    parts = {f"{name}.{part}" for name in packed for part in PARTS}
    originals = SafetensorsFolder(loaded.folder)
    pages = memory.Pages()
    stored: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen:
            continue
        seen.add(key)
        if name not in parts and tensor.is_floating_point():
            if name in loaded.file_dtypes and name not in originals.names:
                raise RunError(f"{name} is no longer in {loaded.folder}; put its file back and run the command again")
            # the file's own tensor, unless a method changed it: the model may compute in a less exact dtype
            own = originals.tensor(name) if name in originals.names else tensor.to(loaded.storage_dtype)
            if not torch.equal(own.to(tensor), tensor):
                own = tensor.to(own.dtype)
            if torch.equal(own.to(tensor), tensor):  # otherwise the changed value needs a more exact dtype
                pages.drop(own, tensor)  # they can be read from the file again
                tensor = own
        stored[name] = tensor.detach().cpu().contiguous()
    return stored


def save(folder: Path, loaded: LoadedModel, specs: dict[str, QuantSpec], tables: Tables = NO_TABLES) -> None:
    """Write a checkpoint without its manifest and model card into ``folder``.

    ``specs`` are the grids of all quantized linears and embeddings; ``tables`` are the embeddings and the head.

    Shards of blocks that a run has written there already are kept; the other tensors are added.

    Raises:
        RunError: a shard that was read back differs from what was written.
    """
    rest = folder / shard_name(0, len(loaded.blocks()) + len(tables.of_method))
    rest.unlink(missing_ok=True)  # an earlier start was killed after it wrote this shard
    written = SafetensorsFolder(folder)
    tensors = {k: v for k, v in loaded.model.state_dict().items() if k not in written.names and v.device.type != "meta"}
    tensors = as_stored(tensors, specs, loaded)
    if written.names:
        write_shard(tensors, rest)
        write_index(folder)
    else:
        write_shards(tensors, folder)
    describe(folder, loaded, specs, tables)


def as_listed(tables: Tables) -> PackedTables:
    """Return the names of the packed embeddings of ``tables``, of the heads that read them, and of a packed head."""
    head = "" if tables.head is None else tables.head.name
    return PackedTables(tuple(target.name for target in tables.embeddings), tables.tied, head)


def describe(folder: Path, loaded: LoadedModel, specs: dict[str, QuantSpec], tables: Tables = NO_TABLES) -> None:
    """Write what a checkpoint has beside its weights: the config, and the float model's own other files.

    Raises:
        InputError: one of those files is no regular file, or is a link that leads elsewhere.
    """
    section = section_of(specs, as_listed(tables))
    config = json.loads(loaded.model.config.to_json_string()) | {"quantization_config": section}
    source, dtype = read_config(loaded.folder), dtype_name(loaded.storage_dtype)
    config = written_config.written(config, source, dtype, is_tied(loaded.model))
    write_json(folder / "config.json", dict(sorted(config.items())))
    side_files.copy(loaded.folder, folder)


def is_tied(model: PreTrainedModel) -> bool | None:
    """Return whether the output head of a model computes with its embedding; ``None`` if it has no such layers."""
    if isinstance(_ends(model)[0], TiedLinear):
        return True
    head, table = (getattr(layer, "weight", None) for layer in _ends(model))
    if head is None or table is None:
        return None
    return head is table or (head.device.type != "meta" and head.data_ptr() == table.data_ptr())


def _ends(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the output head and the embedding of a model."""
    try:
        return model.get_output_embeddings(), model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None, None


class NativeCheckpoint:
    """A native checkpoint, read tensor by tensor by exporters and by ``qtool verify``. No model is built."""

    def __init__(self, folder: Path) -> None:
        """Open ``folder``, and read its config; shards are opened when a tensor is asked for."""
        self.folder = folder
        check_readable(folder)
        self.config = read_config(folder)
        if "quantization_config" not in self.config:
            raise InputError(f"{folder} is a float model; a qtool checkpoint is needed (qtool ptq makes one)")
        try:
            self.specs = specs_of(self.config["quantization_config"])
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None

    @property
    def tables(self) -> PackedTables:
        """The packed embeddings, and the heads that read them."""
        return tables_of(self.config["quantization_config"])

    @property
    def free(self) -> bool:
        """True if the checkpoint was made from a model's files alone; transformers may have no class for it."""
        return FREE in self.config.get("quantization_config", {})

    @property
    def stacked(self) -> list[str]:
        """The linears that hold the experts of a layer, of a checkpoint that was made from files alone."""
        return list(self.config["quantization_config"][FREE]["experts"]) if self.free else []

    @cached_property
    def _files(self) -> SafetensorsFolder:
        return SafetensorsFolder(self.folder)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape ``(out, in)`` of each quantized linear."""
        found = {}
        for name in self.specs:
            rows, columns = self.tensor(f"{name}.weight_shape").tolist()
            found[name] = rows, columns
        return found

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as it is stored."""
        if name not in self._files.names:
            raise InputError(f"{self.folder} lacks the tensor {name}; the checkpoint is incomplete")
        return self._files.tensor(name)

    def quantized(self, name: str) -> QuantizedWeight:
        """Return codes, scale and zero point of the linear ``name``."""
        spec = self.specs[name]
        out_features, in_features = self.tensor(f"{name}.weight_shape").tolist()
        layer = PackedLinear(in_features, out_features, spec)
        for part, _ in list(layer.named_buffers()):
            setattr(layer, part, self.tensor(f"{name}.{part}"))
        layer.check(f"{self.folder}: {name}")
        return layer.quantized

    def largest(self, name: str) -> float:
        """Return the largest absolute value of a tensor, or of the dequantized weight of a linear; of integers 0.

        Of linears all of whose values fit into every dtype it is an upper bound.
        """
        if name in self.specs:
            # twice the range of codes is more than any code is away from its zero point
            blocks = self.specs[name].blocks
            factor = 2 * self.specs[name].qmax * (1 if blocks is None else blocks.largest)
            bound = float(self.tensor(f"{name}.weight_scale").double().abs().max()) * factor
            if bound <= torch.finfo(torch.float16).max:
                return bound
            return float(dequantize(*self.quantized(name)).abs().max())
        tensor = self.tensor(name)
        return float(tensor.abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0

    def float_names(self) -> list[str]:
        """Return the names of all tensors outside quantized weights, among them the biases of quantized linears."""
        packed = {f"{name}.{part}" for name in self.specs for part in PARTS}
        return [name for name in self._files.names if name not in packed]

    def num_bytes(self) -> int:
        """Return the size of the safetensors files, in bytes."""
        return folder_bytes(self.folder)


def worst_scales(specs: dict[str, QuantSpec]) -> dict[str, Tensor]:
    """Return scales that need every bit of their dtype, because the real ones, which come later, may need them too."""
    worst = {dtype: 1 + torch.finfo(getattr(torch, dtype)).eps for dtype in SCALE_BITS}
    return {f"{name}.weight_scale": torch.tensor([worst[spec.scale_dtype]]) for name, spec in specs.items()}


class PlannedCheckpoint(NativeCheckpoint):
    """The checkpoint that a run is going to make, for the checks of exporters; its scales are not known yet."""

    def __init__(
        self,
        loaded: LoadedModel,
        specs: dict[str, QuantSpec],
        shapes: dict[str, tuple[int, int]],
        tables: Tables = NO_TABLES,
    ) -> None:
        """Describe the checkpoint of ``loaded`` with the grids ``specs`` for weights of the shapes ``(out, in)``."""
        self.folder = loaded.folder
        self.config = {"dtype": dtype_name(loaded.storage_dtype)}
        self.specs = specs
        self._tensors = {f"{name}.weight_shape": torch.tensor(shape) for name, shape in shapes.items()}
        self._tensors |= worst_scales(specs)
        self._tables = as_listed(tables)
        quantized = {f"{name}.weight" for name in (*specs, *tables.tied)}
        self._tensors |= {k: v for k, v in loaded.model.state_dict().items() if k not in quantized}
        self._extremes = loaded.extremes

    @property
    def tables(self) -> PackedTables:
        """The packed embeddings, and the heads that read them."""
        return self._tables

    def largest(self, name: str) -> float:
        """Return the largest absolute value of a tensor, or of the float weight of a linear; 0 if it is not known."""
        if name in self.specs or self._tensors[name].is_meta:
            low, high = self._extremes.get(f"{name}.weight" if name in self.specs else name, (0.0, 0.0))
            return max(-low, high)
        return super().largest(name)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor that is known before the run."""
        return self._tensors[name]

    def float_names(self) -> list[str]:
        """Return the names of the tensors that stay in floating point."""
        return [name for name in self._tensors if not name.endswith((".weight_shape", ".weight_scale"))]
