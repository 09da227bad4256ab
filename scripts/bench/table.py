"""Perplexity, divergence, bits and CPU seconds of methods on a small model: tables of docs/benchmarks.md.

    python scripts/bench/table.py --out results.json [--methods "rtn;gptq;awq"] [--grids w4g64,w2g64a] [--model M]
    python scripts/bench/table.py --methods "lsq;lsq rounding.estimator=sigmoid" --grids w2g64a --seeds 0,1,2

A method is a name and, after it, the keys of its section that differ from the defaults. Calibration: windows of enwiki
(128 of 512 tokens); evaluation: WikiText-2 test, disjoint windows of 1024, float32. Both need QTOOL_DATA_DIR. Finished
cells are kept in the output file, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from real_models import BUILTIN, SOURCES, add_model, chosen

from qtool.blocks.job import Job, load_method
from qtool.checkpoints.sizes import bits_per_weight
from qtool.config.quant import QuantConfig
from qtool.config.sections import DataConfig, MethodConfig, ModelConfig
from qtool.config.yaml_loader import parse
from qtool.data.windows import calibration, perplexity_windows
from qtool.evaluation.perplexity import score_windows
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.targets import select_targets
from qtool.system.environment import environment

GRIDS = ("w8g128", "w4g128", "w4g64", "w3g64", "w2g64")


KINDS: dict[str, dict[str, Any]] = {
    "": {},
    "p": {"negative_scales": False},
    "a": {"symmetric": False},
    "f": {"symmetric": False, "float_zero": True},
}


def quant(grid: str) -> QuantConfig:
    """Return the grid of a short name such as ``w4g64`` or ``w4pc`` (one group per row).

    A letter at the end is another kind of grid: ``w2g64p`` has positive scales only, ``w2g64a`` is asymmetric, and
    ``w2g64f`` asymmetric with zero points between codes.
    """
    name, kind = (grid[:-1], grid[-1]) if grid[-1] in KINDS else (grid, "")
    group = -1 if name.endswith("pc") else int(name[3:])
    return QuantConfig.model_validate({"num_bits": int(name[1]), "group_size": group} | KINDS[kind])


def section(method: str) -> MethodConfig:
    """Return the method section that text such as ``lsq epochs=2 rounding.estimator=sigmoid`` describes."""
    name, *settings = method.split()
    return keyed(name, settings)


def keyed(name: str, settings: Sequence[str]) -> MethodConfig:
    """Return the section of the method ``name`` with ``settings`` such as ``rounding.estimator=sigmoid``."""
    raw: dict[str, Any] = {"name": name}
    for setting in settings:
        key, _, value = setting.partition("=")
        *parents, last = key.split(".")
        inner = raw
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = parse(value)
    config: MethodConfig = load_method(name).config.model_validate(raw)
    return config


@cache
def float_model(path: Path) -> LoadedModel:
    """Return the float model, in float32."""
    return load_model(ModelConfig(path=str(path), dtype="float32"))


def measure(
    path: Path, method: str, grid: str, seed: int, limit: int | None, tokens: torch.Tensor, bos: bool
) -> dict[str, float]:
    """Quantize the model and compare it with the float model; the method ``float`` quantizes nothing."""
    loaded = load_model(ModelConfig(path=str(path)))
    cell: dict[str, float] = {"bits_per_weight": 16.0, "seconds": 0.0}
    if method != "float":
        config, chosen = quant(grid), section(method)
        targets = select_targets(loaded, config)
        shapes = {t.name: t.weight_shape for t in targets}
        cell["bits_per_weight"] = bits_per_weight({t.name: t.spec for t in targets}, shapes)
        start = time.process_time()
        load_method(chosen.name).run(Job.select(loaded, config, tokens, seed=seed), chosen)
        cell["seconds"] = time.process_time() - start
    loaded.model.float()  # measure in float32, whatever dtype the method used; packed scales keep their dtype
    windows = perplexity_windows("wikitext2", loaded, 1024, limit, 0, bos)
    scores = score_windows(loaded.model, float_model(path).model, windows, "auto", True, "reading")
    assert scores.kl is not None
    error = scores.nll.std() / len(windows) ** 0.5
    perplexity = scores.nll.mean().exp()
    return cell | {
        "perplexity": perplexity.item(),
        "stderr": (perplexity * error).item(),
        "kl": scores.kl.mean().item(),
        "windows": float(len(windows)),
    }


def spread(values: list[float], digits: int) -> str:
    """Format the mean, and the standard deviation if there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    """Measure the missing cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench-table.json"))
    add_model(parser)
    parser.add_argument("--methods", default="rtn;hqq;gptq;awq;signround", help="separated by semicolons")
    parser.add_argument("--grids", default=",".join([*GRIDS, *(f"{grid}a" for grid in GRIDS)]))
    parser.add_argument("--seeds", default="0", help="seeds of the method; all use the same calibration text")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--limit", type=int, default=None, help="only the first N evaluation windows")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment(), "cells": {}}
    if args.out.exists():
        results = json.loads(args.out.read_text())
    cells, names = results["cells"], [name.strip() for name in args.methods.split(";")]
    grids, seeds = args.grids.split(","), [int(seed) for seed in args.seeds.split(",")]
    bos = args.model in SOURCES and SOURCES[args.model].bos
    text = DataConfig(source="enwiki", num_samples=args.num_samples, seq_len=args.seq_len, bos=bos)
    path = chosen(args)
    tokens = calibration(text, float_model(path), 0).tokens
    for method in names:
        section(method)  # find faults before hours of work
    for grid in ["-", *grids]:
        for method in ["float"] if grid == "-" else names:
            for seed in [0] if grid == "-" else seeds:
                key = f"{method} | {grid} | {args.num_samples}x{args.seq_len} | seed {seed} | {args.limit or 'all'}"
                key += "" if args.model == BUILTIN else f" | {args.model}"
                if key not in cells:
                    cells[key] = {
                        "model": args.model,
                        "method": method,
                        "grid": grid,
                        "text": list(tokens.shape),
                        "limit": args.limit,
                    }
                    cells[key] |= measure(path, method, grid, seed, args.limit, tokens, bos)
                    args.out.write_text(json.dumps(results, indent=2) + "\n")
                    print(key, {k: round(v, 4) for k, v in cells[key].items() if isinstance(v, float)}, flush=True)

    def found(method: str, grid: str, name: str) -> list[float]:
        asked = {"method": method, "grid": grid, "text": list(tokens.shape), "limit": args.limit, "model": args.model}
        return [cell[name] for cell in cells.values() if asked.items() <= ({"model": BUILTIN} | cell).items()]

    print(f"\nfloat: {spread(found('float', '-', 'perplexity'), 2)} ± {spread(found('float', '-', 'stderr'), 2)}\n")
    print("| grid | bits per weight | method | perplexity | KL | CPU s |\n|---|---:|---|---:|---:|---:|")
    for grid in grids:
        kinds = {"a": " asym", "f": " asym, float zero points", "p": " sym, positive scales"}
        label = grid[:-1] + kinds[grid[-1]] if grid[-1] in kinds else f"{grid} sym"
        for method in names:
            bits = found(method, grid, "bits_per_weight")[0]
            numbers = [
                spread(found(method, grid, name), d) for name, d in (("perplexity", 2), ("kl", 4), ("seconds", 0))
            ]
            print(f"| {label} | {bits:.3f} | {method} | {' | '.join(numbers)} |")


if __name__ == "__main__":
    main()
