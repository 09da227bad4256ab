"""The experts of a streamed model, which stay in its files until a block is brought in.

Published checkpoints of most families have a tensor for each expert, which transformers stacks in memory when it loads
a model. So that no more than a block is in memory, a streamed model is loaded without these tensors, and ``bring_in``
reads the experts of a block from their own tensors. Experts that a file holds stacked are mapped as any other tensor.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtool.models.experts import ExpertsLinear, expert_linears, fused_parameters, on_disk, put
from qtool.models.folders import open_safetensors, weight_files
from qtool.system import memory

Part = tuple[str, int | None, Tensor]  # name of a tensor, index of an expert in it, and the rows of the expert there


class TensorFiles:
    """The tensors of a model folder, opened once."""

    def __init__(self, folder: Path) -> None:
        """Open the headers of all safetensors files of ``folder``."""
        self._readers: dict[str, Any] = {}
        for file in weight_files(folder):
            reader = open_safetensors(file)
            self._readers |= dict.fromkeys(reader.keys(), reader)

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._readers[name].get_slice(name).get_shape())

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor, or its part ``index`` along the first dimension."""
        if index is None:
            tensor: Tensor = self._readers[name].get_tensor(name)
            return tensor
        part: Tensor = self._readers[name].get_slice(name)[index : index + 1]
        return part[0]


def without_experts(skeleton: PreTrainedModel, folder: Path) -> type[PreTrainedModel]:
    """Return a subclass of the class of ``skeleton`` whose models lack the experts that can stay in the files.

    ``attach`` completes a model that was loaded with it.
    """
    files = TensorFiles(folder)
    left = {name: each for name in fused_parameters(skeleton) if (each := _parts(skeleton, name, files)) is not None}
    kind: type[PreTrainedModel] = type(skeleton)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        for name, (module, attribute) in fused_parameters(self).items():
            if name not in left:
                continue
            shape, transposed = tuple(getattr(module, attribute).shape), module.is_transposed
            experts, out, columns = (shape[0], shape[2], shape[1]) if transposed else shape
            read = _reader(files, left[name], (out, columns), transposed)
            with torch.device("meta"):
                layer = ExpertsLinear(torch.empty(experts * out, columns), experts, read)
            layer.register_parameter("weight", None)  # there is nothing to load; ``attach`` registers it again
            for each in (layer, module):  # and nothing to initialise
                each._is_hf_initialized = True
            put(module, attribute, layer)

    # transformers need not report their tensors as ones that it does not know
    known = [*(kind._keys_to_ignore_on_load_unexpected or []), *map(re.escape, left)]
    own = {"__init__": init, "__module__": kind.__module__, "_keys_to_ignore_on_load_unexpected": known}
    return type(kind.__name__, (kind,), own)


def attach(model: PreTrainedModel, kind: type[PreTrainedModel], dtype: torch.dtype) -> None:
    """Give experts that stay in files a weight on the meta device.

    ``kind`` is the class of transformers that the class of ``model`` was made from.
    """
    model.__class__ = kind
    for layer in expert_linears(model).values():
        if layer.weight is None:
            _to_meta(layer, dtype)


def bring_in(model: nn.Module, device: torch.device, dtype_of: Callable[[torch.dtype], torch.dtype]) -> set[int]:
    """Read the experts in ``model`` that are in files into memory on ``device``; return the ids of their weights.

    ``dtype_of`` maps the dtype in the files to that in memory.
    """
    brought = set()
    for layer in expert_linears(model).values():
        if layer.weight.is_meta and layer.read is not None:
            dtype = dtype_of(layer.weight.dtype)
            weight = torch.empty(layer.weight.shape, dtype=dtype, device=device)
            for rows, part in zip(weight.chunk(layer.experts), layer.expert_weights(), strict=True):
                rows.copy_(part)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            brought.add(id(layer.weight))
    return brought


def leave(model: nn.Module, dtype: torch.dtype) -> None:
    """Free the experts in ``model`` that files hold; their weights are on the meta device again."""
    for layer in expert_linears(model).values():
        if layer.read is not None:
            _to_meta(layer, dtype)


def _to_meta(layer: Any, dtype: torch.dtype) -> None:  # Any: a linear of experts
    empty = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")
    layer.weight = nn.Parameter(empty, requires_grad=False)


def _parts(skeleton: PreTrainedModel, name: str, files: TensorFiles) -> list[list[Part]] | None:
    """Return the tensors of each expert of the parameter ``name``; ``None`` if files hold it as the model does."""
    owner, _, attribute = name.rpartition(".")
    module: Any = skeleton.get_submodule(owner)
    shape = getattr(module, attribute).shape
    experts, out = shape[0], shape[1] if not module.is_transposed else shape[2]
    places = on_disk(skeleton, name, experts * out)
    if not all(key in files for key in places):
        return None  # transformers finds them by another name, or says that they are missing
    parts: list[list[Part]] = [[] for _ in range(experts)]
    for key, rows in places.items():
        if files.shape(key) == tuple(shape) and len(places) == 1 and not module.is_transposed:
            return None
        owners = rows // out
        if bool((owners == owners[0]).all()):
            parts[int(owners[0])].append((key, None, rows % out))
        else:  # stacked, in another layout
            for expert, own in enumerate(rows.view(experts, -1)):
                parts[expert].append((key, expert, own % out))
    return parts


def _reader(
    files: TensorFiles, parts: list[list[Part]], shape: tuple[int, int], transposed: bool
) -> Callable[[int], Tensor]:
    """Return the function that reads the weight ``[out, in]`` of an expert."""

    def read(expert: int) -> Tensor:
        pages, weight = memory.Pages(), None
        for key, index, rows in parts[expert]:
            stored = files.read(key, index)
            weight = stored.new_empty(shape) if weight is None else weight
            weight[rows] = stored.T if transposed else stored
            pages.drop(stored)
        assert weight is not None
        return weight

    return read
