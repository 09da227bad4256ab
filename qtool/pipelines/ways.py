"""The engines that load an export, as far as they were tried with folders of its format: for its model card."""

from pathlib import Path

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.engines import DEQUANTIZED, ENGINES, FORMATS, LIBRARIES, READS
from qtool.config.loadable import Weights, verdict
from qtool.config.quant import QuantSpec
from qtool.exporters._against import asymmetric_groups
from qtool.reports.model_card import Way


def ways(source: NativeCheckpoint, format: str, folder: Path, *, multimodal: bool) -> list[Way]:
    """Return the ways to load ``folder``, the export of ``source`` as ``format``, with engines that qtool has run."""
    tables = source.tables
    specs = {name: _written(spec, format) for name, spec in source.specs.items()}
    weights = Weights(
        dict(tables.linears(specs)),
        specs[tables.embeddings[0]] if tables.embeddings else None,
        specs.get(tables.head),
        source.shapes,
    )
    one_asymmetric = format == "compressed-tensors" and asymmetric_groups(folder) == 1
    found: dict[str, Way] = {}
    for row in (*READS, *LIBRARIES):
        if row.format != format or row.how != "run":
            continue
        load, note = row.load, row.note
        if one_asymmetric and row.engine == "transformers":  # read as one symmetric grid, it would not be refused
            load, note = DEQUANTIZED, "weights are expanded to floating point"
        elif not verdict(row.engine, format, weights).loads:
            continue
        if multimodal:
            load = load.replace("AutoModelForCausalLM", "AutoModelForMultimodalLM")
            load = load.replace("AutoTokenizer", "AutoProcessor").replace("tokenizer =", "processor =")
        language = ENGINES[row.engine].code if row.engine in ENGINES else "python"
        found.setdefault(load, Way(row.engine, load, language, row.versions, note))  # a library may load as an engine
    return list(found.values())


def _written(spec: QuantSpec, format: str) -> QuantSpec:
    """Return the grid with the dtype that ``format`` holds its scales in; the export was written, so they fit."""
    held = FORMATS[format].scale_dtypes
    return spec if not held or spec.scale_dtype in held else spec.model_copy(update={"scale_dtype": held[0]})
