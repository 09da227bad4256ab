"""The memory of LR-QAT, byte by byte: measured on a random Llama, and computed for the Llama-2 7B shape.

    python scripts/bench/lrqat_memory.py [--hidden 1024 --blocks 2 --length 256] [--json memory.json]
    python scripts/bench/lrqat_memory.py --device cuda --dtype bfloat16
    python scripts/bench/lrqat_memory.py --only-predict

Beside it are full training (``lsq``) and Block-AP, EfficientQAT's first phase. Each cell is a process of its own, which
runs the method as a recipe does, with cross entropy and so without a teacher, and looks at its second step:

* held: every tensor that is alive between two steps, by what it is;
* saved: what autograd keeps for the backward at its most, each storage once and nothing that is held anyway;
* live: the most bytes of tensors alive at one time in the step, held ones included;
* real: the most memory of the process in the step above what it had before the model was made (Linux), or what torch
  had allocated (CUDA). It counts what is no tensor of ours too: code that torch loads when it is first used, the
  allocator's holes, the work space of products. On a processor that is most of a small model's.

``memory_accounting`` computes the first three from shapes; each cell is compared with it. The table of the 7B shape is
that arithmetic, for one process, a bfloat16 model and float32 masters, on a GPU (see ``Cell.cuda``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from memory_accounting import Cell, Shape, held_bytes, peak_bytes, saved_bytes
from memory_watch import WATCHED, Watch, in_use
from transformers import LlamaConfig, LlamaForCausalLM

from qtool.blocks.job import Job
from qtool.config.quant import QuantConfig
from qtool.methods import efficientqat, lrqat, lsq
from qtool.models.loaded import LoadedModel
from qtool.system import memory
from qtool.training import block_training, end_to_end
from qtool.training.fit import fit

FORMS = ("float32", "bfloat16", "fixed", "codes")


# ------------------------------------------------------------------------------------------------------- measured


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Return a Llama of ``shape`` with random weights, which has no folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(2048, shape.length),
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(dtype)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.eval().requires_grad_(False)
    nothing: Any = None  # a tokenizer, which training does not ask for
    return LoadedModel(model, nothing, "random", Path(), {name: dtype for name, _ in model.named_parameters()})


def run(loaded: LoadedModel, shape: Shape, cell: Cell) -> None:
    """Run the method of ``cell`` for the watched steps, with cross entropy, which needs no teacher."""
    quant = QuantConfig.model_validate(
        {"num_bits": cell.num_bits, "group_size": cell.group_size, "symmetric": cell.symmetric}
    )
    steps = WATCHED + 1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocabulary, (steps * shape.batch, shape.length), generator=generator)
    if cell.method == "efficientqat":
        block = efficientqat.Config.model_validate(
            {"init": "minmax", "min_steps": steps, "epochs": 1e-9, "batch_size": shape.batch, "e2e": {"steps": 0}}
        )
        efficientqat.run(Job.select(loaded, quant, tokens[: shape.batch]), block)  # a batch, which is worked on at once
        return
    settings: dict[str, Any] = {"loss": "ce", "steps": steps, "min_steps": 0, "batch_size": shape.batch}
    settings["gradient_checkpointing"] = cell.blocks_again
    if cell.method == "lsq":
        lsq.METHOD.run(Job.select(loaded, quant, tokens), lsq.Config(**settings, init="minmax"))
        return
    settings |= {"phi": cell.phi, "checkpoint_weights": cell.weights_again, "rank": cell.rank, "range": "minmax"}
    lrqat.run(Job.select(loaded, quant, tokens), lrqat.Config(**settings))


def measure(shape: Shape, cell: Cell, device: torch.device) -> dict[str, Any]:
    """Return the bytes held, saved, live and real of one training, run in this process."""
    memory.return_freed()
    before = in_use(device, peak=False)
    loaded = random_model(shape, getattr(torch, cell.dtype), device)
    watch = Watch(loaded)
    with mock.patch.object(end_to_end, "fit", watch.fit(fit)), mock.patch.object(block_training, "fit", watch.fit(fit)):
        run(loaded, shape, cell)
    if before is not None:
        watch.found["real"] -= before
    return watch.found


# --------------------------------------------------------------------------------------------------------- tables

LLAMA_7B = Shape(hidden=4096, mlp=11008, blocks=32, vocabulary=32000, heads=32, batch=1, length=1024)
BLOCK_AP = Cell("efficientqat", num_bits=2, group_size=64, symmetric=False)
PUBLISHED = {  # GB of Llama-2 7B: arXiv 2406.06385, Table 3 and a figure; arXiv 2407.11062
    "lrqat fixed": "20.5",
    "lrqat codes": "about 17.5",
    "lsq": "98.5; 62.2 with checkpoints",
    "efficientqat": "8.5",
}


def cells(dtype: str, device: str) -> list[Cell]:
    """Return the cells that are measured on a device and computed for 7B."""
    found = [Cell("lrqat", form, again) for form in FORMS for again in (True, False)]
    found += [Cell("lrqat", blocks_again=True)]
    found += [Cell("lsq", blocks_again=again) for again in (False, True)]
    found.append(BLOCK_AP)
    return [replace(cell, dtype=dtype, cuda=torch.device(device).type == "cuda") for cell in found]


def name(cell: Cell) -> str:
    """Return the name of a cell in the tables."""
    form = f" {cell.phi}" if cell.method == "lrqat" else ""
    weights = ", weights again" if cell.method == "lrqat" and cell.weights_again else ""
    return f"{cell.method}{form}{weights}{', blocks again' if cell.blocks_again else ''}"


def in_a_process(shape: Shape, cell: Cell, device: str) -> dict[str, Any]:
    """Run ``measure`` in a fresh process."""
    asked = json.dumps({"shape": asdict(shape), "cell": asdict(cell), "device": device})
    command = [sys.executable, __file__, "--cell", asked]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return found


def compared(shape: Shape, cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    """Return the measured row of a cell with the computed numbers; for Block-AP without other blocks and windows."""
    held = held_bytes(shape, cell)
    ours = {kind: found["held"].get(kind, 0) for kind in held}
    apart = sum(found["held"].values()) - sum(ours.values())
    return {
        "held": ours,
        "held computed": held,
        "saved": found["saved"],
        "saved computed": saved_bytes(shape, cell),
        "live": found["live"] - apart,
        "live computed": peak_bytes(shape, cell),
        "real": None if found["real"] is None else found["real"] - apart,
        "others": apart,
    }


def measured_table(shape: Shape, rows: list[tuple[Cell, dict[str, Any]]]) -> str:
    """Return bytes per quantized weight and megabytes of the step; computed values are in brackets if they differ."""
    lines = [
        "| training | frozen or master | factors, scales | optimizer | others | saved: weights "
        "| saved: activations, MB | live peak, MB | computed | real peak, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cell, row in rows:
        blocks = 1 if cell.method == "efficientqat" else shape.blocks
        held, n = row["held"], blocks * shape.num_weights
        rest = sum(
            held.get(kind, 0) for kind in ("float weights", "expanded", "start", "best state", "starting scales")
        )
        numbers = [held["weights"], held.get("factors", 0) + held["grid"], held["optimizer"], rest]
        numbers.append(row["saved"].get("weight path", 0))
        differs = row["held"] != row["held computed"] or row["saved"] != row["saved computed"]
        real = "" if row["real"] is None else f"{row['real'] / 1e6:.0f}"
        lines.append(
            f"| {name(cell)} | {' | '.join(f'{number / n:.3f}' for number in numbers)} "
            f"| {row['saved'].get('activations', 0) / 1e6:.1f} | {row['live'] / 1e6:.1f} "
            f"| {row['live computed'] / 1e6:.1f}{' (held or saved differ)' if differs else ''} | {real} |"
        )
    return "\n".join(lines)


def computed_table() -> str:
    """Return the gigabytes of a 7B model by part, beside the numbers of the papers."""
    lines = [
        "| training, Llama-2 7B shape | weights | factors, scales | optimizer | embeddings, norms "
        "| saved, on the way | peak | published |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in cells("bfloat16", "cuda"):
        # of the paper's 2 windows in a step Block-AP works on one at a time
        shape = LLAMA_7B if cell.method != "efficientqat" else replace(LLAMA_7B, length=2048)
        held, peak = held_bytes(shape, cell), peak_bytes(shape, cell)
        weights = sum(held.get(kind, 0) for kind in ("weights", "float weights", "expanded", "start"))
        parts = [weights, held.get("factors", 0) + held["grid"], held["optimizer"]]
        parts.append(held.get("embeddings", 0) + held.get("norms", 0))
        parts += [peak - sum(held.values()), peak]
        published = PUBLISHED.get(f"{cell.method} {cell.phi}" if cell.method == "lrqat" else cell.method, "")
        published = published if cell.weights_again and not cell.blocks_again else ""
        lines.append(f"| {name(cell)} | {' | '.join(f'{part / 1e9:.2f}' for part in parts)} | {published} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in {"hidden": 1024, "mlp": 2816, "blocks": 2, "vocabulary": 4096, "heads": 8, "batch": 1}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only-predict", action="store_true", help="the 7B table, measuring nothing")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, compare, and print both tables."""
    args = parse()
    if args.cell is not None:
        asked = json.loads(args.cell)
        device = torch.device(asked["device"])
        print(json.dumps(measure(Shape(**asked["shape"]), Cell(**asked["cell"]), device)))
        return
    if not args.only_predict:
        shape = Shape(args.hidden, args.mlp, args.blocks, args.vocabulary, args.heads, args.batch, args.length)
        rows = []
        for cell in cells(args.dtype, args.device):
            rows.append((cell, compared(shape, cell, in_a_process(shape, cell, args.device))))
            print(name(cell), rows[-1][1], file=sys.stderr, flush=True)
        print(f"{shape}, {args.dtype}, {args.device}; bytes for each quantized weight unless MB\n")
        print(measured_table(shape, rows), "\n")
        if args.json:
            cells_found = [asdict(cell) | row for cell, row in rows]
            args.json.write_text(json.dumps({"shape": asdict(shape), "cells": cells_found}, indent=1) + "\n")
    print(computed_table())


if __name__ == "__main__":
    main()
