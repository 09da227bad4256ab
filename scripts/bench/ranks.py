"""Quantizes a model in one process and in several, and compares time, memory of each process, and checkpoints.

    python scripts/bench/ranks.py --model smollm2-135m --text TEXT --methods gptq,awq --ranks 1,2 --blocks 4

The first ``--blocks`` decoder blocks of the model are kept; ``TEXT`` is a text file to calibrate on. Each run is
``torchrun --nproc-per-node N -m qtool`` (one process: ``python -m qtool``) with ``--threads`` threads in each process.
The table has, for each run, the seconds of its phase ``quantize``, the peak of the memory of each process that is not a
file's (``RssAnon`` of Linux, read ten times a second), the share of the codes that differ from those of one process,
and the perplexity on windows of the text that calibration did not read, or of ``--held``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from real_models import add_model, chosen
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtool.config.sections import ModelConfig
from qtool.evaluation.perplexity import score_windows
from qtool.models.linears import decoder_blocks, packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.quant.packed_linear import PackedLinear

HELD_WINDOWS = 16  # number of windows that perplexity is measured on
COMMANDS = {"efficientqat": "efficientqat"}  # methods whose command is not ptq
SETTINGS: dict[str, dict[str, Any]] = {"efficientqat": {"e2e": {"steps": 0}}}  # block by block only


def truncated(model: Path, blocks: int, folder: Path) -> Path:
    """Write the model with its first decoder blocks only."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False)
    config = whole.config
    blocks = min(blocks, config.num_hidden_layers)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    del decoder_blocks(whole)[1][blocks:]
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
    return folder


def memory_of(parent: int, peaks: dict[int, int]) -> None:
    """Update the largest memory, in bytes, of each descendant of a process that runs qtool."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            children.setdefault(int(after[1]), []).append(int(entry.name))
    waiting = [parent]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peaks[process] = max(peaks.get(process, 0), 1024 * int(line.split()[1]))


def run(recipe: Path, method: str, ranks: int, threads: int) -> list[int]:
    """Run a recipe, and return the peak memory of each process, the largest first."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "qtool", COMMANDS.get(method, "ptq"), str(recipe), "--quiet"]
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}) as process:
        while process.poll() is None:
            memory_of(process.pid, peaks)
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    if ranks > 1:
        peaks.pop(process.pid, None)  # the launcher
    return sorted(peaks.values(), reverse=True)[:ranks]


def codes_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Return the codes of each linear."""
    layers: dict[str, PackedLinear] = packed_linears(loaded.model)
    return {name: layer.quantized.codes for name, layer in layers.items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the share of the codes that differ."""
    changed = sum(int((one[name] != other[name]).sum()) for name in one)
    return changed / sum(codes.numel() for codes in one.values())


def perplexity(loaded: LoadedModel, text: str, length: int) -> float:
    """Return the perplexity on the last windows of a text."""
    tokens = loaded.tokenizer(text[-HELD_WINDOWS * length * 8 :], return_tensors="pt").input_ids[0]
    windows = tokens[-HELD_WINDOWS * length :].view(HELD_WINDOWS, length)
    return float(score_windows(loaded.model, None, windows, 1, False, "reading").nll.mean().exp())


def written(folder: Path, model: Path, text: Path, method: str, ranks: int, args: argparse.Namespace) -> Path:
    """Write the recipe of a run, whose output is beside it."""
    raw = {
        "model": {"path": str(model), "dtype": args.dtype, "device": "auto"},
        "method": {"name": method, **SETTINGS.get(method, {})},
        "quant": {"num_bits": args.bits, "group_size": args.group_size},
        "data": {"source": str(text), "num_samples": args.windows, "seq_len": args.length},
        "output": {"path": str(folder / f"{method}-{ranks}")},
    }
    file = folder / f"{method}-{ranks}.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run every method in every number of processes, and return a row for each."""
    whole = chosen(args)
    model = truncated(whole, args.blocks, folder / "float") if args.blocks else whole
    rows = []
    for method in args.methods.split(","):
        first: dict[str, torch.Tensor] | None = None
        for ranks in (int(each) for each in args.ranks.split(",")):
            recipe = written(folder, model, args.text.resolve(), method, ranks, args)
            peaks = run(recipe, method, ranks, args.threads)
            output = recipe.with_suffix("")
            loaded = load_model(ModelConfig(path=str(output), dtype="float32", device="cpu"), quantized=True)
            codes = codes_of(loaded)
            first = codes if first is None else first
            row = {"model": whole.name, "blocks": args.blocks, "method": method, "ranks": ranks}
            row |= {"windows": args.windows, "length": args.length, "threads": args.threads}
            row |= {"seconds": json.loads((output / "qtool.json").read_text())["seconds"]["quantize"]}
            row |= {"rank_bytes": peaks, "codes_differing": differing(first, codes)}
            held = (args.held or args.text).read_text(encoding="utf-8")
            rows.append(row | {"perplexity": perplexity(loaded, held, args.length)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Run all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--text", type=Path, required=True, help="text file to calibrate on")
    parser.add_argument("--held", type=Path, help="text file to measure perplexity on; default: the end of --text")
    parser.add_argument("--methods", default="rtn,gptq,awq,signround,efficientqat")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--blocks", type=int, default=0, help="decoder blocks to keep; 0: all")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(args, Path(folder))
    print("| method | processes | seconds | memory of each, GB | codes that differ | perplexity |")
    print("|" + "---|" * 6)
    for row in rows:
        held = ", ".join(f"{each / 1e9:.2f}" for each in row["rank_bytes"])
        cells = [row["method"], row["ranks"], f"{row['seconds']:.1f}", held, f"{100 * row['codes_differing']:.3f} %"]
        print("| " + " | ".join(map(str, [*cells, f"{row['perplexity']:.3f}"])) + " |")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
