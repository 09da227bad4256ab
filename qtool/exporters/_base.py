"""Export formats: ``--format gptq`` is ``qtool/exporters/gptq.py``. Nothing is registered.

An exporter starts from the integer codes of a native checkpoint and never quantizes again. What a format cannot hold
exactly is refused with the reason; what it wrote is read back by ``verify`` before it gets its name.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from qtool.checkpoints.native import Source
from qtool.config.sections import ExportConfig
from qtool.exporters._folder import WrittenFolder


class Exporter(NamedTuple):
    """What a format's file exports as ``EXPORTER``."""

    summary: str
    refuses: Callable[[Source, ExportConfig], str | None]
    """Why this checkpoint cannot be written in this format, and what to do; ``None`` when it can."""
    write: Callable[[Source, Path, ExportConfig], list[str]]
    """Write the folder; returns what a user of the result must know, one sentence each."""
    read: Callable[[WrittenFolder, str], Tensor]
    """Float32 weight ``[out, in]`` of a linear in a written folder, by code that shares nothing with ``write``."""
    loading: str
    """Which software loads the folder: one or two sentences for the model card and the report."""
    open: Callable[[Path], WrittenFolder] = WrittenFolder
    """Opens a written folder for ``read``."""
    recognises: Callable[[Path], bool] = lambda folder: False
    """Whether a folder, ours or another tool's, is one of those that ``read`` reads."""
    library: str = "transformers"
    """The library that the hub names on the model's page."""


def refusal(name: str, source: Source, config: ExportConfig) -> str | None:
    """Why the format ``name`` cannot hold ``source``, and what to do; ``None`` when it can."""
    rounding = next((linear for linear, spec in source.specs.items() if spec != spec.weights_only), None)
    if rounding is not None:
        return (
            f"{rounding} rounds activations (quant.activations, quant.kv_cache), which {name} does not say and its "
            "readers would leave out; use the native checkpoint, or quantize without them"
        )
    return get(name).refuses(source, config)


def get(name: str) -> Exporter:
    """The exporter for the format ``name``, which must be one of ``names()``."""
    exporter: Exporter = import_module(f"qtool.exporters.{name.replace('-', '_')}").EXPORTER
    return exporter
