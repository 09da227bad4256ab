"""Every export format against a matrix of grids: exported and equal bit for bit, or refused with a reason.

    python scripts/bench/export_matrix.py [--formats awq onnx] [--json FILE] [--work FOLDER] [--model MODEL]

Checkpoints are made of the built-in model, or that of ``--model``, rounded to nearest: 2, 3, 4 and 8 bits, symmetric or
not, in groups of -1, 32, 64, 128 and 256 channels. Each is exported to each format. An export counts as exact if every
quantized weight, read from its files by the format's reader, and every other tensor equals the checkpoint's to the last
bit; so it is a second look at what ``qtool export`` itself has read back. Anything else than exact or refused ends the
program with 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from real_models import add_model, chosen

from qtool.blocks.job import Job
from qtool.checkpoints import native, output_folder
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config import catalog
from qtool.config.quant import BITS, QuantConfig
from qtool.config.sections import ExportConfig, ModelConfig
from qtool.exporters import _base
from qtool.exporters._folder import WrittenFolder, published_names
from qtool.methods import rtn
from qtool.models.linears import packed_linears
from qtool.models.loading import load_model
from qtool.pipelines.export import export
from qtool.quant.affine import dequantize
from qtool.system.errors import InputError

GROUPS = (-1, 32, 64, 128, 256)


def checkpoint(model: Path, folder: Path, config: QuantConfig) -> Path:
    """Write ``model``, rounded to nearest on the grid of ``config``, into ``folder``."""
    job = Job.select(load_model(ModelConfig(path=str(model), dtype="float32", device="cpu")), config)
    rtn.run(job, rtn.Config())
    specs = {name: layer.spec for name, layer in packed_linears(job.loaded.model).items()}
    with output_folder.atomic_folder(folder, overwrite=False) as partial:
        native.save(partial, job.loaded, specs)
    return folder


def difference(source: NativeCheckpoint, name: str, opened: WrittenFolder) -> str | None:
    """Return the name of a tensor that a written folder of the format ``name`` holds otherwise, or ``None``."""
    for linear in source.specs:
        key = published_names(source).modules(linear)[0]
        if not torch.equal(_base.get(name).read(opened, key), dequantize(*source.quantized(linear))):
            return linear
    floats = published_names(source).floats({key: source.tensor(key) for key in source.float_names()})
    return next((key for key, tensor in floats.items() if not opened.same(key, tensor)), None)


def outcome(folder: Path, name: str, out: Path) -> str:
    """Export ``folder`` as ``name``; return ``exact``, ``refused: reason``, or ``WRONG: what``."""
    try:
        export(folder, ExportConfig(format=name, path=out), False)
    except InputError as error:
        return f"refused: {str(error).partition(f'exported as {name}: ')[2]}"
    except Exception as error:  # a fault of ours, to be shown beside the others
        return f"WRONG: {type(error).__name__}: {error}"
    source = NativeCheckpoint(folder)
    found = difference(source, name, _base.get(name).open(out))
    return "exact" if found is None else f"WRONG: {found} differs"


def table(rows: list[dict[str, Any]], formats: list[str]) -> str:
    """Return the outcomes as a table in Markdown: a row for each grid, ``=`` for exact and ``-`` for refused."""
    marks = {"exact": "=", "refused": "-"}
    lines = [f"| grid | {' | '.join(formats)} |", f"|---|{'---|' * len(formats)}"]
    for grid in dict.fromkeys(row["grid"] for row in rows):
        found = {row["format"]: row["outcome"].partition(":")[0] for row in rows if row["grid"] == grid}
        lines.append(f"| {grid} | {' | '.join(marks.get(found[name], found[name]) for name in formats)} |")
    counts = {
        name: Counter(row["outcome"].partition(":")[0] for row in rows if row["format"] == name) for name in formats
    }
    lines.append("")
    lines += [f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in counts[name].items()) for name in formats]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(catalog.export_formats()), help="default: all")
    parser.add_argument("--json", type=Path, help="also write the outcomes to this file")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and exports; default: a temporary one")
    add_model(parser)
    args = parser.parse_args()

    model = chosen(args)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        for bits, symmetric, group in itertools.product(BITS, (True, False), GROUPS):
            config = QuantConfig(num_bits=bits, symmetric=symmetric, group_size=group)
            grid = config.label()
            folder = checkpoint(model, Path(scratch) / grid.replace(" ", "-"), config)
            for name in args.formats:
                found = outcome(folder, name, Path(scratch) / f"{folder.name}-{name}")
                rows.append({"grid": grid, "format": name, "outcome": found})
                print(f"{grid:12} {name:20} {found}", flush=True)
    print(f"\n{table(rows, args.formats)}")
    kinds = Counter(row["outcome"].partition(":")[0] for row in rows)
    print(f"all: {', '.join(f'{count} {kind}' for kind, count in kinds.items())} of {len(rows)}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if "WRONG" in kinds else 0


if __name__ == "__main__":
    raise SystemExit(main())
