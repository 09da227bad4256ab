"""Embeddings and output heads in exports: which of them are packed, and their names in the files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantSpec
from qtool.exporters._folder import (
    WrittenFolder,
    block_prefixes,
    both_names,
    head_names,
    is_known,
    published_names,
    skeleton,
)
from qtool.exporters._published import published
from qtool.quant.affine import QuantizedWeight
from qtool.system.errors import InputError


def refused_embedding(source: NativeCheckpoint, reader: str) -> str | None:
    """Return the reason why ``reader`` cannot compute with a packed embedding of ``source``, or ``None``."""
    name = next(iter(source.tables.embeddings), None)
    if name is None:
        return None
    head = next((head for head, table in source.tables.tied.items() if table == name), None)
    also = "" if head is None else f" ({head} computes with the same table)"
    return (
        f"{name}{also} is quantized, and {reader}; quantize with quant.embedding: float, or export another format, for "
        "example dense"
    )


def outside_blocks(source: NativeCheckpoint) -> dict[str, QuantSpec]:
    """Return the grids of the packed linears outside the decoder blocks: that of an untied head."""
    own, _ = block_prefixes(source)
    return {
        name: spec
        for name, spec in source.specs.items()
        if name not in source.tables.embeddings and not name.startswith(own)
    }


def in_blocks(source: NativeCheckpoint) -> dict[str, QuantSpec]:
    """Return the grids of the packed linears of the decoder blocks."""
    outside = {*outside_blocks(source), *source.tables.embeddings}
    return {name: spec for name, spec in source.specs.items() if name not in outside}


def names_of(source: NativeCheckpoint, *modules: str) -> list[str]:
    """Return ``both_names`` of modules, by their names in memory."""
    names = published_names(source)
    return both_names({module: names.modules(module) for module in modules})


def float_embeddings(source: NativeCheckpoint) -> list[str]:
    """Return ``both_names`` of the embeddings that stay in floating point."""
    names = published_names(source)
    floats = sorted(names.embeddings.difference(source.tables.embeddings))
    return both_names({name: names.modules(name) if name in names.rows else [] for name in floats})


def signed(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Return the parts of ``int-quantized`` in compressed-tensors: codes and zero points are less the middle, in int8.

    ``weight`` is ``[out, in]``; ``weight_scale`` and, of an asymmetric grid, ``weight_zero_point`` ``[out, groups]``.
    """
    codes, scale, zero_point, spec = quantized
    parts = {
        "weight": (codes.to(torch.int16) - spec.middle).to(torch.int8),
        "weight_scale": scale.to(getattr(torch, spec.scale_dtype)),
    }
    zeros = {} if spec.symmetric else {"weight_zero_point": (zero_point - spec.middle).to(torch.int8).contiguous()}
    return parts | zeros


def embedding_at(folder: Path, name: str) -> nn.Module | None:
    """Return the embedding, of the model without weights, whose table a written folder holds as ``name``, or ``None``.

    Without a class of the model, nothing is an embedding.
    """
    if not is_known(folder):
        return None
    names = published(skeleton(folder))
    place = names.places.get(f"{name}.weight")
    if place is None or not place.linears.keys() <= names.embeddings:
        return None
    return names.model.get_submodule(next(iter(place.linears)))


class ScaledFolder(WrittenFolder):
    """A folder of compressed-tensors, whose quantized weights have scales.

    A head that computes with an ``int-quantized`` embedding has only copies of its scales and zero points, and is no
    linear of the folder.
    """

    def __init__(self, folder: Path) -> None:
        """Open ``folder``, and find the copies."""
        super().__init__(folder, marker="weight_scale")
        held = set(super().names())
        heads = {name.removesuffix(".weight") for name in head_names(folder)}
        codes = {f"{head}.{part}" for head in heads for part in ("weight", "weight_packed")}
        self._tied = heads if held.isdisjoint(codes) else set()
        parts = ("weight_scale", "weight_zero_point")
        self._copies = held.intersection(f"{head}.{part}" for head in self._tied for part in parts)

    def names(self) -> list[str]:
        """Return the names of all tensors but copies."""
        return [name for name in super().names() if name not in self._copies]

    def check_copies(self, name: str, parts: Mapping[str, Tensor], targets: Iterable[str]) -> None:
        """Refuse a tied head without copies of the ``parts`` of its embedding ``name``, whose group has ``targets``.

        Raises:
            InputError: the group does not select the head, or a copy is missing or differs.
        """
        table = embedding_at(self.folder, name)
        model: Any = None if table is None else skeleton(self.folder)
        if not self._tied or model is None or table is not model.get_input_embeddings():
            return
        for part, tensor in parts.items():
            held = [self.tensor(f"{head}.{part}") for head in self._tied if f"{head}.{part}" in self._copies]
            if self._tied.isdisjoint(targets) or not held or not all(torch.equal(copy, tensor) for copy in held):
                raise InputError(
                    f"{self.folder}: {min(self._tied)} computes with {name}, and needs its config group and a copy of "
                    f"its {part}"
                )
