"""The interface between pipelines and methods: a ``Job`` goes in, a ``Result`` comes out.

A method's file exports ``METHOD = Method(...)``. Its ``run(job, config)`` replaces every target of the job, and no
other linear, by a ``PackedLinear``; its result depends on the job and the config only. The pipeline selects and checks
the targets, reads the calibration text and provides the workspace; a method never sees the recipe or the output folder.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from qtool.config.quant import QuantConfig, QuantSpec
from qtool.config.sections import MethodConfig
from qtool.models.linears import Target
from qtool.models.loaded import LoadedModel
from qtool.models.tables import NO_TABLES, Tables, select_tables
from qtool.models.targets import select_targets
from qtool.quant.affine import QuantizedWeight
from qtool.reports.records import EXPERT_TOKENS, Series

Figures = dict[str, float]
ModelInputs = Mapping[str, Tensor]  # arguments of a model's forward, by name


class FinishedBlock(NamedTuple):
    """A quantized block as a workspace keeps it."""

    tensors: dict[str, Tensor]  # state dict, by full name
    figures: Figures  # one number for each series of the result, by its name
    weight_errors: dict[str, float]  # relative error of each packed linear, by full name


class Workspace(Protocol):
    """The place where a run keeps finished blocks, training states, and hidden states that do not fit into memory."""

    @property
    def memory_budget(self) -> int:
        """Bytes of memory for hidden states and paused forwards."""

    @property
    def scratch(self) -> Path:
        """Folder for hidden states that do not fit into ``memory_budget``."""

    def log(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step of ``phase`` to the tracker of the run, if it has one."""

    def phase(self, name: str) -> Path:
        """Return the folder of the state of the training phase ``name``."""

    def read(self, index: int) -> FinishedBlock | None:
        """Return the finished block ``index``, or ``None`` if it is not finished."""

    def write(self, index: int, block: FinishedBlock) -> None:
        """Keep a finished block on disk; a later start of the run continues after it."""


@dataclass(frozen=True)
class Job:
    """The input of a method.

    ``tokens`` is the calibration text, ``[n, t]`` int64, or ``None`` for a method that reads no text. ``labels``
    ``[n, t]`` has the token itself where it is learned and -100 elsewhere; ``None``: every token is learned. Without a
    ``workspace`` everything stays in memory, and nothing is resumed.

    ``pictures`` has what the model reads of each window besides its tokens, such as pixel values; it is empty where
    windows are text only.

    ``tables`` are the embeddings that are quantized besides, before the method runs (``tables.pack_embeddings``), and
    an untied head, which is one of the ``targets``: the only one of a block after the last one.
    """

    loaded: LoadedModel
    targets: tuple[Target, ...]
    tokens: Tensor | None = None
    labels: Tensor | None = None
    seed: int = 0
    workspace: Workspace | None = None
    pictures: Sequence[ModelInputs] = ()
    tables: Tables = NO_TABLES

    @classmethod
    def select(
        cls,
        loaded: LoadedModel,
        quant: QuantConfig,
        tokens: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> "Job":
        """Return the job of quantizing ``loaded`` in memory, with the targets that ``quant`` selects.

        Raises:
            InputError: a target cannot be quantized with its grid.
        """
        tables = select_tables(loaded, quant)
        targets = select_targets(loaded, quant) + tables.of_method
        return cls(loaded, targets, tokens, labels, seed, tables=tables)

    @property
    def text(self) -> Tensor:
        """The calibration text ``[n, t]`` of a method that needs one."""
        assert self.tokens is not None, "the method was given no calibration text"
        return self.tokens

    def first(self, count: int) -> "Job":
        """Return the job with its first ``count`` windows."""
        labels = None if self.labels is None else self.labels[:count]
        return replace(self, tokens=self.text[:count], labels=labels, pictures=self.pictures[:count])

    def batches(
        self, size: int, device: torch.device, dtype: torch.dtype, numbers: Iterable[int] | None = None
    ) -> list[ModelInputs]:
        """Return ``size`` windows at a time on ``device``, each window with pictures alone; pixels are in ``dtype``.

        ``numbers`` are the batches to return; ``None``: all.
        """
        parts = self.text.split(1 if self.pictures else size)
        chosen = range(len(parts)) if numbers is None else numbers
        if not self.pictures:
            return [{"input_ids": parts[number].to(device)} for number in chosen]
        return [
            {"input_ids": parts[number].to(device)}
            | {k: x.to(device, dtype if x.is_floating_point() else x.dtype) for k, x in self.pictures[number].items()}
            for number in chosen
        ]

    @property
    def num_parts(self) -> int:
        """The number of blocks, and one more for a head among the targets."""
        return len(self.loaded.blocks()) + len(self.tables.of_method)

    def of_block(self, index: int) -> list[Target]:
        """Return the targets of one block, in module order; after the last block, that is the head."""
        return [target for target in self.targets if target.block == index]


class Result(NamedTuple):
    """The output of a method; the model of its job was changed in place."""

    series: tuple[Series, ...]
    weight_errors: dict[str, float]
    """``|Q(w) - w|**2 / |w|**2`` of each packed linear; empty if the method no longer had the float weights."""

    def values(self, name: str, per: str | None = None) -> tuple[float, ...]:
        """Return the values of the series called ``name``; ``per`` chooses among series of the same name.

        Raises:
            KeyError: there is no such series.
        """
        for each in self.series:
            if each.name == name and per in (None, each.per):
                return each.values
        raise KeyError(
            f"there is no series {name!r}; there are {', '.join(each.name for each in self.series) or 'none'}"
        )


C = TypeVar("C", bound=MethodConfig)


@dataclass(frozen=True)
class Method(Generic[C]):
    """The description of a method, which its file exports as ``METHOD``.

    ``command`` is the ``qtool`` command that runs it, and ``summary`` one line about it. They must be the first
    arguments, plain strings: ``config.catalog`` reads them from the file's text.
    """

    command: str
    summary: str
    config: type[C]
    run: Callable[[Job, C], Result]
    needs_data: Callable[[C], bool] = lambda config: True
    end_to_end: Callable[[C], bool] = lambda config: False
    """True if the method trains the whole model; finished blocks are then only the start of that training."""
    round_weight: Callable[[Tensor, QuantSpec, C], QuantizedWeight] | None = None
    """Quantizes one float32 weight ``[out, in]`` alone, exactly as ``run`` does; ``None``: the method needs more."""


def load_method(name: str) -> Method[Any]:  # Any: each method has a config class of its own
    """Return the method called ``name``, one of ``config.catalog.methods()``; imports its file."""
    method: Method[Any] = import_module(f"qtool.methods.{name}").METHOD
    return method


def block_series(figures: Iterable[Figures]) -> tuple[Series, ...]:
    """Return the figures of the blocks as one series for each name; ``figures`` are in the order of the blocks."""
    found: dict[str, list[tuple[int, float]]] = {}
    for index, each in enumerate(figures):
        for name, value in each.items():
            found.setdefault(name.partition("/")[0], []).append((index, value))
    return tuple(
        Series(
            name=name,
            per="expert" if name == EXPERT_TOKENS else "block",
            at=tuple(at for at, _ in points),
            values=tuple(value for _, value in points),
        )
        for name, points in found.items()
    )


def expert_figures(counts: Iterable[float]) -> Figures:
    """Return the tokens that each expert of a block saw as figures, which ``block_series`` puts into one series."""
    return {f"{EXPERT_TOKENS}/{expert}": float(count) for expert, count in enumerate(counts)}
