"""The contract of an export format, and how a format is found: ``--format gptq`` is the ``EXPORTER`` of ``gptq.py``.

An exporter starts from the integer codes of a native checkpoint and never quantizes again. A checkpoint that the format
cannot hold exactly is refused with the reason. An export is read back (``_readback.read_back``) before its folder gets
its name.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config import catalog
from qtool.config.engines import FORMATS
from qtool.config.quant import ActivationGrid, QuantSpec
from qtool.config.sections import ExportConfig
from qtool.exporters import _activations
from qtool.exporters._folder import WrittenFolder, has_class
from qtool.exporters._outside import Runner
from qtool.exporters._published import Place, Published

# formats that hold scales by blocks, GGUF first: there they are multiplied as they are
BLOCK_FORMATS = sorted((name for name, holds in FORMATS.items() if holds.k_quants and name != "native"), reverse=True)


class Exporter(NamedTuple):
    """An export format; its file assigns one to ``EXPORTER``."""

    summary: str
    refuses: Callable[[NativeCheckpoint, ExportConfig], str | None]
    """Returns the reason why the format cannot hold this checkpoint, and what to do; ``None`` if it can."""
    write: Callable[[NativeCheckpoint, Path, ExportConfig], list[str]]
    """Writes the folder, and returns notes for the users of the export, one sentence each."""
    describe: Callable[[NativeCheckpoint, Path, str], None]
    """Writes what the folder has beside weights in a dtype, of a checkpoint whose weights need not exist yet."""
    read: Callable[[WrittenFolder, str], Tensor]
    """Returns the float32 rows ``[out, in]`` of a linear of a written folder, by its name there (``places``) without
    ``.weight``; shares no code with ``write``."""
    loading: str
    """The software that loads the folder: one or two sentences for the model card and the report."""
    open: Callable[[Path], WrittenFolder] = WrittenFolder
    """Opens a written folder for ``read``."""
    places: Callable[[Published], dict[str, Place]] = lambda names: names.places
    """Returns where the format's files hold the linears of a model, by the name of the tensor there."""
    recognises: Callable[[Path], bool] = lambda folder: False
    """Returns whether ``read`` can read a folder, written by qtool or by another tool."""
    library: str = "transformers"
    """The library that the hub names on the model's page."""
    weight_files: str = "*.safetensors"
    """Pattern of the names of the files with weights, for the size of an export."""
    config_keys: tuple[str, ...] = ()
    """Keys that the format adds to ``config.json``, besides ``quantization_config``."""
    needs_class: bool = True
    """``False``: the format can be written of a checkpoint for which transformers has no class."""
    rounds: Callable[[WrittenFolder, str], ActivationGrid | None] | None = None
    """Returns the grid by which readers round the input of a linear of a written folder; ``None``: the format has no
    word for that."""
    bits: Callable[[QuantSpec, tuple[int, int], bool], float] | None = None
    """Returns the bits per weight of a quantized linear ``(out, in)``, or with ``True`` of an embedding, as written,
    scales and zero points counted; ``None``: those of the checkpoint."""
    float_dtype: Callable[[Iterable[QuantSpec], str], str] = lambda specs, own: own
    """Returns the dtype of float tensors of a model whose own dtype is ``own``, as far as grids alone show it."""
    runs: Callable[[Path, Tensor], Tensor] | None = None
    """Returns the logits float32 ``[1, t, vocabulary]`` of tokens ``[1, t]`` as the engine computes them with a folder;
    of a format whose engine is installed with what writes it, so that each export is run before it is kept."""
    reader: Runner | None = None
    """The program with which other software unpacks the weights of a written folder; ``None``: there is none."""
    reads_with: str = ""
    """The package that unpacks weights for ``read``, of a format whose ``read`` is the independent reader."""
    dtype_may_round: bool = False
    """``True``: a dtype that the user names may round weights, and the differences are reported instead of refused."""


def refusal(name: str, source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Return the reason why the format ``name`` cannot hold ``source``, and what to do; ``None`` if it can."""
    holds = get(name).rounds is not None
    unheld = (_activations.unheld(linear, spec, name, holds_int8=holds) for linear, spec in source.specs.items())
    if reason := next(filter(None, unheld), None):
        return reason
    if source.stacked and not has_class(source):
        return (
            f"{source.stacked[0]} holds the experts of a layer, and transformers has no class that says how they are "
            "published; use the native checkpoint"
        )
    if name not in BLOCK_FORMATS:
        for linear, spec in source.specs.items():
            if spec.blocks is not None:
                return (
                    f"{linear} is on the grid {spec.grid} of GGUF, which {name} cannot hold; export "
                    f"{' or '.join(BLOCK_FORMATS)}, or quantize with quant.grid: affine"
                )
    if get(name).needs_class and not has_class(source):
        free = [each for each in catalog.export_formats() if not get(each).needs_class]
        return (
            f"it was made with model.free, and transformers has no class with its linears, which {name} needs; export "
            f"{' or '.join(free)} instead"
        )
    return get(name).refuses(source, config)


def recognised(folder: Path) -> Exporter | None:
    """Return the format that can read ``folder``, written by qtool or by another tool; ``None`` if none can."""
    return next((each for each in map(get, catalog.export_formats()) if each.recognises(folder)), None)


def get(name: str) -> Exporter:
    """Return the exporter of the format ``name``, one of ``config.catalog.export_formats()``."""
    exporter: Exporter = import_module(f"qtool.exporters.{name.replace('-', '_')}").EXPORTER
    return exporter
