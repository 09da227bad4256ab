"""Perplexity, bits and CPU seconds of the PTQ methods on the built-in model: the tables of docs/benchmarks.md.

    python scripts/bench/table.py --out results.json [--methods rtn,gptq,awq] [--grids w4g64,w2g64a] [--limit N]

Calibration: 128 windows of 512 tokens of enwiki; evaluation: WikiText-2 test, disjoint windows of 1024, float32. Both
need QTOOL_DATA_DIR. Finished cells are kept in the output file, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from qtool import data, evaluate, methods
from qtool.checkpoint import bits_per_weight
from qtool.config import DataConfig, ModelConfig, QuantConfig
from qtool.environment import environment
from qtool.models import load_model

MODEL = "builtin:wiki-llama-3m"
GRIDS = ("w8g128", "w4g128", "w4g64", "w3g64", "w2g64")


def quant(grid: str) -> QuantConfig:
    """The grid that a short name such as ``w4g64`` or ``w2g64a`` (asymmetric) stands for."""
    bits, _, group = grid.removesuffix("a")[1:].partition("g")
    return QuantConfig(num_bits=int(bits), group_size=int(group), symmetric=not grid.endswith("a"))  # type: ignore[arg-type]


def measure(method: str, grid: str, limit: int | None, tokens: torch.Tensor) -> dict[str, float]:
    """Quantize the model with a method's defaults and measure it; ``float`` measures the model as it is."""
    loaded = load_model(ModelConfig(path=MODEL))
    cell: dict[str, float] = {"bits_per_weight": 16.0, "seconds": 0.0}
    if method != "float":
        plugin, config = methods.get(method), quant(grid)
        targets = loaded.targets(config)
        shapes = {t.name: (t.weight.shape[0], t.weight.shape[1]) for t in targets}
        cell["bits_per_weight"] = bits_per_weight({t.name: t.spec for t in targets}, shapes)
        start = time.process_time()
        plugin.run(loaded, tokens, config, plugin.config(name=method), 0)
        cell["seconds"] = time.process_time() - start
    loaded.model.float()  # measured in float32 whatever the method computed in; packed scales keep their dtype
    windows = data.perplexity_windows("wikitext2", loaded, 1024, limit, 0)
    metric = evaluate.perplexity(loaded.model, windows, "auto")
    return cell | {"perplexity": metric.value, "stderr": metric.stderr or 0.0, "windows": float(len(windows))}


def main() -> None:
    """Fill in the cells that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench-table.json"))
    parser.add_argument("--methods", default="rtn,hqq,gptq,awq,signround")
    parser.add_argument("--grids", default=",".join([*GRIDS, *(f"{grid}a" for grid in GRIDS)]))
    parser.add_argument("--limit", type=int, default=None, help="only the first N windows")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {"environment": environment(), "cells": {}}
    names = args.methods.split(",")
    tokens = data.calibration_tokens(DataConfig(source="enwiki"), load_model(ModelConfig(path=MODEL)), 0)
    for grid in ["-", *args.grids.split(",")]:
        for method in ["float"] if grid == "-" else names:
            key = f"{method} {grid}"
            if key not in results["cells"]:
                results["cells"][key] = measure(method, grid, args.limit, tokens)
                args.out.write_text(json.dumps(results, indent=2) + "\n")
                print(key, results["cells"][key], flush=True)
    cells = results["cells"]
    print(f"\nfloat: {cells['float -']['perplexity']:.2f} ± {cells['float -']['stderr']:.2f}\n")
    print("| grid | bits per weight | " + " | ".join(names) + " | CPU seconds: " + ", ".join(names) + " |")
    print("|---|---:|" + "---:|" * len(names) + "---:|")
    for grid in args.grids.split(","):
        row = [cells[f"{method} {grid}"] for method in names]
        label = grid.removesuffix("a") + (" asym" if grid.endswith("a") else " sym")
        values = " | ".join(f"{cell['perplexity']:.2f}" for cell in row)
        seconds = ", ".join(f"{cell['seconds']:.1f}" for cell in row)
        print(f"| {label} | {row[0]['bits_per_weight']:.3f} | {values} | {seconds} |")


if __name__ == "__main__":
    main()
