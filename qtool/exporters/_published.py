"""Published checkpoints: which of their tensors hold the tensors and the linears of a model in memory.

transformers renames, stacks, splits, joins and transposes tensors while it loads a checkpoint, and reverts that when it
saves a model (``revert_weight_conversion``). A native checkpoint has the names in memory, where all experts of a layer
are one linear; an export has the published names, which other software knows. No architecture is described here:
tensors of row numbers go through transformers' conversion, and show which rows of which linear are where.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from qtool.models.experts import fused_parameters
from qtool.quant.affine import QuantizedWeight

BASE = 1 << 40  # a mark is BASE * (number of a tensor in memory) + (number of a row)


class Place(NamedTuple):
    """A tensor of a published checkpoint that holds rows of linears, or of an embedding, in memory."""

    linears: dict[str, tuple[Tensor, Tensor]]
    """For each linear, by name in memory: positions among the rows of this tensor, and rows of the linear there."""
    shape: tuple[int, ...]
    """The shape of the tensor without its input channels; the number of its rows is their product."""
    column: int
    """The dimension of the tensor's input channels."""
    part: bool = False
    """True if other tensors hold other rows of the same linears."""

    @property
    def plain(self) -> bool:
        """True if the tensor is a matrix ``[out, in]``, as of an ``nn.Linear``."""
        return len(self.shape) == 1 and self.column == 1

    @property
    def whole(self) -> str | None:
        """The linear whose rows are all here, in order; ``None`` if there are several, or only a part of one."""
        (name, (_, rows)), *more = self.linears.items()
        return None if more or self.part or not torch.equal(rows, torch.arange(len(rows))) else name

    def gather(self, weight: Callable[[str], Tensor]) -> Tensor:
        """Return the rows ``[rows, n]`` of the tensor; ``weight`` returns those of a linear, by its name in memory."""
        if self.whole is not None:
            return weight(self.whole)  # no copy: a table of embeddings may be the most of a model
        parts = {name: weight(name)[rows] for name, (_, rows) in self.linears.items()}
        first = next(iter(parts.values()))
        found = first.new_empty(self.num_rows, first.shape[1])
        for name, (positions, _) in self.linears.items():
            found[positions] = parts[name]
        return found

    def scatter(self, rows: Tensor, weights: dict[str, Tensor], sizes: Mapping[str, int]) -> None:
        """Put ``rows`` ``[rows, n]`` of the tensor into the ``weights`` of linears, of ``sizes`` rows each."""
        if self.whole is not None:
            weights[self.whole] = rows
            return
        for name, (positions, own) in self.linears.items():
            if name not in weights:
                weights[name] = rows.new_full((sizes[name], rows.shape[1]), torch.nan)
            weights[name][own] = rows[positions]

    def shaped(self, rows: Tensor) -> Tensor:
        """Return ``rows`` ``[rows, in]`` in the shape of the tensor."""
        shaped: Tensor = rows.unflatten(0, self.shape)
        return shaped.movedim(-1, self.column).contiguous()

    def flat(self, tensor: Tensor) -> Tensor:
        """Return the rows ``[rows, in]`` of the tensor."""
        return tensor.movedim(self.column, -1).flatten(0, -2)

    @property
    def num_rows(self) -> int:
        """The number of rows of the tensor."""
        return torch.Size(self.shape).numel()


class Experts(NamedTuple):
    """The experts of a layer: a fused parameter in memory."""

    module: Any
    """The module that holds the parameter, of a class that ``use_experts_implementation`` decorates."""
    shape: tuple[int, int]
    """The number of experts, and of output channels of each."""
    column: int
    """The dimension of the parameter's input channels."""


class Published:
    """The published names of a model's tensors, and the rows of its linears and embeddings there."""

    def __init__(self, model: nn.Module) -> None:
        """Send marks of the tensors of ``model``, which may be on the meta device, through transformers' conversion."""
        self.model = model
        self.experts = dict(_experts(model))
        tensors = model.state_dict()
        columns = {name: each.column for name, each in self.experts.items()}
        columns |= {
            f"{name}.weight": 0 if isinstance(module, Conv1D) else 1
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and f"{name}.weight" in tensors
        }
        self.embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        self._linears = {name: name if name in self.experts else name.removesuffix(".weight") for name in columns}
        self._in_memory = {linear: name for name, linear in self._linears.items()}
        self.rows = {self._linears[name]: _num_rows(tensors[name], column) for name, column in columns.items()}
        marks = {
            name: _marks(tensor, columns[name], index) if name in columns else _mark(tensor, index)
            for index, (name, tensor) in enumerate(tensors.items())
        }
        names = list(marks)
        self.places: dict[str, Place] = {}  # tensors that hold rows of linears, by published name
        self._names: dict[str, list[str]] = {}  # published names by name in memory
        for key, found in self._revert(marks).items():
            owners = {index: names[index] for index in _owners(found)}
            for owner in owners.values():
                self._names.setdefault(owner, []).append(key)
            if all(owner in columns for owner in owners.values()) and (place := self._place(found, owners)):
                self.places[key] = place
        counts = {name: len(keys) for name, keys in self._names.items()}
        for key, place in self.places.items():
            if any(counts[self._in_memory[linear]] > 1 for linear in place.linears):
                self.places[key] = place._replace(part=True)

    def _revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = revert_weight_conversion(self.model, tensors)  # type: ignore[arg-type]  # any model
        return found

    def _place(self, marks: Tensor, owners: dict[int, str]) -> Place | None:
        """Return the place of a published tensor by its ``marks``; ``None`` if its input channels were changed."""
        column = next((d for d in range(marks.dim()) if _constant(marks, d)), None)
        if column is None:
            return None
        rows = marks.select(column, 0)
        flat = rows.flatten()
        linears = {}
        for index, owner in owners.items():
            positions = torch.nonzero(flat // BASE == index).flatten()
            linears[self._linears[owner]] = positions, flat[positions] % BASE
        return Place(linears, tuple(rows.shape), column)

    def name(self, tensor: str) -> str:
        """Return the published name of a tensor in memory; of one that several tensors hold, that of the first."""
        memory = self._in_memory.get(tensor.removesuffix(".weight"), tensor)
        return self._names.get(memory, [tensor])[0]

    def keys(self, linear: str) -> list[str]:
        """Return the published names of the tensors that hold the weight of ``linear``, by its name in memory."""
        return self._names[self._in_memory.get(linear, f"{linear}.weight")]

    def modules(self, linear: str) -> list[str]:
        """Return the published names of the modules that hold the weight of ``linear``: without ``.weight``."""
        return [key.removesuffix(".weight") for key in self.keys(linear)]

    def shared(self, linear: str) -> set[str]:
        """Return the linears of which some row lies in one published tensor with a row of ``linear``, itself too."""
        return {other for key in self.keys(linear) if key in self.places for other in self.places[key].linears}

    def floats(self, tensors: Mapping[str, Tensor], places: Mapping[str, Place] | None = None) -> dict[str, Tensor]:
        """Return ``tensors``, by name in memory as a native checkpoint has them, as published checkpoints hold them.

        ``places`` are those where experts are put, by default the published ones.
        """
        experts, others = {}, {}
        for name, tensor in tensors.items():
            linear = name.removesuffix(".weight")
            if linear in self.experts and tensor.dim() == 2:
                experts[linear] = tensor
            else:
                others[name] = tensor
        found = self._revert(others)
        for key, place in (self.places if places is None else places).items():
            if place.linears.keys() <= experts.keys():
                found[key] = place.shaped(place.gather(experts.__getitem__))
        given = set(map(id, others.values()))
        # parts of one tensor share its memory, which safetensors refuses
        return {key: each if id(each) in given else each.clone().contiguous() for key, each in found.items()}

    def stacks(self, name: Callable[[str, str], str]) -> dict[str, Place]:
        """Return the places of linears where experts lie in stacks ``[E, out, in]`` of gate, up and down projections.

        ``name`` returns the name of a stack, by the published name of the module that holds the experts of a layer
        and one of ``gate_proj``, ``up_proj`` and ``down_proj``.
        """
        found = {key: place for key, place in self.places.items() if self.experts.keys().isdisjoint(place.linears)}
        for linear, (module, (count, size), _) in self.experts.items():
            rows = torch.arange(count * size).reshape(count, size)
            leaf = linear.rpartition(".")[2]
            parts = {leaf: rows}
            if leaf == "gate_up_proj":
                gate, up = rows.chunk(2, 1) if module.is_concatenated else (rows[:, ::2], rows[:, 1::2])
                parts = {"gate_proj": gate, "up_proj": up}
            key = self.keys(linear)[0]
            parent = key.split(".experts.")[0] if ".experts." in key else key.rsplit(".", 2)[0]
            for part, own in parts.items():
                place = Place({linear: (torch.arange(own.numel()), own.flatten())}, tuple(own.shape), 2, True)
                found[name(parent, part)] = place
        return found


@lru_cache(maxsize=2)  # asked for once per linear
def published(model: nn.Module) -> Published:
    """Return the published names of ``model``."""
    return Published(model)


@lru_cache(maxsize=2)
def linears_only(shapes: tuple[tuple[str, tuple[int, int]], ...]) -> nn.Module:
    """Return a module on the meta device with linears of the given names and ``shapes`` ``(out, in)`` only."""
    root = nn.Module()
    for name, (rows, columns) in shapes:
        *path, leaf = name.split(".")
        parent = root
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        with torch.device("meta"):
            parent.add_module(leaf, nn.Linear(columns, rows, bias=False))
    return root


def gathered(place: Place, weight: Callable[[str], QuantizedWeight]) -> QuantizedWeight:
    """Return the rows of ``place``; ``weight`` returns a linear, and all that are there have the same grid."""
    codes = place.gather(lambda name: weight(name).codes)
    scale = place.gather(lambda name: weight(name).scale)
    zero_point = place.gather(lambda name: weight(name).zero_point)
    return QuantizedWeight(codes, scale, zero_point, weight(next(iter(place.linears))).spec)


def _experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Yield each fused parameter of experts by its name."""
    for name, (module, attribute) in fused_parameters(model).items():
        column = 1 if module.is_transposed else 2
        shape = getattr(module, attribute).shape
        yield name, Experts(module, (shape[0], shape[3 - column]), column)


def _num_rows(tensor: Tensor, column: int) -> int:
    return tensor.numel() // tensor.shape[column]


def _marks(tensor: Tensor, column: int, index: int) -> Tensor:
    """Return marks of the rows of ``tensor``, with 2 in place of its input channels: that dimension shows after all."""
    shape = [size for d, size in enumerate(tensor.shape) if d != column]
    rows = torch.arange(_num_rows(tensor, column)).reshape(shape).unsqueeze(column)
    return (rows + index * BASE).repeat_interleave(2, column)


def _mark(tensor: Tensor, index: int) -> Tensor:
    """Return marks in the shape of ``tensor`` that name it only, and take no memory."""
    return torch.tensor(index * BASE).expand(tensor.shape)


def _owners(marks: Tensor) -> list[int]:
    """Return the numbers of the tensors in memory that ``marks`` name."""
    if not any(marks.stride()):  # ``_mark`` made them: all are equal, and one is enough
        marks = marks.flatten()[:1] if marks.dim() == 0 else marks[(0,) * marks.dim()].flatten()
    found: list[int] = torch.unique(marks // BASE).tolist()
    return found


def _constant(marks: Tensor, dim: int) -> bool:
    return marks.shape[dim] == 2 and torch.equal(marks.select(dim, 0), marks.select(dim, 1))
