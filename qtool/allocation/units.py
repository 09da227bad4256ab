"""The units of a plan: weights that get the same width.

A unit is a set of linears that engines fuse into one matrix, which therefore need one width: linears that read the same
tensor (q, k, v; gate, up), and all experts of a mixture. All embeddings are a unit, and so is an untied head.
"""

import math
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal, NamedTuple

import torch

from qtool.blocks.driver import walk
from qtool.blocks.job import Job
from qtool.config.quant import QuantConfig
from qtool.models.linears import Target
from qtool.models.loaded import LoadedModel
from qtool.models.tables import select_tables
from qtool.models.targets import select_targets

EXPERTS = re.compile(r"(.*\.experts)\.")


class Unit(NamedTuple):
    """Linears or embeddings that get the same width, in the order they run, and the widths that are possible."""

    targets: tuple[Target, ...]
    choices: tuple[int, ...]
    table: Literal["", "embedding", "head"] = ""
    tied: str = ""  # the name of the head that computes with the first embedding, if this is the unit of embeddings

    @property
    def makes_logits(self) -> bool:
        """True if the first weight of the unit is that of the output head."""
        return bool(self.tied) or self.table == "head"

    @property
    def weight_names(self) -> list[str]:
        """The full names of the unit's weights; a table that embedding and head share has two."""
        return [target.name for target in self.targets] + ([self.tied] if self.tied else [])

    @property
    def name(self) -> str:
        """The common prefix and the linears, such as ``model.layers.0.self_attn: q_proj, k_proj, v_proj``.

        A table is called ``embedding`` or ``head``.
        """
        if self.table:
            return self.table
        names = [target.name for target in self.targets]
        columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
        shared = ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
        return f"{shared}: {', '.join(name.removeprefix(f'{shared}.') for name in names)}"

    @property
    def num_weights(self) -> int:
        """The number of weights in the whole unit."""
        return sum(math.prod(target.weight_shape) for target in self.targets)


def all_units(loaded: LoadedModel, quant: QuantConfig) -> list[Unit]:
    """Return the units that ``quant`` quantizes, in the order they run, without choices.

    Raises:
        InputError: a linear or a table cannot be quantized with its grid.
    """
    targets, tables = select_targets(loaded, quant), select_tables(loaded, quant)
    head, table = next(iter(tables.tied.items()), ("", ""))
    embeddings = sorted(tables.embeddings, key=lambda target: target.name != table)
    return [
        *([Unit(tuple(embeddings), (), "embedding", head)] if embeddings else []),
        *(Unit(tuple(group), ()) for group in fused(loaded, targets)),
        *(Unit((target,), (), "head") for target in tables.of_method),
    ]


def fused(loaded: LoadedModel, targets: Sequence[Target]) -> list[list[Target]]:
    """Return the targets by unit, in the order they run, found by one forward of each block."""
    window = torch.zeros(1, 2, dtype=torch.int64)
    job = Job(loaded, tuple(targets), window)
    return merged([group for task in walk(job) if task.targets for group in task.groups])


def merged(groups: Sequence[Sequence[Target]]) -> list[list[Target]]:
    """Merge the groups of a layer's experts into one; ``groups`` are linears that read the same tensor."""
    units: dict[str, list[Target]] = {}
    for group in groups:
        expert = EXPERTS.match(group[0].name)
        units.setdefault(expert[1] if expert else group[0].name, []).extend(group)
    return list(units.values())
