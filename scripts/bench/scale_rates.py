"""Measures the rates of this machine that ``scale_model.py`` predicts runs from, with the functions that runs use.

    python scripts/bench/scale_rates.py rates.json [--model smollm2-135m | --shape 576x1536] [--dtype float32]

Measure with the number of threads that each process of a run will have (``OMP_NUM_THREADS``), on an idle machine. The
rate and the delay of a collective are those of two processes that sum tensors with gloo.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from real_models import add_model, chosen
from scale_model import BITS, Rates, blocks_of, described, ring
from torch import distributed
from torch.multiprocessing.spawn import spawn
from transformers import AutoConfig, LlamaConfig, LlamaModel

from qtool.blocks.moments import Statistics
from qtool.blocks.states import TOKENS_PER_BATCH
from qtool.config.quant import QuantSpec
from qtool.methods import gptq, rtn
from qtool.quant.hessian import gram
from qtool.quant.ranges import search_qparams
from qtool.system.matmul import choose_library
from qtool.training.block_training import BlockLinear

LENGTH, HEAD = 512, 64  # tokens of a window, and the size of an attention head, of the block whose forward is measured


def seconds_of(work: Callable[[], object], least: float = 1.0) -> float:
    """Return the shortest time of one call among those of ``least`` seconds, after one that is not counted."""
    work()
    best, begun = math.inf, time.perf_counter()
    while time.perf_counter() - begun < least:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def collective(numbers: int, repeats: int = 20) -> tuple[float, float]:
    """Return the seconds in which two gloo processes sum ``numbers`` float32 numbers, and a single one: medians."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), (numbers, 1), repeats)
        spawn(_sum_in_one_of_two, arguments, nprocs=2)
        large, small = json.loads((Path(folder) / "seconds.json").read_text())
    return large, small


def _sum_in_one_of_two(rank: int, folder: Path, sizes: tuple[int, ...], repeats: int) -> None:
    """Sum tensors of ``sizes`` with the other process, ``repeats`` times; rank 0 writes the median seconds of each."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = []
    for size in sizes:
        tensor, times = torch.zeros(size), []
        for _ in range(repeats):
            distributed.barrier()
            start = time.perf_counter()
            distributed.all_reduce(tensor)
            times.append(time.perf_counter() - start)
        found.append(statistics.median(times))
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def measure(columns: int, rows: int, dtype: torch.dtype) -> Rates:
    """Measure the rates of this machine's CPU on the shapes of one linear, with the functions that runs use."""
    torch.manual_seed(0)
    choose_library(dtype)
    x = torch.randn(TOKENS_PER_BATCH, columns).to(dtype)
    weight = torch.randn(rows, columns)
    spec, config = QuantSpec(num_bits=BITS, group_size=64), gptq.Config()
    of_text = Statistics(gram([torch.randn(4 * columns, columns)]), None)
    factor = gptq.factorise(of_text, spec, config, "a linear")
    searching = seconds_of(lambda: search_qparams(weight, spec, 3.0))
    few, all_rows = (seconds_of(partial(gptq.solve, w, factor, spec, config)) for w in (weight[:16], weight))
    at_rest = searching * 16 / rows
    data = torch.empty(1 << 26, dtype=torch.uint8)
    search = weight.numel() / searching
    rest = max(all_rows - few - searching * (1 - 16 / rows), 1e-9)
    summing, wait = collective(weight.numel())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "block"
        writing = seconds_of(lambda: file.write_bytes(data.numpy().tobytes()))
    return Rates(
        product=forward_rate(columns, rows, dtype),
        gram=1.25 * x.numel() * columns / seconds_of(lambda: gram([x])),
        factor=2 / 3 * columns**3 / seconds_of(lambda: gptq.factorise(of_text, spec, config, "a linear")),
        update=(rows - 16) * columns**2 / rest,
        nearest=weight.numel() / seconds_of(lambda: rtn.round_to_nearest(weight, spec, rtn.Config())),
        search=search,
        column=max(few - at_rest, 0.0) / columns,
        train=weight.numel() / _training_step(weight, spec),
        disk=len(data) / writing,
        digest=len(data) / seconds_of(lambda: hashlib.sha256(data.numpy().data).digest()),
        link=ring(4.0 * weight.numel(), 2) / max(summing - wait, 1e-9),
        wait=wait,
    )


def forward_rate(columns: int, rows: int, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the forward of a Llama block of this shape, counted as ``scale_model.py`` counts."""
    heads: Any = {"num_attention_heads": columns // HEAD, "num_key_value_heads": columns // HEAD, "head_dim": HEAD}
    config = LlamaConfig(hidden_size=columns, intermediate_size=rows, num_hidden_layers=1, vocab_size=8, **heads)
    (counted,) = blocks_of(described(config))
    model = LlamaModel(config).eval()
    model.to(dtype=dtype)
    hidden = torch.randn(TOKENS_PER_BATCH // LENGTH, LENGTH, columns).to(dtype)
    with torch.no_grad():
        seconds = seconds_of(lambda: model(inputs_embeds=hidden, use_cache=False))
    return TOKENS_PER_BATCH * counted.flops(LENGTH) / seconds


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


def block_shape(folder: Path) -> tuple[int, int]:
    """Return the columns and rows of the first MLP linear of the model in ``folder``, from its configuration."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    return config.hidden_size, config.intermediate_size


def main() -> None:
    """Measure, and write the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--shape", help="columns and rows of the linear that is measured; default: from the model")
    add_model(parser)
    parser.add_argument("--dtype", default="float32", help="dtype of products")
    args = parser.parse_args()
    columns, rows = map(int, args.shape.split("x")) if args.shape else block_shape(chosen(args))
    args.file.write_text(json.dumps(asdict(measure(columns, rows, getattr(torch, args.dtype))), indent=1))
    print(args.file.read_text())


if __name__ == "__main__":
    main()
