"""The native checkpoint: how a model is saved as one, and read from one tensor by tensor.

A folder as Hugging Face writes it: ``config.json`` with ``quantization_config``, safetensors shards, tokenizer files,
and last ``qtool.json``, whose presence means that the write finished. A quantized linear ``p`` is ``p.weight_packed``
int32 ``[out, ceil(in b / 32)]``, ``p.weight_scale`` ``[out, groups]``, ``p.weight_shape`` int64 ``[2]``, and
``p.weight_zero_point`` int32 ``[ceil(out b / 32), groups]`` (packed along rows) when the grid is asymmetric: the names
and layout of compressed-tensors' ``pack-quantized``. ``p.weight`` is one byte that makes other loaders stop.
"""

import copy
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from qtool.checkpoints.files import SafetensorsFolder, folder_bytes, shard_name, write_index, write_shard, write_shards
from qtool.checkpoints.quantization_config import section_of, specs_of
from qtool.config.quant import SCALE_BITS, QuantSpec
from qtool.models.folders import read_config
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packed_linear import PARTS, PackedLinear
from qtool.system import memory
from qtool.system.errors import InputError, RunError
from qtool.system.tensors import dtype_name

MANIFEST = "qtool.json"


def as_stored(tensors: dict[str, Tensor], packed: Collection[str], loaded: LoadedModel) -> dict[str, Tensor]:
    """Tensors of a model as its checkpoint holds them: on CPU, and what stays float in its file's dtype.

    ``packed``: names of quantized linears, whose parts stay as they are. Of tied tensors the first is kept:
    transformers ties them again when it loads.
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
            # the file's own tensor, unless a method changed it; the model may compute in less than the file holds
            own = originals.tensor(name) if name in originals.names else tensor.to(loaded.storage_dtype)
            if not torch.equal(own.to(tensor), tensor):
                own = tensor.to(own.dtype)
            if torch.equal(own.to(tensor), tensor):  # else the changed value needs more
                pages.drop(own, tensor)  # the file holds them
                tensor = own
        stored[name] = tensor.detach().cpu().contiguous()
    return stored


def save(folder: Path, loaded: LoadedModel, specs: dict[str, QuantSpec]) -> None:
    """Write everything but the manifest and the model card into ``folder``; ``specs`` are the quantized linears.

    What a streamed run has written there, one shard for each block, stays; the rest is added.

    Raises:
        RunError: what was read back is not what was written.
    """
    rest = folder / shard_name(0, len(loaded.blocks()))
    rest.unlink(missing_ok=True)  # of a run that was killed after it
    written = SafetensorsFolder(folder)
    tensors = {k: v for k, v in loaded.model.state_dict().items() if k not in written.names and v.device.type != "meta"}
    tensors = as_stored(tensors, specs, loaded)
    if written.names:
        write_shard(tensors, rest)
        write_index(folder)
    else:
        write_shards(tensors, folder)
    config = copy.deepcopy(loaded.model.config)
    config.dtype = loaded.storage_dtype
    config.quantization_config = section_of(specs)
    config.save_pretrained(folder)
    if loaded.model.can_generate() and loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


class NativeCheckpoint:
    """A native checkpoint, read tensor by tensor: where exporters and verification start. No model is built."""

    def __init__(self, folder: Path) -> None:
        """Open ``folder``; reads only its config and the shards' headers."""
        self.folder = folder
        self.config = read_config(folder)
        if "quantization_config" not in self.config:
            raise InputError(f"{folder} is a float model; a qtool checkpoint is needed (qtool ptq makes one)")
        try:
            self.specs = specs_of(self.config["quantization_config"])
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None

    @cached_property
    def _files(self) -> SafetensorsFolder:
        return SafetensorsFolder(self.folder)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape ``(out, in)`` of each quantized linear."""
        found = {}
        for name in self.specs:
            rows, columns = self.tensor(f"{name}.weight_shape").tolist()
            found[name] = rows, columns
        return found

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored."""
        if name not in self._files.names:
            raise InputError(f"{self.folder} lacks the tensor {name}; the checkpoint is incomplete")
        return self._files.tensor(name)

    def quantized(self, name: str) -> QuantizedWeight:
        """Codes, scale and zero point of the linear ``name``."""
        spec = self.specs[name]
        out_features, in_features = self.tensor(f"{name}.weight_shape").tolist()
        layer = PackedLinear(in_features, out_features, spec)
        for part, _ in list(layer.named_buffers()):
            setattr(layer, part, self.tensor(f"{name}.{part}"))
        layer.check(f"{self.folder}: {name}")
        return layer.quantized

    def float_names(self) -> list[str]:
        """Tensors that are not part of a quantized weight, biases of quantized linears included."""
        packed = {f"{name}.{part}" for name in self.specs for part in PARTS}
        return [name for name in self._files.names if name not in packed]

    def num_bytes(self) -> int:
        """Size of the safetensors files."""
        return folder_bytes(self.folder)


class PlannedCheckpoint(NativeCheckpoint):
    """The checkpoint that a run is about to make, for asking an exporter early; its scales are not known yet."""

    def __init__(self, loaded: LoadedModel, specs: dict[str, QuantSpec], shapes: dict[str, tuple[int, int]]) -> None:
        """Describe what ``loaded`` becomes with these grids."""
        self.folder = loaded.folder
        self.config = {"dtype": dtype_name(loaded.storage_dtype)}
        self.specs = specs
        self._tensors = {f"{name}.weight_shape": torch.tensor(shape) for name, shape in shapes.items()}
        # not known yet: a value that needs every bit of its dtype stands for all scales
        worst = {dtype: 1 + torch.finfo(getattr(torch, dtype)).eps for dtype in SCALE_BITS}
        self._tensors |= {
            f"{name}.weight_scale": torch.tensor([worst[spec.scale_dtype]]) for name, spec in specs.items()
        }
        quantized = {f"{name}.weight" for name in specs}
        self._tensors |= {k: v for k, v in loaded.model.state_dict().items() if k not in quantized}

    def tensor(self, name: str) -> Tensor:
        """A tensor that is known before the run."""
        return self._tensors[name]

    def float_names(self) -> list[str]:
        """Tensors that stay in floating point."""
        return [name for name in self._tensors if not name.endswith((".weight_shape", ".weight_scale"))]
