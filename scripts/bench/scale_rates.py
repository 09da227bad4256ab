"""Measures the rates of this machine that ``scale_model.py`` predicts runs from, with the functions that runs use.

    python scripts/bench/scale_rates.py rates.json [--shape 576x1536] [--dtype float32]

Measure with the number of threads that each process of a run will have (``OMP_NUM_THREADS``), on an idle machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from scale_model import BITS, Rates

from qtool.config.quant import QuantSpec
from qtool.methods import gptq
from qtool.quant.hessian import gram
from qtool.quant.ranges import search_qparams
from qtool.training.block_training import BlockLinear


def seconds_of(work: Callable[[], object], least: float = 1.0) -> float:
    """Return the shortest time of one call among those of ``least`` seconds, after one that is not counted."""
    work()
    best, begun = math.inf, time.perf_counter()
    while time.perf_counter() - begun < least:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def measure(columns: int, rows: int, dtype: torch.dtype) -> Rates:
    """Measure the rates of this machine's CPU on the shapes of one linear, with the functions that runs use."""
    torch.manual_seed(0)
    x = torch.randn(512, columns).to(dtype)
    weight = torch.randn(rows, columns)
    spec, config = QuantSpec(num_bits=BITS, group_size=64), gptq.Config()
    statistics = gptq.Statistics(gram([torch.randn(4 * columns, columns)]), None)
    factor = gptq.factorise(statistics, spec, config, "a linear")
    searching = seconds_of(lambda: search_qparams(weight, spec, 3.0))
    few, all_rows = (seconds_of(partial(gptq.solve, w, factor, spec, config)) for w in (weight[:16], weight))
    dense = weight.to(dtype)
    product = seconds_of(lambda: x @ dense.T)
    at_rest = searching * 16 / rows
    data = torch.empty(1 << 26, dtype=torch.uint8)
    search = weight.numel() / searching
    rest = max(all_rows - few - searching * (1 - 16 / rows), 1e-9)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "block"
        writing = seconds_of(lambda: file.write_bytes(data.numpy().tobytes()))
    return Rates(
        product=2 * x.numel() * rows / product,
        gram=1.25 * x.numel() * columns / seconds_of(lambda: gram([x])),
        factor=2 / 3 * columns**3 / seconds_of(lambda: gptq.factorise(statistics, spec, config, "a linear")),
        update=(rows - 16) * columns**2 / rest,
        search=search,
        column=max(few - at_rest, 0.0) / columns,
        train=weight.numel() / _training_step(weight, spec),
        disk=len(data) / writing,
        digest=len(data) / seconds_of(lambda: hashlib.sha256(data.numpy().data).digest()),
        link=len(data) / seconds_of(lambda: data.clone()) / 4,  # gloo copies through shared memory and sockets
        wait=1e-3,
    )


def _training_step(weight: torch.Tensor, spec: QuantSpec) -> float:
    """Return the seconds of rounding a weight, differentiating it and moving it by Adam."""
    layer = BlockLinear(weight, None, spec)
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW([layer.weight], lr=1e-5)
    gradient = torch.randn_like(weight)

    def step() -> None:
        layer.quantized_weight().backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return seconds_of(step)


def main() -> None:
    """Measure, and write the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--shape", default="576x1536", help="columns and rows of the linear that is measured")
    parser.add_argument("--dtype", default="float32", help="dtype of products")
    args = parser.parse_args()
    columns, rows = (int(each) for each in args.shape.split("x"))
    args.file.write_text(json.dumps(asdict(measure(columns, rows, getattr(torch, args.dtype))), indent=1))
    print(args.file.read_text())


if __name__ == "__main__":
    main()
